"""Graphs of models' densities against the models, run point by point."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_flowvi._compile.errors import CompileWarning
from pyro_flowvi._compile.log_density import TracedDensity, traced
from pyro_flowvi._program.log_density import UnconstrainedModel

GROUP = torch.arange(24) % 5
torch.manual_seed(0)
DATA = torch.randn(24, dtype=torch.float64)


def effects(size=5):
    return pyro.sample("a", dist.Normal(0.0, 1.0).expand([size]).to_event(1))


def observe(mean, scale=1.0):
    pyro.sample("y", dist.Normal(mean, scale).to_event(1), obs=DATA[: mean.shape[-1]])


def varying_slopes():
    cholesky = pyro.sample("L", dist.LKJCholesky(2, 1.0))
    scale = pyro.sample("s", dist.HalfNormal(torch.ones(2)).to_event(1))
    with pyro.plate("groups", 5):
        b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2), scale_tril=scale.diag() @ cholesky))
    mean = b[GROUP, 0] + b[GROUP, 1] * DATA
    for i in range(12):
        pyro.sample(f"y{i}", dist.Normal(mean[i], 1.0), obs=DATA[i])


def matrices():
    r, a = pyro.sample("r", dist.Uniform(-1.0, 1.0)), effects(3)
    one = torch.ones(())
    c = torch.stack([torch.stack([one, r]), torch.stack([r, one])])
    pyro.sample("y", dist.MultivariateNormal(torch.linalg.solve(c, a[:2]), c), obs=DATA[:2])
    pyro.factor("f", torch.logdet(c) + torch.linalg.cholesky(c).sum() + a.logsumexp(0) + a.cumsum(0)[2])


def forward_algorithm():
    moves = pyro.sample("T", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
    means, alpha = effects(3), torch.zeros(3)
    for y in DATA[:15]:
        alpha = torch.logsumexp(alpha[:, None] + moves.log(), 0) + dist.Normal(means, 1.0).log_prob(y)
    pyro.factor("likelihood", alpha.logsumexp(0))


def written_states():
    x, scale, noise = torch.zeros(15), pyro.sample("s", dist.LogNormal(0.0, 1.0)), effects(15)
    x[0] = noise[0]
    for t in range(1, 15):
        x[t] = 0.9 * x[t - 1] + scale * noise[t]
    observe(x)


def written_again_and_again():
    s, x = pyro.sample("s", dist.LogNormal(0.0, 1.0)), torch.zeros(20, 3)
    view = x.view(-1)
    x.add_(s)
    x.mul_(2.0)
    x[3].mul_(s)
    view[4] += s
    ordered = (x * s).sort(0)[0]
    ordered.add_(1.0)
    observe(x[GROUP[:20]].sum(-1) + ordered[:, 0] + view[:20])


def masked_data():
    a, seen = effects(), DATA > 0.0
    pyro.sample("y", dist.Normal(a[GROUP][seen], 1.0).to_event(1), obs=DATA[seen])
    missing = torch.where(seen, DATA, torch.nan)
    fn = dist.Normal(a[GROUP], 1.0).mask(~missing.isnan()).to_event(1)
    pyro.sample("missing", fn, obs=missing.nan_to_num())


def counts(k=None, *, total=6):
    p = pyro.sample("p", dist.Beta(1.0, 1.0).expand([5]).to_event(1))
    k = GROUP if k is None else k
    pyro.sample("k", dist.Binomial(total, p[GROUP]).to_event(1), obs=k.double())
    pyro.sample("n", dist.Poisson(5.0 * p[GROUP]).to_event(1), obs=k.double())


def summed_out():
    a = effects()
    with pyro.plate("rows", 24):
        c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(a[GROUP] + c, 1.0), obs=DATA)


def short_latents():
    zero = torch.zeros(5, dtype=torch.float32)
    a = pyro.sample("a", dist.Normal(zero, 1.0 + zero).to_event(1))
    for i in range(12):
        pyro.sample(f"y{i}", dist.Normal(a[GROUP][i], 1.0), obs=DATA[i])


def improper():
    a = pyro.sample("a", dist.ImproperUniform(constraints.real, (), (5,)))
    b = pyro.sample("b", dist.ImproperUniform(constraints.positive, (), ()))
    observe(a[GROUP], b)


def refusing():
    """Has no density where |r| > 1/3."""
    r, a = pyro.sample("r", dist.Normal(0.0, 0.01)), effects(2)
    one = torch.ones(())
    c = torch.stack([torch.stack([one, 3.0 * r]), torch.stack([3.0 * r, one])])
    pyro.sample("y", dist.MultivariateNormal(a[GROUP[:2]], c), obs=DATA[:2])


def refusing_together():
    r = pyro.sample("r", dist.Normal(0.0, 0.01))
    a = effects(2)
    one = torch.ones_like(r)
    c = torch.stack([torch.stack([one, 3.0 * r], -1), torch.stack([3.0 * r, one], -1)], -1)
    pyro.sample("y", dist.MultivariateNormal(a, c), obs=DATA[:2])


def one_by_one(density, z):
    runs = [density.value_and_grad(row[None]) for row in z]
    return torch.cat([value for value, _ in runs]), torch.cat([gradient for _, gradient in runs])


def assert_equal(graph, density, scale=0.7):
    z = density.start + scale * torch.randn(11, density.dim).to(density.start)
    tolerance = 1e-10 if z.dtype == torch.float64 else 1e-4
    for found, expected in zip(graph(z), one_by_one(density, z), strict=True):
        assert found.dtype == expected.dtype
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


MODELS = [
    *(varying_slopes, matrices, forward_algorithm, written_states, written_again_and_again, masked_data),
    *(counts, summed_out, short_latents, improper, refusing, refusing_together),
]


@pytest.mark.parametrize("model", MODELS)
def test_densities_and_gradients(model):
    density = UnconstrainedModel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileWarning)
        graph = traced(density, 8)
    assert graph.holds, graph.cause
    assert_equal(graph, density)
    found, gradient = graph(density.start.repeat(3, 1))
    assert torch.equal(found, found[:1].expand(3))
    assert torch.equal(gradient, gradient[:1].expand(3, -1))


def test_keyword_arguments():
    density = UnconstrainedModel(counts, (GROUP.flip(0),), {"total": 9})
    assert_equal(traced(density, 8), density)


def test_constants_that_change():
    """The graph holds for the constants of its recording; then the model itself is run."""
    held = DATA.clone()

    def model():
        pyro.sample("y", dist.Normal(effects()[GROUP], 1.0).to_event(1), obs=held)

    density = UnconstrainedModel(model)
    graph = traced(density, 8)
    assert graph.holds
    held[3:].mul_(2.0)
    assert not graph.holds
    assert_equal(graph, density)


def read_by_item():
    a = effects()
    observe(a[GROUP] * (2.0 if a[0].item() > 9.0 else 0.5))


def read_from_memory():
    a, x = effects(), torch.zeros(5)
    x[0] = a[0]
    observe(a[GROUP] * (2.0 if x.sum() > 9.0 else 0.5))


def read_by_numpy():
    a = effects()
    observe(a[GROUP] * (2.0 if np.asarray(a.detach())[0] > 9.0 else 0.5))


def read_as_a_list():
    a = effects()
    observe(a[GROUP] * (2.0 if a.tolist()[0] > 9.0 else 0.5))


def of_a_dynamic_shape():
    a = effects()
    observe(a[GROUP] + a[a > 0.0].sum())


LEDGER = torch.zeros(5, dtype=torch.float64)


def written_outside():
    a = effects()
    LEDGER.copy_(a.detach())
    observe(a[GROUP] + LEDGER[GROUP])


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (read_by_item, "a[0].item()"),
        (read_from_memory, "x.sum() > 9.0"),
        (read_by_numpy, "np.asarray"),
        (read_as_a_list, "a.tolist()"),
        (of_a_dynamic_shape, "a[a > 0.0]"),
        (written_outside, "aten.copy_"),
    ],
)
def test_models_without_a_graph(model, said):
    """They are run point by point; a warning says so once, with the operation, its line and a remedy."""
    density = UnconstrainedModel(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        graph, other = traced(density, 8), traced(density, 16)
    text = [str(warning.message) for warning in told if warning.category is CompileWarning]
    assert len(text) == 1
    assert "draw by draw" in text[0]
    assert said in text[0]
    assert "test_log_density.py" in text[0]
    assert "broadcasts" in text[0]
    assert not graph.holds
    assert_equal(graph, density)
    assert_equal(other, density)


def test_strides_do_not_matter():
    density = UnconstrainedModel(varying_slopes)
    graph = TracedDensity(density, 8)
    z = density.start + 0.1 * torch.randn(density.dim, 8).t()
    assert not z.is_contiguous()
    for found, expected in zip(graph.exactly(z), graph.exactly(z.contiguous()), strict=True):
        assert torch.equal(found, expected)
