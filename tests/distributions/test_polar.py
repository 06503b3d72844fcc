"""The noisy sphere and the power of the radius against quadrature, draws and closed forms."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad

from pyro_flowvi.distributions import FlowDistribution, MixtureOfFlows, PolarNormal
from pyro_flowvi.flows import FLOWS
from pyro_flowvi.transforms import Compose, LowerAffine, RadialPower, Stacked


class TestPolarNormal:
    @pytest.mark.parametrize(("scale", "width"), [(0.2, 4.0), (0.7, 24.0)])
    def test_mass_one_in_the_plane(self, scale, width):
        grid = torch.linspace(-width, width, 2001)
        log_prob = PolarNormal(2, scale).log_prob(torch.cartesian_prod(grid, grid))
        assert log_prob.exp().sum().item() * (2 * width / 2000) ** 2 == pytest.approx(1.0, abs=1e-4)

    @pytest.mark.parametrize("dim", [1, 2, 3, 6])
    def test_mass_one_by_shells(self, dim):
        """Of the surface 2 π^(D/2) / Γ(D/2) r^(D-1)."""
        base = PolarNormal(dim, 0.5)
        direction = torch.nn.functional.normalize(torch.randn(dim), dim=0)

        def shell(r):
            surface = 2 * math.pi ** (dim / 2) / math.gamma(dim / 2) * r ** (dim - 1)
            return surface * base.log_prob(r * direction).exp().item()

        assert quad(shell, 0.0, 30.0, points=[0.3, 1.0, 3.0])[0] == pytest.approx(1.0, abs=1e-6)

    def test_one_dimension_by_a_log_normal(self):
        x = torch.tensor([-2.0, -0.3, 0.7, 1.9])
        expected = dist.LogNormal(0.0, 0.4).log_prob(x.abs()) - math.log(2)
        torch.testing.assert_close(PolarNormal(1, 0.4).log_prob(x.unsqueeze(-1)), expected)

    @pytest.mark.parametrize("dim", [1, 2, 5])
    def test_draws(self, dim):
        x = PolarNormal(dim, 0.3).sample((200_000,))
        log_length = x.norm(dim=-1).log()
        assert log_length.mean().item() == pytest.approx(0.0, abs=0.005)
        assert log_length.std().item() == pytest.approx(0.3, rel=0.01)
        covariance = (x / x.norm(dim=-1, keepdim=True)).T @ (x / x.norm(dim=-1, keepdim=True)) / len(x)
        torch.testing.assert_close(covariance, torch.eye(dim) / dim, atol=0.01, rtol=0)
        assert x.mean(0).abs().max() < 0.02

    def test_gradient_of_the_scale(self):
        """E log|x|² = s², whose derivative is 2 s."""
        scale = torch.tensor(0.5, requires_grad=True)
        x = PolarNormal(3, scale).rsample((100_000,))
        x.norm(dim=-1).log().square().mean().backward()
        assert scale.grad.item() == pytest.approx(1.0, rel=0.03)
        log_prob = PolarNormal(3, scale).log_prob(x.detach())
        (score,) = torch.autograd.grad(log_prob.mean(), scale)
        assert score.item() == pytest.approx(0.0, abs=0.03)

    def test_gradient_in_the_value(self):
        x = torch.randn(5, 3, requires_grad=True)
        assert torch.autograd.gradcheck(PolarNormal(3, 0.5).log_prob, (x,))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_at_the_origin_and_far_away(self, dtype):
        base = PolarNormal(2, torch.tensor(0.01, dtype=dtype))
        x = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [1e10, 0.0]], dtype=dtype, requires_grad=True)
        log_prob = base.log_prob(x)
        log_prob.sum().backward()
        assert log_prob.isfinite().all()
        assert log_prob.dtype == dtype
        assert (log_prob[:2] < log_prob[2]).all()
        assert x.grad.isfinite().all()
        assert (x.grad[0] == 0).all()
        assert base.sample((3,)).dtype == dtype

    def test_shapes(self):
        base = PolarNormal(3, torch.tensor([0.1, 0.2]))
        assert (base.batch_shape, base.event_shape) == ((2,), (3,))
        assert base.rsample((5,)).shape == (5, 2, 3)
        assert base.log_prob(torch.zeros(7, 1, 3)).shape == (7, 2)
        assert base.log_prob(torch.zeros(0, 2, 3)).shape == (0, 2)
        wide = base.expand((4, 2))
        assert wide.rsample((5,)).shape == (5, 4, 2, 3)
        x = wide.sample()
        torch.testing.assert_close(wide.log_prob(x), base.log_prob(x))
        assert PolarNormal(2).expand((3,)).log_prob(torch.ones(2)).shape == (3,)

    def test_in_a_pyro_model(self):
        def model():
            return pyro.sample("x", PolarNormal(2, 0.1).expand([4]).to_event(1))

        assert pyro.poutine.trace(model).get_trace().log_prob_sum().isfinite()

    @pytest.mark.parametrize(
        ("dim", "scale", "name"),
        [(0, 0.1, "dim"), (2.0, 0.1, "dim"), (2, 0.0, "scale"), (2, math.inf, "scale"), (2, "a", "scale")],
    )
    def test_bad_arguments_are_named(self, dim, scale, name):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            PolarNormal(dim, scale)

    def test_validation(self):
        with pytest.raises(ValueError, match="scale"):
            PolarNormal(2, torch.tensor(-1.0), validate_args=True)
        with pytest.raises(ValueError, match="support"):
            PolarNormal(2, validate_args=True).log_prob(torch.tensor([math.nan, 0.0]))
        with pytest.raises(ValueError, match=r"scale: expected torch\.float32"):
            PolarNormal(2, torch.tensor(1))


class TestRadialPower:
    @pytest.mark.parametrize("power", [0.05, 0.5, 3.0])
    def test_a_shell_becomes_as_thick_as_the_power_says(self, power):
        """The image of PolarNormal(D, s) is PolarNormal(D, p s)."""
        flow = RadialPower(3)
        torch.nn.init.constant_(flow.a, (math.log(power) if power < 1 else power - 1) / 5)
        image, expected = FlowDistribution(PolarNormal(3, 0.2), flow), PolarNormal(3, 0.2 * power)
        x = expected.sample((50,))
        torch.testing.assert_close(image.log_prob(x), expected.log_prob(x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("a", [-2.0, 2.0])
    def test_extremes_are_finite(self, dtype, a):
        flow = RadialPower(2).to(dtype)
        torch.nn.init.constant_(flow.a, a)
        for run in (flow.forward_and_log_det, flow.inverse_and_log_det):
            x = torch.tensor([[0.0, 0.0], [1e-6, 0.0], [1e4, -1e4]], dtype=dtype, requires_grad=True)
            y, log_det = run(x)
            (y.sum() + log_det.sum()).backward()
            assert all(t.isfinite().all() for t in (y, log_det, x.grad, flow.a.grad))
            assert (y[0] == 0).all()


def rings(num):
    def one():
        return Compose([RadialPower(2), FLOWS["realnvp"](2, num_layers=2, hidden=(4,)), LowerAffine(2)])

    return Stacked(one() for _ in range(num))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_base_of_a_mixture(dtype):
    base = PolarNormal(2, torch.tensor(0.2, dtype=dtype))
    mixture = MixtureOfFlows(base, rings(3).to(dtype), torch.zeros(3, dtype=dtype))
    x = mixture.rsample((100,))
    assert x.dtype == dtype
    assert mixture.component_log_prob(x).shape == (100, 3)
    torch.testing.assert_close(mixture.log_prob(x), base.log_prob(x))


def test_a_component_becomes_a_ring():
    """By maximum likelihood, to within .05 of the entropy of a ring of radius 2 and deviation .05."""
    torch.manual_seed(0)
    angle = 2 * math.pi * torch.rand(1000)
    x = (2 + 0.05 * torch.randn(1000)).unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1) + 1.0
    flow = Compose([RadialPower(2), LowerAffine(2)])
    law, optim = FlowDistribution(PolarNormal(2), flow), torch.optim.Adam(flow.parameters(), 0.02)
    for _ in range(300):
        optim.zero_grad()
        loss = -law.log_prob(x).mean()
        loss.backward()
        optim.step()
    entropy = math.log(2 * math.pi * 2) + math.log(0.05 * math.sqrt(2 * math.pi * math.e))
    assert loss.item() == pytest.approx(entropy, abs=0.05)
    np.testing.assert_allclose(flow[1].loc.detach().cpu(), [1.0, 1.0], atol=0.02)
