"""The guide contract for guides that run the model's priors."""

import copy
import pickle

import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import Adam

from pyro_flowvi._program.log_weights import LogWeights
from pyro_flowvi.infer import TraceSTL_ELBO
from tests.guides import BIJECTIVE, GUIDES, KINDS
from tests.hierarchies import make_hierarchies, schools

STRUCTURED = [kind for kind in GUIDES if kind != "mixture"]
ALL = [kind if kind in KINDS else pytest.param(kind, marks=pytest.mark.long) for kind in STRUCTURED]
MODELS = ("schools", "slopes", "padded")
QUICK = {("realnvp", "schools"), ("maf", "padded"), ("cif", "slopes")}
PAIRS = [
    (kind, name) if (kind, name) in QUICK else pytest.param(kind, name, marks=pytest.mark.long)
    for kind in STRUCTURED
    for name in MODELS
]


def case(name):
    return make_hierarchies()[name]


def made(kind, model, args, **options):
    guide = GUIDES[kind](model, structure="program", **options).materialize(*args)
    assert guide.structure.taken
    return guide


def randomly(guide, spread=0.2):
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(spread * torch.randn_like(param))
    return guide


def step(model, guide, args, loss, kwargs=None):
    """Three steps of stock SVI, after which every parameter has moved: last layers that are zero go first."""
    before = [param.detach().clone() for param in guide.parameters()]
    svi = SVI(model, guide, Adam({"lr": 1e-2}), loss)
    assert all(torch.tensor(svi.step(*args, **(kwargs or {}))).isfinite() for _ in range(3))
    assert not any(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


def same_state(one, other):
    state, its = one.state_dict(), other.state_dict()
    assert state.keys() == its.keys()
    return all(torch.equal(value, its[key]) for key, value in state.items())


def check_state_dict(guide, twin, args):
    twin.load_state_dict(guide.state_dict())
    twin.materialize(*args)
    assert same_state(twin, guide)
    if not guide.lower_bound:
        values = guide.sample_posterior(3)
        torch.testing.assert_close(twin.log_prob(values), guide.log_prob(values))


OBJECTIVES = {
    "Trace": lambda: Trace_ELBO(),
    "Trace, vectorized": lambda: Trace_ELBO(num_particles=4, vectorize_particles=True),
    "TraceGraph": lambda: TraceGraph_ELBO(),
    "Renyi": lambda: RenyiELBO(num_particles=3),
    "Renyi, vectorized": lambda: RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True),
    "MeanField": lambda: TraceMeanField_ELBO(),
    "Enum": lambda: TraceEnum_ELBO(max_plate_nesting=2),
    "STL": lambda: TraceSTL_ELBO(num_particles=4, vectorize_particles=True),
}


@pytest.mark.filterwarnings("ignore:.*found no sample sites configured for enumeration")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_objectives(kind, name, objective):
    model, args = case(name)
    guide, flat = made(kind, model, args), GUIDES[kind](model, structure=None).materialize(*args)
    try:
        SVI(model, flat, Adam({"lr": 1e-2}), OBJECTIVES[objective]()).step(*args)
    except (ValueError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            SVI(model, guide, Adam({"lr": 1e-2}), OBJECTIVES[objective]()).step(*args)
    else:
        step(model, guide, args, OBJECTIVES[objective]())


@pytest.mark.parametrize(("kind", "name"), PAIRS)
class TestContract:
    def test_draws_are_scored(self, kind, name):
        model, args = case(name)
        guide = randomly(made(kind, model, args))
        draws = guide.sample_posterior(7)
        for site, value in draws.items():
            node = guide.prototype_trace.nodes[site]
            assert value.shape == (7,) + node["value"].shape
            assert node["fn"].support.check(value).all()
        log_prob = guide.log_prob(draws)
        assert log_prob.shape == (7,)
        assert log_prob.isfinite().all()
        if not guide.lower_bound:
            single = {site: value[0] for site, value in draws.items()}
            torch.testing.assert_close(guide.log_prob(single), log_prob[0])
            assert guide.sample_posterior((2, 3))["y" if "y" in draws else next(iter(draws))].shape[:2] == (
                2,
                3,
            )

    def test_log_prob_is_what_pyro_scores(self, kind, name):
        if kind == "cif":
            pytest.skip("an estimate")
        model, args = case(name)
        guide = randomly(made(kind, model, args))
        trace = poutine.trace(guide).get_trace(*args)
        values = {site: trace.nodes[site]["value"].detach() for site in guide._unconstrained_shapes}
        torch.testing.assert_close(guide.log_prob(values), trace.log_prob_sum(), rtol=1e-6, atol=1e-6)

    def test_summaries(self, kind, name):
        model, args = case(name)
        guide = randomly(made(kind, model, args), 0.05)
        median, quantiles = guide.median(), guide.quantiles([0.1, 0.5, 0.9])
        draws = guide.sample_posterior(20_000)
        for site, value in median.items():
            node = guide.prototype_trace.nodes[site]
            assert value.shape == node["value"].shape
            assert node["fn"].support.check(quantiles[site]).all()
            if node["fn"].support.event_dim == 0:
                assert (quantiles[site].diff(dim=0) > 0).all()
                for prob, point in zip((0.1, 0.5, 0.9), quantiles[site], strict=True):
                    share = (draws[site] <= point).double().mean(0)
                    assert ((share - prob).abs() < 0.03).all()

    def test_state_dict_round_trip(self, kind, name):
        model, args = case(name)
        guide = randomly(made(kind, model, args))
        check_state_dict(guide, made(kind, model, args), args)

    def test_deepcopy(self, kind, name):
        model, args = case(name)
        guide = made(kind, model, args)
        step(model, guide, args, Trace_ELBO())
        twin, state = copy.deepcopy(guide), copy.deepcopy(guide.state_dict())
        assert twin.name != guide.name
        assert same_state(twin, guide)
        step(model, twin, args, Trace_ELBO())
        assert all(torch.equal(value, state[key]) for key, value in guide.state_dict().items())
        assert not same_state(twin, guide)

    def test_particles_vectorize(self, kind, name):
        model, args = case(name)
        assert LogWeights(model, made(kind, model, args), args).vectorized

    @pytest.mark.parametrize("parallel", [False, True])
    def test_predictive(self, kind, name, parallel):
        model, args = case(name)
        guide = made(kind, model, args)
        draws = Predictive(model, guide=guide, num_samples=5, parallel=parallel)(*args)
        for site in guide._unconstrained_shapes:
            assert draws[site].numel() == 5 * guide.prototype_trace.nodes[site]["value"].numel()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("before", [False, True])
    def test_dtype(self, kind, name, dtype, before):
        model, args = case(name)
        guide = GUIDES[kind](model, structure="program")
        guide = guide.to(dtype).materialize(*args) if before else guide.materialize(*args).to(dtype)
        assert {param.dtype for param in guide.parameters()} == {dtype}
        assert all(value.dtype == dtype for value in guide.sample_posterior(2).values())
        args = tuple(arg.to(dtype) if arg.is_floating_point() else arg for arg in args)
        if dtype == torch.float64 or name != "slopes":  # the model's own constants are of the default dtype
            step(model, guide, args, Trace_ELBO())

    def test_neutra(self, kind, name):
        model, args = case(name)
        if kind not in BIJECTIVE or name == "padded":
            pytest.skip("no bijection of all latents")
        guide = made(kind, model, args)
        neutra = NeuTraReparam(guide)
        mcmc = MCMC(
            NUTS(neutra.reparam(model), max_tree_depth=3), num_samples=3, warmup_steps=3, disable_progbar=True
        )
        mcmc.run(*args)
        (draws,) = mcmc.get_samples().values()
        assert set(neutra.transform_sample(draws.unsqueeze(-2))) == set(guide._unconstrained_shapes)


@pytest.mark.parametrize("kind", ALL)
class TestPickle:
    def test_with_a_model_that_can_be_pickled(self, kind):
        model, args = case("schools")
        guide = made(kind, model, args)
        step(model, guide, args, Trace_ELBO())
        twin = pickle.loads(pickle.dumps(guide))
        assert str(twin.structure) == str(guide.structure)
        values = guide.sample_posterior(3)
        if not guide.lower_bound:
            torch.testing.assert_close(twin.log_prob(values), guide.log_prob(values))
        step(model, guide, args, Trace_ELBO())
        step(model, twin, args, Trace_ELBO())

    def test_with_a_model_that_cannot(self, kind):
        _, args = case("schools")
        guide = made(kind, lambda *data: schools(*data), args)
        twin = pickle.loads(pickle.dumps(guide))
        values = guide.sample_posterior(3)
        assert twin.log_prob(values).isfinite().all()
        if not guide.lower_bound:
            torch.testing.assert_close(twin.log_prob(values), guide.log_prob(values))


@pytest.mark.parametrize("name", ["schools", "slopes", "padded", "topics"])
@pytest.mark.parametrize(
    "kind",
    ["realnvp", pytest.param("maf", marks=pytest.mark.long), pytest.param("cif", marks=pytest.mark.long)],
)
def test_state_dict_before_data(kind, name):
    """A twin that has not seen data when it gets the state."""
    model, args = case(name)
    guide = randomly(made(kind, model, args))
    check_state_dict(guide, GUIDES[kind](model, structure="program"), args)
