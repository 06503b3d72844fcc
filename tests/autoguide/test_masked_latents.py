"""Latents that no density touches are left out of the flow: the ELBO is that of the model without them."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.optim import Adam

from pyro_flowvi import AutoFlowMixture, AutoPlanar, AutoRealNVP, CompiledSVI, diagnose, fit, to_arviz
from pyro_flowvi.infer import CannotCompile, TraceSTL_ELBO

from ..guides import GUIDES, KINDS
from ..hierarchies import padded

LENGTHS = torch.tensor([2, 4, 1])


def mask_of(lengths, size=4):
    return torch.arange(size) < lengths.unsqueeze(-1)


def ragged(y, mask):
    """The same without the padding."""
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("elements", int(mask.sum())):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        z = pyro.sample("z", dist.Normal(0.0, s))
        pyro.sample("y", dist.Normal(z, scale), obs=y[mask])


@pytest.fixture
def data():
    return torch.randn(3, 4), mask_of(LENGTHS)


def by_dist_mask(y, mask):
    s = pyro.sample("s", dist.HalfNormal(1.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(3, 4), s).mask(mask).to_event(2))
    pyro.sample("y", dist.Normal(z, 1.0).mask(mask).to_event(2), obs=y)


def by_rows(y, mask):
    """The mask of a vector is that of all of it."""
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("rows", 3), poutine.mask(mask=mask[:, 1]):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(4)))
        z = pyro.sample("z", dist.Normal(torch.zeros(4), s).to_event(1))
        pyro.sample("y", dist.Normal(z * p, 1.0).to_event(1), obs=y)


def switched_off(y, mask):
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with poutine.mask(mask=False):
        pyro.sample("z", dist.Normal(torch.zeros(2), s).to_event(1))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(torch.zeros(4), s).to_event(1), obs=y)


def flat_by_mask(y, mask):
    """Masked where it is drawn and seen by the data: a flat prior, which stays."""
    with poutine.mask(mask=False):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(m, 1.0).expand([4]).to_event(1), obs=y)


def threshold(y, mask):
    """Seen, but not by a gradient."""
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with poutine.mask(mask=False):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal((z > -1.0) * s, s).expand([4]).to_event(1), obs=y)


KEPT = {padded: 1 + 2 * 7, by_dist_mask: 1 + 7, by_rows: 1 + 2 * (3 + 4), switched_off: 1}
SEEN = {flat_by_mask: 1, threshold: 2}


@pytest.mark.parametrize("model", [*KEPT, *SEEN], ids=lambda model: model.__name__)
def test_what_is_left_out(model, data):
    guide = AutoPlanar(model).materialize(*data)
    assert guide.latent_dim == guide.density(*data).dim == {**KEPT, **SEEN}[model]
    draws = guide.sample_posterior(2000)
    shapes = {name: draw.shape for name, draw in guide().items()}
    assert {name: draw.shape[1:] for name, draw in draws.items()} == shapes
    for name, out in guide._packing.left_out.items():
        free = guide._bijection(name).inv(draws[name])[:, out]
        assert free.mean().abs() < 0.1
        assert (free.std(0) - 1.0).abs().max() < 0.1


def test_the_density_is_that_of_the_model_without(data):
    guide = AutoPlanar(padded, structure=None).materialize(*data)
    # The padded model's vector has the elements in the order of the rows, as the mask takes them.
    z = torch.randn(50, guide.latent_dim)
    values = guide._packing.constrain(z)
    short = {"s": values["s"], **{name: values[name][:, data[1]] for name in ("scale", "z")}}
    without = AutoPlanar(ragged, structure=None).materialize(*data)
    assert torch.allclose(guide.density(*data).log_density(z), without.density(*data).log_density(z))
    assert torch.allclose(without._packing.unconstrain(short)[0], z)
    with torch.no_grad():
        for mine, other in zip(guide.parameters(), without.parameters(), strict=True):
            mine.normal_(0.0, 0.1)
            other.copy_(mine)
    assert torch.allclose(guide.log_prob(values), without.log_prob(short))


@pytest.mark.parametrize("kind", [*KINDS, "planar"])
def test_the_guides_density_counts_it_in_neither_term(kind, data):
    guide = GUIDES[kind](padded).materialize(*data)
    for particles in (1, 5):
        with pyro.plate("particles", particles, dim=-3):
            drawn = poutine.trace(guide).get_trace(*data)
        model = poutine.trace(poutine.replay(padded, trace=drawn)).get_trace(*data)
        assert drawn.nodes[f"_{guide.name}_left_out"]["fn"].log_prob(torch.zeros(10)).eq(0.0).all()
        moved = poutine.Trace()
        for name, site in drawn.nodes.items():
            if name.startswith(f"_{guide.name}"):
                shift = 100.0 * name.endswith("left_out")
                moved.add_node(name, **{**site, "value": site["value"] + shift if shift else site["value"]})
        again = poutine.trace(poutine.replay(guide, trace=moved)).get_trace(*data)
        model_again = poutine.trace(poutine.replay(padded, trace=again)).get_trace(*data)
        assert (again.nodes["z"]["value"] - drawn.nodes["z"]["value"]).abs().max() > 99.0
        if kind != "cif":  # a bound, which is drawn anew
            assert torch.allclose(drawn.log_prob_sum(), again.log_prob_sum())
        assert torch.allclose(model.log_prob_sum(), model_again.log_prob_sum())


LOSSES = [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, RenyiELBO, TraceSTL_ELBO]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("vectorize", [False, True])
def test_objectives(loss, vectorize, data):
    guide = AutoPlanar(padded)
    svi = SVI(padded, guide, Adam({"lr": 0.02}), loss(num_particles=3, vectorize_particles=vectorize))
    losses = [svi.step(*data) for _ in range(5)]
    assert torch.tensor(losses).isfinite().all()
    assert all(param.isfinite().all() for param in guide.parameters())


def test_mixture(data):
    guide = AutoFlowMixture(padded, 2, num_layers=2)
    svi = SVI(padded, guide, Adam({"lr": 0.02}), TraceEnum_ELBO(max_plate_nesting=2))
    assert torch.tensor([svi.step(*data) for _ in range(3)]).isfinite().all()


def test_compiled_steps_are_stock_steps(data):
    losses = []
    for kind, options in ((SVI, {}), (CompiledSVI, {"compile": True})):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoPlanar(padded, name="guide")
        svi = kind(padded, guide, Adam({"lr": 0.02}), Trace_ELBO(), **options)
        found = []
        for i in range(6):
            pyro.set_rng_seed(i)
            found.append(svi.step(*data))
        losses.append(torch.tensor(found))
        del guide, svi
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize(
    "obs_mask", [torch.tensor([True, True, False, True]), torch.ones(4, dtype=torch.bool)]
)
def test_imputation(obs_mask):
    """The closed form: y is missing where the mask is False, and its latent has the prior given m."""

    def model(y, obs_mask):
        m = pyro.sample("m", dist.Normal(0.0, 3.0))
        with pyro.plate("t", 4):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y, obs_mask=obs_mask)

    y = torch.tensor([1.0, 2.0, 0.0, 3.0])
    seen = torch.as_tensor(obs_mask).expand(4)
    guide = AutoRealNVP(model)
    fit(model, guide, y, obs_mask, num_steps=400, seed=0, progress=False)
    draws = guide.sample_posterior(20000)
    precision = seen.sum() + 1.0 / 9.0
    mean, sd = (y * seen).sum() / precision, precision**-0.5
    assert (draws["m"].mean() - mean).abs() < 0.1 * sd
    assert (draws["m"].std() / sd - 1.0).abs() < 0.1
    if not seen.all():
        missing = draws["y_unobserved"][:, ~seen]
        total = (sd**2 + 1.0).sqrt()
        assert ((missing.mean(0) - mean).abs() < 0.1 * total).all()
        assert ((missing.std(0) / total - 1.0).abs() < 0.1).all()
    verdict = diagnose(model, guide, y, obs_mask)
    assert verdict.verdict == "good", verdict


@pytest.mark.long
def test_fit_ends_at_the_elbo_without(data):
    results = {}
    for model in (padded, ragged):
        guide = AutoRealNVP(model)
        results[model] = fit(model, guide, *data, num_steps=1000, seed=0, progress=False)
    assert abs(results[padded].best_loss - results[ragged].best_loss) < 0.1


def test_the_mask_is_read_at_every_call(data):
    y, mask = data
    guide = AutoPlanar(padded).materialize(y, mask)
    guide(y, mask_of(LENGTHS.clamp(max=2)))  # less than at set-up: the flow goes on
    longer = mask_of(LENGTHS + 1)
    refused = pytest.raises(
        ValueError, match=r"site '(scale|z)': expected the elements \[\(0, 2\), \(2, 1\)\]"
    )
    svi = SVI(padded, guide, Adam({"lr": 0.02}), Trace_ELBO())
    for run in (
        guide,
        svi.step,
        guide.density,
        guide.materialize,
        lambda *args: fit(padded, guide, *args, num_steps=2, progress=False),
        lambda *args: diagnose(padded, guide, *args),
    ):
        with refused:
            run(y, longer)
    guide()  # without data there is nothing to read
    for run in (guide.density, guide.materialize):
        with pytest.raises(ValueError, match=r"site 'scale': expected unconstrained shape \(3, 4\)"):
            run(y[:, :3], mask[:, :3])
    svi.step(y, mask)


def test_a_compiled_step_sees_another_mask(data):
    y, mask = data
    svi = CompiledSVI(padded, AutoPlanar(padded), Adam({"lr": 0.02}), Trace_ELBO(), compile=True)
    for _ in range(4):
        svi.step(y, mask)
    for other in (mask_of(LENGTHS + 1), mask.logical_or_(mask_of(LENGTHS + 1))):
        with pytest.raises(CannotCompile, match=r"ValueError: site 'scale': expected the elements") as error:
            svi.step(y, other)
        assert isinstance(error.value.__cause__, ValueError)


def test_copies_know_what_is_left_out(data):
    guide = AutoPlanar(padded).materialize(*data)
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert other.latent_dim == guide.latent_dim == 15
        assert other.sample_posterior(3)["z"].shape == (3, 3, 4)
        assert other.median()["z"].equal(guide.median()["z"])
    fresh = AutoPlanar(padded)
    fresh.load_state_dict(guide.state_dict())
    assert fresh.materialize(*data).median()["s"].equal(guide.median()["s"])


def test_summaries_and_exports(data):
    pytest.importorskip("arviz")
    guide = AutoPlanar(padded).materialize(*data)
    quantiles = guide.quantiles([0.025, 0.5, 0.975])["z"][..., ~data[1]]
    assert torch.allclose(
        quantiles, dist.Normal(0.0, 1.0).icdf(torch.tensor([[0.025], [0.5], [0.975]])), atol=0.1
    )
    assert guide.get_transform()(torch.zeros(15)).shape == (15,)
    assert to_arviz(padded, guide, *data, num_samples=20).posterior["z"].shape[-2:] == (3, 4)
    draws = Predictive(padded, guide=guide, num_samples=4, parallel=True)(*data)
    assert draws["z"].shape[-2:] == (3, 4)


def test_nothing_is_left():
    def model():
        with poutine.mask(mask=False):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="expected a latent that a density touches, got masked ones only"):
        AutoPlanar(model).materialize()


def test_missing_data_are_no_change_of_the_data():
    """A mask made of NaN is read from the argument, to which the trials must not seem to write."""

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 3.0))
        with pyro.plate("t", 4):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y.nan_to_num(), obs_mask=~y.isnan())

    y = torch.tensor([1.0, math.nan, 2.0, math.nan])
    svi = CompiledSVI(model, AutoPlanar(model), Adam({"lr": 0.02}), Trace_ELBO(), compile=True)
    for _ in range(12):
        svi.step(y)
    assert svi._stepper.graphs.num_built == 1
