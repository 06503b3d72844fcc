"""Accuracy of planar and radial flows against rounding, the paper's formulas and autodiff."""

import math

import pytest
import torch

from pyro_flowvi.numerics import newton_root, safe_norm, shifted_softplus
from pyro_flowvi.transforms import ConditionalPlanar, ConditionalRadial, Planar, Radial
from pyro_flowvi.transforms.planar import planar_params
from pyro_flowvi.transforms.radial import radial_params

DTYPES = [torch.float32, torch.float64]
EXTREMES = [0.0, 1e-30, 1e-10, 1e-3, 1.0, 1e3]


def points(n, dim, dtype):
    """Vectors of length 1e-3 to 1e3."""
    x = torch.randn(n, dim) * 10 ** torch.empty(n, 1).uniform_(-3, 3)
    return x.clamp(-1e3, 1e3).to(dtype)


def drawn(kind, dim, dtype):
    """A layer with parameters N(0, 3²)."""
    layer = kind(dim).to(dtype)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(3 * torch.randn_like(param))
    return layer


@pytest.mark.parametrize("dim", [1, 2, 5, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_radial_round_trip(dtype, dim):
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for _ in range(100):
        layer, x = drawn(Radial, dim, dtype), points(256, dim, dtype)
        error = (layer.inv(layer(x)) - x).norm(dim=-1) / (1 + x.norm(dim=-1))
        assert error.max() <= tolerance


@pytest.mark.parametrize("dim", [1, 2, 5, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_planar_round_trip_is_what_rounding_allows(dtype, dim):
    for _ in range(100):
        layer, x = drawn(Planar, dim, dtype), points(256, dim, dtype)
        y = layer(x)
        u_hat, c = planar_params(layer.w, layer.u)
        kappa = (1 + u_hat.norm() * layer.w.norm()) / min(1.0, 1 + c.item())
        allowed = 4 * torch.finfo(dtype).eps * kappa * (1 + x.norm(dim=-1) + y.norm(dim=-1))
        assert ((layer.inv(y) - x).norm(dim=-1) <= allowed).all()


@pytest.mark.parametrize("dim", [1, 2, 5, 40])
def test_planar_inverse_of_any_value(dim):
    """The residual f(f⁻¹(y)) - y, for values that no draw produced."""
    for _ in range(100):
        layer, y = drawn(Planar, dim, torch.float64), points(256, dim, torch.float64)
        residual = (layer(layer.inv(y)) - y).norm(dim=-1)
        assert (residual <= 1e-12 * y.norm(dim=-1).clamp(min=1)).all()


def test_planar_matches_the_paper():
    """f(z) = z + û h(w·z + b) with û of the paper's construction, written out for one vector."""
    layer = Planar(3)
    with torch.no_grad():
        layer.u.copy_(torch.tensor([[0.7, -0.2, 0.4]]))
    z = torch.tensor([0.3, -1.2, 0.8])
    w, u, b = (p.detach()[0] for p in (layer.w, layer.u, layer.b))
    wu = float(w @ u)
    m = math.log1p(math.exp(wu + math.log(math.exp(0.999) - 1))) - 0.999
    u_hat = u + (m - wu) * w / float(w @ w)
    expected = z + u_hat * math.tanh(float(w @ z + b))
    torch.testing.assert_close(layer(z), expected)
    assert float(w @ u_hat) == pytest.approx(m)
    jacobian = torch.autograd.functional.jacobian(layer, z)
    torch.testing.assert_close(layer.forward_and_log_det(z)[1], jacobian.slogdet()[1])


def test_radial_matches_the_paper():
    layer = drawn(Radial, 3, torch.float64)
    z = torch.tensor([0.3, -1.2, 0.8])
    alpha, beta = (p.item() for p in radial_params(layer.a, layer.b))
    delta = z - layer.centre[0]
    expected = z + beta * delta / (alpha + delta.norm())
    torch.testing.assert_close(layer(z), expected)
    assert beta >= -alpha


def finite(layer, x, inverse):
    """Value, log-determinant and all gradients of a call are finite."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    value, log_det = layer.inverse_and_log_det(x) if inverse else layer.forward_and_log_det(x)
    (value.square().sum() + log_det.sum()).backward()
    results = [value, log_det, x.grad, *(p.grad for p in layer.parameters())]
    return all(bool(result.isfinite().all()) for result in results)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
class TestBoundaries:
    @pytest.mark.parametrize("size", EXTREMES)
    def test_planar_small_and_large_w(self, dtype, inverse, size):
        layer = drawn(Planar, 3, dtype)
        with torch.no_grad():
            layer.w.mul_(size)
        assert finite(layer, points(64, 3, dtype), inverse)

    @pytest.mark.parametrize("wu", [-1e4, -100.0, -17.0, -1.0, 17.0, 100.0, 1e4])
    def test_planar_c_to_minus_one(self, dtype, inverse, wu):
        layer = Planar(2).to(dtype)
        with torch.no_grad():
            layer.w.copy_(torch.tensor([[1.0, 0.0]]))
            layer.u.copy_(torch.tensor([[wu, 1.0]]))
            layer.b.zero_()
        x = torch.tensor([[0.0, 0.0], [1e-9, 1.0], [1e3, -1e3]], dtype=dtype)
        assert finite(layer, x, inverse)
        assert planar_params(layer.w, layer.u)[1] >= -1 + 0.99e-3

    @pytest.mark.parametrize("a", [-100.0, -10.0, 0.0, 100.0])
    @pytest.mark.parametrize("b", [-100.0, 0.0, 100.0])
    def test_radial_at_its_centre(self, dtype, inverse, a, b):
        layer = Radial(3).to(dtype)
        with torch.no_grad():
            layer.a.fill_(a)
            layer.b.fill_(b)
        centre = layer.centre.detach()
        assert finite(layer, torch.cat([centre, centre + 1e-20, centre + 1.0]), inverse)


@pytest.mark.parametrize("kind", [Planar, Radial])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(kind, dtype):
    with pytest.raises(ValueError, match=r"x: expected torch\.float32 or torch\.float64"):
        kind(3).to(dtype)(torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("kind", [Planar, Radial])
def test_wrong_input_is_named(kind):
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, 3\), got \(5, 2\)"):
        kind(3)(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"y: expected torch\.float32"):
        kind(3).to(torch.float32).inv(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="dim: expected a positive integer, got 0"):
        kind(0)
    with pytest.raises(ValueError, match="num_layers: expected a positive integer, got 0"):
        kind(3, num_layers=0)


@pytest.mark.parametrize("kind", [ConditionalPlanar, ConditionalRadial])
def test_wrong_context_is_named(kind):
    with pytest.raises(ValueError, match=r"context: expected shape \(\*, 2\), got \(5, 3\)"):
        kind(3, context_dim=2).condition(torch.zeros(5, 3))


def test_stacked_layers_equal_single_layers():
    for kind in (Planar, Radial):
        stack = kind(4, num_layers=3)
        with torch.no_grad():
            for param in stack.parameters():
                param.copy_(torch.randn_like(param))
        x = torch.randn(10, 4)
        y, total = x, torch.zeros(10)
        for k in range(3):
            layer = kind(4)
            with torch.no_grad():
                for name, param in layer.named_parameters():
                    strength = "u" if kind is Planar else "b"  # what a stack divides by its length
                    value = getattr(stack, name)[k : k + 1]
                    param.copy_(value / 3 if name == strength else value)
            y, log_det = layer.forward_and_log_det(y)
            total = total + log_det
        got, got_log_det = stack.forward_and_log_det(x)
        torch.testing.assert_close(got, y)
        torch.testing.assert_close(got_log_det, total)


def test_second_derivatives_of_the_planar_inverse():
    """log_prob is differentiated twice by Laplace approximations and Riemannian samplers."""
    layer = drawn(Planar, 2, torch.float64)
    y = torch.randn(3, 2, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda y: layer.inverse_and_log_det(y)[1], (y,))


class TestNumerics:
    def test_shifted_softplus_against_high_precision(self):
        mpmath = pytest.importorskip("mpmath")
        mpmath.mp.dps = 60
        values = [s * 10.0**e for s in (-1, 1) for e in range(-30, 4)]
        m, excess = shifted_softplus(torch.tensor(values, dtype=torch.float64), -0.999)
        k = mpmath.mpf(0.999)
        for t, got_m, got_excess in zip(values, m.tolist(), excess.tolist(), strict=True):
            exact = mpmath.log(1 + (mpmath.exp(k) - 1) * mpmath.exp(t)) - k
            assert got_m == pytest.approx(float(exact), rel=1e-13)
            assert got_excess == pytest.approx(float(exact - mpmath.mpf(t)), rel=1e-12)

    def test_safe_norm(self):
        x = torch.zeros(2, 3, requires_grad=True)
        safe_norm(x).sum().backward()
        assert torch.equal(x.grad, torch.zeros(2, 3))
        y = torch.randn(10, 3)
        torch.testing.assert_close(safe_norm(y), y.norm(dim=-1))

    def test_newton_root_has_the_implicit_gradient_to_second_order(self):
        def residual(s, t, c):
            return s + c * torch.tanh(s) - t, 1 + c / torch.cosh(s) ** 2

        t = torch.randn(20, requires_grad=True)
        c = (torch.rand(20) * 3 - 0.9).requires_grad_()

        def solve(t, c):
            return newton_root(residual, t / (1 + c), t, c, num_steps=20)

        root = solve(t, c)
        torch.testing.assert_close(root + c * torch.tanh(root), t)
        assert torch.autograd.gradcheck(solve, (t, c))
        assert torch.autograd.gradgradcheck(solve, (t, c))
