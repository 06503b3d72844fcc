"""Starting points: density for many points, climbs, Gaussians; against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowvi._compile.log_density import traced
from pyro_flowvi._program.log_density import UnconstrainedModel
from pyro_flowvi.init import Effort, find_gaussian
from pyro_flowvi.init.gaussians import Gaussian, elbos, normal_noise, refine
from pyro_flowvi.init.lbfgs import ascend
from tests import zoo


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gaussian_target(dim=5, condition=1e3, seed=0):
    """A multivariate normal far from the origin: density with gradient, mean, covariance."""
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim))[0]
    variances = torch.logspace(0, -math.log10(condition), dim)
    covariance = basis * variances @ basis.mT
    loc = 10.0 * torch.randn(dim)
    target = torch.distributions.MultivariateNormal(loc, covariance)

    def value_and_grad(z):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = target.log_prob(z)
            return value.detach(), torch.autograd.grad(value.sum(), z)[0]

    return value_and_grad, loc, covariance


class TestDensity:
    @pytest.mark.parametrize("name", list(zoo.make_zoo()))
    def test_a_batch_is_its_points(self, name):
        model, args = zoo.make_zoo()[name]
        density = UnconstrainedModel(model, args)
        z = density.start + 0.3 * torch.randn(6, density.dim, dtype=density.start.dtype)
        together = density.log_density(z)
        alone = torch.stack([density.log_density(point) for point in z])
        assert torch.allclose(together, alone, rtol=1e-4, atol=1e-4, equal_nan=True)

    def test_enumerated_sites_are_summed_out(self):
        y = torch.tensor([-1.0, 0.5, 4.0])

        def model():
            weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
            with pyro.plate("rows", 3):
                k = pyro.sample("k", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
                pyro.sample("y", dist.Normal(3.0 * k, 1.0), obs=y)

        density = UnconstrainedModel(model)
        z = torch.linspace(-2, 2, 7).unsqueeze(-1)
        weight = torch.sigmoid(z)
        mixture = weight * dist.Normal(3.0, 1.0).log_prob(y).exp()
        mixture = mixture + (1 - weight) * dist.Normal(0.0, 1.0).log_prob(y).exp()
        prior = dist.Beta(2.0, 2.0).log_prob(weight) + (weight * (1 - weight)).log()
        truth = mixture.log().sum(-1) + prior.squeeze(-1)
        assert density.batched
        assert torch.allclose(density.log_density(z), truth)

    def test_a_model_that_runs_one_point_at_a_time(self):
        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(float(x.detach()) ** 2, 1.0), obs=torch.tensor(1.0))

        density = UnconstrainedModel(model)
        assert not density.batched
        z = torch.tensor([[0.5], [1.5]])
        truth = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z**2, 1.0).log_prob(torch.tensor(1.0))
        assert torch.allclose(density.log_density(z), truth.squeeze(-1))

    def test_the_graph_is_the_model(self):
        model, args = zoo.make_zoo()["hierarchy"]
        density = UnconstrainedModel(model, args)
        graph = traced(density, width=8)
        assert graph is not density.value_and_grad
        for size in (1, 8, 19):
            z = torch.randn(size, density.dim, dtype=density.start.dtype)
            for mine, truth in zip(graph(z), density.value_and_grad(z), strict=True):
                assert torch.allclose(mine, truth, rtol=1e-4, atol=1e-5)


class TestAscent:
    def test_rosenbrock(self):
        def banana(z):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                value = -((1 - z[:, 0]) ** 2) - 100 * (z[:, 1] - z[:, 0] ** 2) ** 2
                return value.detach(), torch.autograd.grad(value.sum(), z)[0]

        found = ascend(banana, 4 * torch.rand(8, 2) - 2, 300)
        assert torch.allclose(found.points[0], torch.ones(2), atol=1e-5)
        assert bool((found.values[:-1] >= found.values[1:]).all())

    def test_ill_conditioned(self):
        value_and_grad, loc, _ = gaussian_target(dim=10, condition=1e6)
        found = ascend(value_and_grad, torch.randn(4, 10), 800)
        assert torch.allclose(found.points[0], loc, atol=1e-4)

    def test_walls_are_stepped_back_from(self):
        def half(z):
            value = torch.where(z[:, 0] > 0, z[:, 0].log() - z[:, 0], torch.nan)
            return value, torch.where(z > 0, 1 / z - 1, torch.nan)

        found = ascend(half, torch.tensor([[8.0], [-1.0], [0.01]]), 100)
        assert found.points[0].item() == pytest.approx(1.0, abs=1e-4)
        assert found.values[-1] == -math.inf

    def test_several_modes(self):
        def two(z):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                parts = [dist.Normal(m, 0.5).log_prob(z).sum(-1) for m in (-3.0, 3.0)]
                value = torch.logsumexp(torch.stack(parts), 0)
                return value.detach(), torch.autograd.grad(value.sum(), z)[0]

        ends = ascend(two, torch.tensor([[-1.0], [2.0]]), 50).points
        assert sorted(ends.flatten().round().tolist()) == [-3.0, 3.0]


class TestGaussians:
    def test_the_elbo_is_the_closed_form(self):
        value_and_grad, loc, covariance = gaussian_target()
        scale = torch.linalg.cholesky(covariance)
        exact = Gaussian(loc[None], scale[None], ("laplace",))
        assert elbos(value_and_grad, exact, normal_noise(16, 5, loc)).item() == pytest.approx(0.0, abs=1e-9)
        wide = Gaussian(loc[None], 2 * scale[None], ("laplace",))
        truth = -5 * (0.5 * 4 - 0.5 - math.log(2))
        assert elbos(value_and_grad, wide, normal_noise(20_000, 5, loc)).item() == pytest.approx(
            truth, abs=0.1
        )

    def test_a_normal_posterior_is_found(self):
        value_and_grad, loc, covariance = gaussian_target(dim=6, condition=1e6)
        best = find_gaussian(value_and_grad, torch.zeros(6), Effort(starts=8))
        assert torch.allclose(best.loc[0], loc, atol=1e-3)
        assert torch.allclose(best.scale[0] @ best.scale[0].mT, covariance, atol=1e-3)
        assert torch.equal(best.scale[0], best.scale[0].tril())

    def test_refining_reaches_the_best_normal_of_a_skewed_target(self):
        """Of exp(z) ~ Gamma(3, 1): quadrature over mean and scale."""

        def log_gamma(z):
            return (3 * z - z.exp()).sum(-1), 3 - z.exp()

        start = Gaussian(torch.zeros(1, 1), torch.full((1, 1, 1), 0.3), ("prior",))
        found = refine(log_gamma, start, 200, 256, seed=0)
        # The ELBO of N(m, s²) is 3m - exp(m + s²/2) + log s + const: its maximum is at s² = 1/3.
        s = math.sqrt(1 / 3)
        assert found.scale.item() == pytest.approx(s, abs=0.02)
        assert found.loc.item() == pytest.approx(math.log(3) - s**2 / 2, abs=0.02)

    def test_the_mean_field_candidate_is_the_fixed_point_of_coordinate_ascent(self):
        """Conjugate regression: Bishop 2006, section 10.1.2; the update of each factor is in closed form."""
        torch.manual_seed(0)
        x = torch.randn(30, 3) @ torch.tensor([[1.0, 0.8, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
        y = x @ torch.tensor([1.0, -2.0, 0.5]) + torch.randn(30)

        def model():
            beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 2.0).to_event(1))
            pyro.sample("y", dist.Normal((x @ beta.unsqueeze(-1)).squeeze(-1), 1.0).to_event(1), obs=y)

        precision, linear = x.mT @ x + torch.eye(3) / 4, x.mT @ y
        mean = torch.zeros(3)
        for _ in range(500):  # coordinate ascent
            for i in range(3):
                mean[i] = (linear[i] - precision[i] @ mean + precision[i, i] * mean[i]) / precision[i, i]
        density = UnconstrainedModel(model)
        from pyro_flowvi.init.gaussians import _from_curvature, hessians_at

        at = ascend(density.value_and_grad, torch.zeros(2, 3), 100).points[:1]
        gradients = density.value_and_grad(at)[1]
        candidates = _from_curvature(at, gradients, hessians_at(density.value_and_grad, at), "laplace")
        factors = candidates.select([candidates.kinds.index("mean-field")])
        assert torch.allclose(factors.loc[0], mean, atol=1e-6)
        assert torch.allclose(factors.scale[0].diagonal() ** -2, precision.diagonal(), rtol=1e-6)
        assert torch.allclose(factors.scale[0], torch.diag(factors.scale[0].diagonal()))

    def test_laplace_is_not_trusted_blindly(self):
        """A centred funnel has no mode; what is returned has a finite ELBO above that of the start."""

        def funnel(z):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                value = dist.Normal(0.0, 3.0).log_prob(z[:, 0])
                value = value + dist.Normal(0.0, (z[:, :1] / 2).exp(), validate_args=False).log_prob(
                    z[:, 1:]
                ).sum(-1)
                return value.detach(), torch.autograd.grad(value.sum(), z)[0]

        best = find_gaussian(funnel, torch.zeros(6), Effort(starts=16))
        noise = normal_noise(4000, 6, best.loc)
        start = Gaussian(torch.zeros(1, 6), 0.1 * torch.eye(6)[None], ("prior",))
        found, before = elbos(funnel, best, noise).item(), elbos(funnel, start, noise).item()
        assert math.isfinite(found)
        assert found > before + 1.0
        assert found > -2.5  # the best normal has about -1.96

    def test_many_dimensions(self):
        scales = torch.logspace(-2, 1, 300)

        def wide(z):
            return -0.5 * ((z - 1) / scales).square().sum(-1), -(z - 1) / scales**2

        best = find_gaussian(wide, torch.zeros(300), Effort(starts=4))
        assert best.scale.shape == (1, 300)
        assert torch.allclose(best.scale[0], scales, rtol=0.1)
        assert bool(((best.loc[0] - 1).abs() < 0.2 * scales).all())

    def test_a_target_that_is_often_not_finite(self):
        def gated(z):
            value = -0.5 * (z**2).sum(-1)
            return torch.where(z[:, 0] > -1, value, torch.nan), -z

        best = find_gaussian(gated, torch.zeros(2), Effort(starts=4))
        assert bool(best.loc.isfinite().all())
        assert bool(best.scale.isfinite().all())
