"""Small solves and cumulative sums written out as arithmetic, against torch's own."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

from pyro_flowvi import CompiledSVI
from pyro_flowvi._compile.small_algebra import WRITTEN_OUT
from pyro_flowvi._compile.trace import aten

SOLVE = WRITTEN_OUT[aten.linalg_solve_triangular.default]


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("unitriangular", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (2, 1, 10, 5), (7, 12, 1)], ids=str)
def test_substitution_solves(upper: bool, left: bool, unitriangular: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    size = shape[-2]
    # Torch reads one triangle alone, and so must we.
    matrix = torch.randn(*shape[:-2], size, size) + 3.0 * torch.eye(size)
    right = torch.randn(shape) if left else torch.randn(shape).mT
    options = {"upper": upper, "left": left, "unitriangular": unitriangular}
    torch.testing.assert_close(
        SOLVE(matrix, right, **options), torch.linalg.solve_triangular(matrix, right, **options)
    )


def test_substitution_broadcasts() -> None:
    matrix, right = torch.rand(4, 4).tril() + torch.eye(4), torch.randn(5, 3, 4, 2)
    expected = torch.linalg.solve_triangular(matrix, right, upper=False)
    torch.testing.assert_close(SOLVE(matrix, right, upper=False), expected)


def test_substitution_is_as_accurate_as_lapack_on_ill_conditioned_matrices() -> None:
    torch.manual_seed(0)
    errors: dict[str, list[Tensor]] = {"ours": [], "torch's": []}
    for _ in range(50):
        matrix = torch.linalg.cholesky(torch.cov(torch.randn(16, 17)).double() + 1e-8 * torch.eye(16))
        matrix, right = matrix.float(), torch.randn(16, 1).float()
        truth = torch.linalg.solve_triangular(matrix.double(), right.double(), upper=False)
        found = {
            "ours": SOLVE(matrix, right, upper=False),
            "torch's": torch.linalg.solve_triangular(matrix, right, upper=False),
        }
        for name, value in found.items():
            errors[name].append((value - truth).norm() / truth.norm())
    ours, torchs = (torch.stack(errors[name]).log().mean().exp() for name in errors)
    assert ours <= 2.0 * torchs


def test_larger_systems_are_left_to_lapack() -> None:
    assert SOLVE(torch.eye(40), torch.ones(40, 1), upper=False) is NotImplemented


@pytest.mark.parametrize("name", ["cumsum", "cumprod"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.bool])
def test_cumulative(name: str, dtype: torch.dtype) -> None:
    rule, known = WRITTEN_OUT[getattr(aten, name).default], getattr(torch, name)
    x = (2.0 * torch.randn(3, 5, 2)).to(dtype)
    for dim in (0, 1, -1):
        torch.testing.assert_close(rule(x, dim), known(x, dim))
        torch.testing.assert_close(rule(x, dim, dtype=torch.float64), known(x, dim, dtype=torch.float64))
    assert rule(torch.ones(100), 0) is NotImplemented


@pytest.mark.parametrize("num_particles", [1, 4])
def test_step_with_multivariate_normals_is_that_of_eager_pyro(num_particles: int) -> None:
    cholesky = torch.linalg.cholesky(torch.cov(torch.randn(5, 20)) + torch.eye(5))

    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(5), 0.3).to_event(1))
        mean = pyro.sample("mean", dist.MultivariateNormal(torch.zeros(5), scale_tril=cholesky))
        tril = scale.unsqueeze(-1) * cholesky
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.MultivariateNormal(mean, scale_tril=tril), obs=y)

    torch.manual_seed(0)
    y, losses = torch.randn(12, 5), {}
    for kind, options in ((SVI, {}), (CompiledSVI, {"compile": True})):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        loss = Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
        guide = AutoMultivariateNormal(model)
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.02}), loss, **options)
        losses[kind] = [svi.step(y) for _ in range(15)]
    assert losses[SVI] == pytest.approx(losses[CompiledSVI], rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 4), (200, 100), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("scales", [{}, {"beta": 2, "alpha": 0.5}], ids=str)
def test_product_with_a_bias(shape: tuple[int, ...], scales: dict[str, float]) -> None:
    left, right, bias = torch.randn(shape), torch.randn(shape).mT, torch.randn(shape[-2])
    name = "addmm" if len(shape) == 2 else "baddbmm"
    rule = WRITTEN_OUT[getattr(aten, name).default]
    expected = getattr(torch, name)(bias, left, right, **scales)
    torch.testing.assert_close(rule(bias, left, right, **scales), expected)
