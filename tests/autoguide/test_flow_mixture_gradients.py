"""Gradients of AutoFlowMixture under every objective, against exact ones; enumerated and drawn components."""

import copy
import functools
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.distributions.score_parts import ScoreParts
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import Adam

from pyro_flowvi import AutoFlowMixture, CompiledSVI
from pyro_flowvi._program.log_weights import LogWeights
from pyro_flowvi.autoguide._mixture_sites import LatentGivenComponent
from pyro_flowvi.distributions import MixtureOfFlows
from pyro_flowvi.flows import FLOWS
from pyro_flowvi.infer import (
    TraceAuxiliary_ELBO,
    TraceEnumSTL_ELBO,
    TraceIW_ELBO,
    TraceMeanFieldJacobian_ELBO,
    TraceSTL_ELBO,
)
from pyro_flowvi.transforms import Stacked
from tests import zoo
from tests.autoguide.test_flow_mixture import SMALL, Y, log_density, square_root, two_modes

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*found no sample sites configured for enumeration"),
]


def away_from_the_posterior():
    torch.manual_seed(0)
    guide = AutoFlowMixture(square_root, 2, "planar", 1, init_scale=0.6).materialize(Y)
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(0.3 * torch.randn_like(param))
        guide._flow.logits.copy_(torch.tensor([0.4, -0.4]))
        guide.affine.loc.copy_(torch.tensor([[-1.0], [1.2]]))
    return guide


class Gradients:
    """Mean and standard error of a gradient over many runs."""

    def __init__(self, guide, run, rounds, share=1.0):
        found = []
        for seed in range(rounds):
            torch.manual_seed(seed)
            guide.zero_grad()
            run()
            found.append(torch.cat([share * param.grad.flatten() for param in guide.parameters()]))
        found = torch.stack(found)
        self.mean, self.error = found.mean(0), found.std(0) / math.sqrt(rounds)

    def distance(self, other):
        """The largest difference of two means, in standard errors."""
        return ((self.mean - other.mean) / (self.error.square() + other.error.square() + 1e-24).sqrt()).abs()


@functools.cache
def exact_elbo_gradient():
    """Of the sum over components of the weight times the expectation over many draws."""
    guide = away_from_the_posterior()

    def run():
        q = guide.get_posterior()
        z = q.rsample_components((2000,))
        (q.weights * (q.log_prob(z) - log_density(z[..., 0])).mean(0)).sum().backward()

    return Gradients(guide, run, 30)


def exact_renyi_gradient(alpha, num_particles):
    """Of the expectation over all choices of components, and over draws of the particles."""
    guide = away_from_the_posterior()

    def run():
        q = guide.get_posterior()
        z = q.components.transform(torch.randn(20_000, num_particles, 2, 1))
        powers = (1.0 - alpha) * (log_density(z[..., 0]) - q.log_prob(z))
        total = 0.0
        for choice in itertools.product(range(2), repeat=num_particles):
            logs = torch.stack([powers[:, i, k] for i, k in enumerate(choice)], -1).logsumexp(-1)
            bound = (logs - math.log(num_particles)).mean() / (1.0 - alpha)
            total = total - q.logits[list(choice)].sum().exp() * bound
        total.backward()

    return Gradients(guide, run, 8)


def trace_gradient(guide, vectorized=True):
    if vectorized:
        loss = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    else:
        loss = Trace_ELBO(num_particles=2)
    return Gradients(guide, lambda: loss.loss_and_grads(square_root, guide, Y), 60 if vectorized else 150)


class TestGradients:
    """The exact gradient is that of the sum over components, by autograd."""

    @pytest.mark.parametrize("vectorized", [True, False])
    @pytest.mark.parametrize("kind", [TraceEnum_ELBO, TraceEnumSTL_ELBO])
    def test_enumerated(self, kind, vectorized):
        guide = away_from_the_posterior()
        count = 1000 if vectorized else 2
        loss = kind(num_particles=count, vectorize_particles=vectorized, max_plate_nesting=1)
        found = Gradients(guide, lambda: loss.loss_and_grads(square_root, guide, Y), 60)
        assert found.distance(exact_elbo_gradient()).max() < 4.5

    def test_path_gradient_has_no_variance_at_the_posterior(self):
        guide = AutoFlowMixture(two_modes, 2, **SMALL).materialize()
        shares, scales = torch.tensor([0.2, 0.8]), torch.tensor([1.0, 0.5]).reshape(2, 1, 1)
        guide.place(torch.tensor([[-3.0], [3.0]]), scales, shares)
        for kind, low, high in ((TraceEnumSTL_ELBO, 0.0, 1e-9), (TraceEnum_ELBO, 1e-2, math.inf)):
            loss = kind(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
            guide.zero_grad()
            loss.loss_and_grads(two_modes, guide)
            norm = torch.cat([param.grad.flatten() for param in guide.parameters()]).norm()
            assert low <= norm <= high

    def test_component_drawn_under_trace_auxiliary(self):
        """Which adds the score that ``Trace_ELBO`` leaves out, and here finds it there already."""
        guide = away_from_the_posterior()
        loss = TraceAuxiliary_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
        found = Gradients(guide, lambda: loss.loss_and_grads(square_root, guide, Y), 60)
        assert found.distance(exact_elbo_gradient()).max() < 4.5

    @pytest.mark.parametrize("vectorized", [True, False])
    def test_component_drawn(self, vectorized):
        guide = away_from_the_posterior()
        assert trace_gradient(guide, vectorized).distance(exact_elbo_gradient()).max() < 4.5

    def test_without_the_correction_it_is_biased(self, monkeypatch):
        """Fact 1: Trace_ELBO leaves an auxiliary site's log q out of the score's factor."""

        def plain(self, x):
            log_prob = self.log_prob(x)
            return ScoreParts(log_prob, 0, log_prob)

        monkeypatch.setattr(LatentGivenComponent, "score_parts", plain)
        guide = away_from_the_posterior()
        assert trace_gradient(guide).distance(exact_elbo_gradient()).max() > 20.0

    @pytest.mark.parametrize(("alpha", "num_particles"), [(0.0, 2), (0.5, 3)])
    def test_renyi(self, alpha, num_particles):
        """Many bounds of a few particles at once: a plate to the right of theirs."""
        guide, copies = away_from_the_posterior(), 4000

        def repeated(program):
            def run(y):
                with pyro.plate("copies", copies, dim=-2):
                    program(y)

            return run

        loss = RenyiELBO(alpha, num_particles, vectorize_particles=True, max_plate_nesting=2)
        model, many = repeated(square_root), repeated(guide)
        found = Gradients(guide, lambda: loss.loss_and_grads(model, many, Y), 25, 1.0 / copies)
        assert found.distance(exact_renyi_gradient(alpha, num_particles)).max() < 4.5

    @pytest.mark.parametrize("alpha", [0.0, 0.5])
    def test_renyi_one_by_one(self, alpha):
        """As for both particles at once, at the same draws, but for a constant times the score."""
        guide, loss = away_from_the_posterior(), RenyiELBO(alpha, 2)
        component, latent = f"_{guide.name}_component", f"_{guide.name}_latent"
        drawn = poutine.trace(guide).get_trace(Y)
        components, latents = torch.tensor([0, 1]), torch.tensor([[-1.3], [1.7]])

        def replayed(k, z):
            fixed = poutine.Trace()
            fixed.add_node(component, **{**drawn.nodes[component], "value": k})
            fixed.add_node(latent, **{**drawn.nodes[latent], "value": z})
            return poutine.replay(guide, trace=fixed)

        each = [replayed(k, z) for k, z in zip(components, latents, strict=True)]
        calls = itertools.count()
        loss.loss_and_grads(square_root, lambda y: each[next(calls)](y), Y)
        found = {name: param.grad.clone() for name, param in guide.named_parameters()}
        guide.zero_grad()
        loss = RenyiELBO(alpha, 2, vectorize_particles=True, max_plate_nesting=1)
        both = replayed(components.reshape(2, 1), latents.reshape(2, 1, 1))
        loss.loss_and_grads(square_root, both, Y)
        constant = math.log(0.5) / (1.0 - alpha) * (1.0 - 2.0 * guide.weights)  # of the scores of 0 and of 1
        for name, param in guide.named_parameters():
            expected = param.grad + (constant if name == "flow.logits" else 0.0)
            torch.testing.assert_close(found[name], expected)

    def test_renyi_of_one_particle_is_refused(self):
        """It would be the ELBO, whose value is not known in the backward pass."""
        guide = away_from_the_posterior()
        with pytest.raises(ValueError, match="num_particles: expected at least 2"):
            RenyiELBO(num_particles=1).loss_and_grads(square_root, guide, Y)

    def test_renyi_where_one_particle_has_all_the_weight(self):
        guide = away_from_the_posterior()
        for vectorized in (False, True):
            loss = RenyiELBO(num_particles=2, vectorize_particles=vectorized, max_plate_nesting=1)
            guide.zero_grad()
            loss.loss_and_grads(square_root, guide, 1e4 * Y)
            assert all(param.grad.isfinite().all() for param in guide.parameters())

    @pytest.mark.parametrize(
        "loss",
        [
            Trace_ELBO(),
            TraceEnum_ELBO(max_plate_nesting=1),
            TraceEnumSTL_ELBO(max_plate_nesting=1),
            RenyiELBO(num_particles=2),
            TraceAuxiliary_ELBO(),
        ],
        ids=lambda loss: type(loss).__name__,
    )
    @pytest.mark.parametrize("enumerate", ["parallel", "sequential"])
    @pytest.mark.filterwarnings("error")
    def test_no_warning_where_it_is_right(self, loss, enumerate):
        guide = AutoFlowMixture(square_root, 2, **SMALL, enumerate=enumerate)
        SVI(square_root, guide, Adam({"lr": 0.01}), loss).step(Y)

    @pytest.mark.parametrize("validate", [False, True])
    @pytest.mark.parametrize(
        "kind",
        [
            infer.JitTrace_ELBO,
            infer.JitTraceEnum_ELBO,
            infer.JitTraceMeanField_ELBO,
            infer.JitTraceGraph_ELBO,
            infer.TraceGraph_ELBO,
            infer.TraceMeanField_ELBO,
            infer.TraceTailAdaptive_ELBO,
            TraceIW_ELBO,
            TraceMeanFieldJacobian_ELBO,
            TraceSTL_ELBO,
        ],
    )
    def test_others_are_refused_by_name(self, kind, validate):
        guide = away_from_the_posterior()
        loss = kind(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
        with (
            pyro.validation_enabled(validate),
            pytest.raises(
                (ValueError, NotImplementedError),
                match=rf"{guide.name}: expected TraceEnum_ELBO, .* or RenyiELBO, got {kind.__name__}\b",
            ),
        ):
            SVI(square_root, guide, Adam({"lr": 0.01}), loss).step(Y)

    def test_trace_graph_is_refused_by_the_distribution(self):
        def own_guide(y):
            flows = Stacked(FLOWS["planar"](1) for _ in range(2))
            pyro.sample("x", dist.Delta(MixtureOfFlows(None, flows).rsample()[0]))

        with pytest.raises(NotImplementedError, match="MixtureOfFlows: expected TraceEnum_ELBO"):
            TraceGraph_ELBO().loss(square_root, own_guide, Y)


class TestEnumeration:
    def test_the_loss_is_the_elbo_of_the_mixture(self):
        guide = away_from_the_posterior()
        loss = TraceEnum_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=1)
        torch.manual_seed(0)
        found = -loss.loss(square_root, guide, Y)
        torch.manual_seed(0)
        q = guide.get_posterior()
        z = q.rsample_components((7, 1))
        expected = (q.weights * (log_density(z[..., 0]) - q.log_prob(z))).sum(-1).mean()
        assert found == pytest.approx(expected.item(), abs=1e-9)

    @pytest.mark.parametrize(("name", "kind"), [("hierarchy", "parallel"), ("not_for_batches", "sequential")])
    def test_auto_tests_the_model(self, name, kind):
        model, args = zoo.make_zoo()[name]
        guide = AutoFlowMixture(model, 2, **SMALL).materialize(*args)
        trace = poutine.trace(guide).get_trace(*args)
        assert trace.nodes[f"_{guide.name}_component"]["infer"]["enumerate"] == kind

    def test_as_many_draws_as_components(self, monkeypatch):
        drawn = []
        original = MixtureOfFlows.rsample_components

        def count(self, shape=()):
            result = original(self, shape)
            drawn.append(result.shape)
            return result

        monkeypatch.setattr(MixtureOfFlows, "rsample_components", count)
        model, args = zoo.make_zoo()["nested_plates"]
        guide = AutoFlowMixture(model, 3, **SMALL).materialize(*args)
        loss = TraceEnum_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=2)
        loss.loss(model, guide, *args)
        assert drawn == [(5, 1, 1, 3, guide.latent_dim)]

    @pytest.mark.parametrize("name", ["enumerated", "hierarchy", "nested_plates"])
    def test_one_by_one_is_the_same(self, name):
        model, args = zoo.make_zoo()[name]
        torch.manual_seed(0)
        guide = AutoFlowMixture(model, 3, **SMALL).materialize(*args)
        means = []
        for kind in ("parallel", "sequential"):
            guide._enumerate = kind
            options = {"num_particles": 2000, "vectorize_particles": True, "max_plate_nesting": 2}
            means.append(TraceEnum_ELBO(**options).loss(model, guide, *args))
        guide._enumerate = "parallel"
        weights = LogWeights(model, guide, args).log_weights(6000)
        error = float(weights.std()) / math.sqrt(2000)
        assert means[0] == pytest.approx(means[1], abs=5.0 * error)
        assert -means[0] == pytest.approx(float(weights.mean()), abs=5.0 * error)

    @pytest.mark.parametrize(
        "other",
        [AutoNormal, functools.partial(AutoFlowMixture, flow="planar", num_components=2, num_layers=1)],
    )
    def test_in_a_list(self, other):
        """Beside another guide, enumerated or not: the gradient is that of all components together."""
        model, args = zoo.make_zoo()["hierarchy"]
        guide = AutoGuideList(model)
        guide.append(AutoFlowMixture(poutine.block(model, hide=["theta"]), 2, "planar", 1))
        guide.append(other(poutine.block(model, expose=["theta"])))
        guide(*args)
        logits = guide[0]._flow.logits
        found = []
        for kind, rounds in ((TraceEnum_ELBO, 5), (Trace_ELBO, 25)):
            loss = kind(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
            gradients = []
            for _ in range(rounds):
                guide.zero_grad()
                loss.loss_and_grads(model, guide, *args)
                gradients.append(float(logits.grad[0]))
            gradients = torch.tensor(gradients)
            found.append((gradients.mean(), gradients.std() / math.sqrt(rounds)))
        (exact, error), (drawn, more) = found
        assert (exact - drawn).abs() < 5.0 * (error + more)

    @pytest.mark.parametrize(
        "loss",
        [
            TraceEnum_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
            TraceEnumSTL_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
            Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
            RenyiELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
            RenyiELBO(num_particles=2, max_plate_nesting=1),
        ],
        ids=["enum", "path", "trace", "renyi", "renyi-loop"],
    )
    def test_compiled_steps_equal_eager_ones(self, loss):
        losses, states = [], []
        for compiled in (False, True):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            guide = AutoFlowMixture(square_root, 3, **SMALL).materialize(Y)
            optim = Adam({"lr": 0.01})
            if compiled:
                svi = CompiledSVI(square_root, guide, optim, loss, compile=True)
                svi._stepper.resume("interpreted")  # what is traced, without the compiler
            else:
                svi = SVI(square_root, guide, optim, loss)
            pyro.set_rng_seed(1)
            losses.append([svi.step(Y) for _ in range(8)])
            states.append(copy.deepcopy(guide.state_dict()))
            assert not compiled or svi.compiled
            del guide, svi
        assert losses[0] == pytest.approx(losses[1], abs=1e-8)
        for name, value in states[0].items():
            torch.testing.assert_close(value, states[1][name], rtol=0.0, atol=1e-8)
