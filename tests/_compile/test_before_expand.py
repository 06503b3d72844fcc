"""The pass that computes before it expands: the same function, on fewer elements."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.ops.indexing import Vindex
from torch import Tensor, fx

from pyro_flowvi import CompiledSVI
from pyro_flowvi._compile.before_expand import compute_before_expand
from pyro_flowvi._compile.inductor import _functional_graph
from pyro_flowvi._compile.torch_private import private
from pyro_flowvi._compile.trace import trace

ROWS, COSTLY = 50, ("log", "exp", "lgamma", "softmax", "digamma", "rsqrt", "pow")
Function = Callable[[Tensor, Tensor], Tensor]


def log_of_expanded(a: Tensor, x: Tensor) -> Tensor:
    return (a.sigmoid().expand(ROWS, 3).clamp(1e-6).log() * x).logsumexp(-1)


def normaliser_of_expanded(a: Tensor, x: Tensor) -> Tensor:
    scale = a.exp().unsqueeze(-2).expand(4, ROWS, 3)
    return dist.Normal(0.0, scale).log_prob(x).sum(-1) - scale.log().sum(-1).mean(1, keepdim=True)


def softmax_of_expanded(a: Tensor, x: Tensor) -> Tensor:
    return (a.expand(ROWS, 3).log_softmax(-1) + x).exp()


def merged(a: Tensor, x: Tensor) -> Tensor:
    left = a.exp().unsqueeze(-2).expand(4, ROWS, 3).reshape(4 * ROWS, 1, 3)
    product = torch.bmm(left, x.expand(4, ROWS, 3).reshape(4 * ROWS, 3, 1))
    return product.reshape(4, ROWS).log()


def split_and_permuted(a: Tensor, x: Tensor) -> Tensor:
    long = a.exp().unsqueeze(1).expand(4, ROWS, 3).reshape(4, -1).permute(1, 0)
    return long.reshape(5, ROWS // 5, 3, 4).log().transpose(0, 2)[1:, 2:7, ..., ::2] * x[0, 0]


def across_boundaries(a: Tensor, x: Tensor) -> Tensor:
    return a.exp().unsqueeze(1).expand(4, 2, 3).reshape(6, 4).log() + x.sum()


def extremes(a: Tensor, x: Tensor) -> Tensor:
    wide = a.exp().unsqueeze(1).expand(4, ROWS, 3)
    return wide.amax((1, 2)) + wide.max(1).values.sum(-1) + (wide * x).amin((0, 2)).sum()


def numbers_of_other_dtypes(a: Tensor, x: Tensor) -> Tensor:
    weights = torch.ones(1, dtype=torch.float64) * a.float()
    counts = (a > 0).unsqueeze(1).expand(4, ROWS, 3).sum((0, 1))
    return weights.expand(ROWS, 4, 3).exp().mean(0) * counts + x.mean()


def looked_up(a: Tensor, x: Tensor) -> Tensor:
    places = torch.arange(ROWS) % 3
    table = a.unsqueeze(1).expand(4, ROWS, 3)
    one = table.gather(-1, places.expand(4, ROWS).unsqueeze(-1)).squeeze(-1)
    hot = torch.nn.functional.one_hot(places, 3).to(a)
    return (
        one.exp() + (table.log_softmax(-1) * hot).sum(-1) + table[:, torch.arange(ROWS), places] + x.sum(-1)
    )


def concatenated(a: Tensor, x: Tensor) -> Tensor:
    parts = torch.cat([a.unsqueeze(1).expand(4, ROWS, 3), x.expand(4, ROWS, 3)], -1)
    return parts.exp().cumsum(-1).flip(-1) + torch.full((ROWS, 6), 2.0).log()


FUNCTIONS = [
    *(log_of_expanded, normaliser_of_expanded, softmax_of_expanded, merged, split_and_permuted),
    *(across_boundaries, extremes, numbers_of_other_dtypes, looked_up, concatenated),
]


def graphs(
    function: Callable[..., Tensor], *inputs: Tensor
) -> tuple[fx.GraphModule, fx.GraphModule, list[Tensor]]:
    """A function of tensors and its gradients, as Inductor would have it and after the pass; their inputs."""

    def values(*given: Tensor) -> tuple[Tensor, ...]:
        leaves = [value.detach().requires_grad_() for value in given]
        with torch.enable_grad():
            out = function(*leaves)
            grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True, materialize_grads=True)
        return (out.detach(), *grads)

    fake = private("FakeTensorMode")(allow_non_fake_inputs=True, shape_env=private("ShapeEnv")())
    traced = trace(values, [], inputs)
    given = [*traced.constants, *inputs]
    before = _functional_graph(traced.graph, given, fake)
    return before, compute_before_expand(before), given


def costs(graph: fx.GraphModule) -> int:
    """Elements that operations take which are worth not repeating."""
    return sum(
        node.meta["val"].numel()
        for node in graph.graph.nodes
        if node.op == "call_function" and any(name in str(node.target) for name in COSTLY)
    )


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_same_values_and_gradients(function: Function) -> None:
    torch.manual_seed(0)
    a, x = torch.randn(4, 3), torch.rand(ROWS, 3)
    inputs = (a[0] if function in (log_of_expanded, softmax_of_expanded) else a, x)
    before, after, given = graphs(function, *inputs)
    for old, new in zip(before(*given), after(*given), strict=True):
        assert old.dtype == new.dtype
        torch.testing.assert_close(new, old, rtol=1e-12 if old.dtype == torch.float64 else 1e-5, atol=1e-12)


@pytest.mark.parametrize("function", [log_of_expanded, softmax_of_expanded, merged], ids=lambda f: f.__name__)
def test_costly_operations_take_fewer_elements(function: Function) -> None:
    wide = function is merged
    before, after, _ = graphs(function, torch.randn(4, 3) if wide else torch.randn(3), torch.rand(ROWS, 3))
    assert costs(after) <= 0.7 * costs(before)


def test_parameters_are_read_before_they_are_changed() -> None:
    def step(a: Tensor, x: Tensor) -> tuple[Tensor]:
        old = a.expand(2, 3).exp()
        a.copy_(a + x)
        return (old.clone(),)

    fake = private("FakeTensorMode")(allow_non_fake_inputs=True, shape_env=private("ShapeEnv")())
    a, x = torch.randn(3), torch.randn(3)
    graph = compute_before_expand(_functional_graph(step, [a, x], fake))
    start = a.clone()
    (old,) = graph(a, x)
    torch.testing.assert_close(old, start.exp().expand(2, 3))
    torch.testing.assert_close(a, start + x)


def enumerated_mixture(y: Tensor, prior: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(prior))
    locs = pyro.sample("locs", dist.Normal(0.0, 5.0).expand([3]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(Vindex(locs)[..., z], scale), obs=y)


def one_hot_regression(y: Tensor, group: Tensor) -> None:
    with pyro.plate("groups", 4, dim=-2):
        effect = pyro.sample("effect", dist.StudentT(5.0, 0.0, 1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    hot = torch.nn.functional.one_hot(group, 4).to(y)
    with pyro.plate("data", len(y)):
        pyro.sample(
            "y", dist.GammaPoisson(rate, (-(hot * effect.squeeze(-1).unsqueeze(-2)).sum(-1)).exp()), obs=y
        )


@pytest.mark.parametrize("model", [enumerated_mixture, one_hot_regression], ids=lambda f: f.__name__)
def test_whole_step_is_that_of_eager_pyro(model: Callable[..., None]) -> None:
    torch.manual_seed(0)
    y = torch.poisson(3.0 * torch.rand(40))
    args = (y, torch.ones(3)) if model is enumerated_mixture else (y, torch.arange(40) % 4)
    losses = {}
    for kind, options in ((SVI, {}), (CompiledSVI, {"compile": True})):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        program, elbo = model, Trace_ELBO
        if model is enumerated_mixture:
            program, elbo = config_enumerate(model), TraceEnum_ELBO
        guide = AutoDiagonalNormal(poutine.block(program, hide=["z"]))
        loss = elbo(num_particles=4, vectorize_particles=True, max_plate_nesting=2)
        svi = kind(program, guide, pyro.optim.Adam({"lr": 0.02}), loss, **options)
        losses[kind] = [svi.step(*args) for _ in range(15)]
    assert losses[SVI] == pytest.approx(losses[CompiledSVI], rel=1e-9)
