"""AutoCIF: bounds, objectives, unbiased evidence; the rest of the guide contract is in test_contract.py."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from scipy.stats import multivariate_normal, norm

from pyro_flowvi import AutoCIF, diagnose, fit
from pyro_flowvi._program.log_weights import LogWeights
from pyro_flowvi.distributions.flow import standard_normal_log_prob
from pyro_flowvi.infer import TraceAnnealed_ELBO, TraceIW_ELBO, TraceSTL_ELBO
from pyro_flowvi.init import find_gaussian
from pyro_flowvi.init.gaussians import _cover
from pyro_flowvi.init.lbfgs import Ascent
from pyro_flowvi.transforms import Planar
from tests import zoo

pytestmark = pytest.mark.filterwarnings("ignore:.*found no sample sites configured for enumeration")

Y = torch.tensor([0.5, 1.5, 1.0])


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


LOG_EVIDENCE = float(multivariate_normal.logpdf(Y, cov=np.eye(3) + np.ones((3, 3))))


def two_modes(gap):
    locs = torch.tensor([-gap / 2.0, gap / 2.0])
    weights = dist.Categorical(torch.tensor([0.3, 0.7]))
    pyro.sample("x", dist.MixtureSameFamily(weights, dist.Normal(locs, 1.0)))


def make(model, *args, scale=0.3, seed=0, init_scale=0.5, **options):
    """A guide away from its start, near the posterior of ``conjugate``."""
    torch.manual_seed(seed)
    sizes = {"num_layers": 2, "hidden": (4,), "index_hidden": (4,), "index_scale": 0.0}
    guide = AutoCIF(model, init_scale=init_scale, **sizes, **options)
    guide.materialize(*args)
    with torch.no_grad():
        for param in [param for layer in list(guide._flow)[:2] for param in layer.parameters()]:
            param.add_(scale * torch.randn_like(param))
    return guide


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("kind", [Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, TraceSTL_ELBO])
def test_the_loss_is_the_auxiliary_elbo(kind, vectorized):
    """log p(x, z) less the log ratio of the draw, written out from the guide's extended law."""
    guide = make(conjugate, Y)
    count = 3 if vectorized else 1
    elbo = kind(num_particles=count, vectorize_particles=vectorized, max_plate_nesting=1)
    torch.manual_seed(0)
    found = -elbo.loss(conjugate, guide, Y)
    torch.manual_seed(0)
    extended = guide.get_posterior().extended
    y, log_prob = extended.rsample_and_log_prob((count,))
    log_p = norm.logpdf(y[:, 0].detach()) + norm.logpdf(Y, y[:, :1].detach()).sum(-1)
    expected = torch.as_tensor(log_p) - log_prob + standard_normal_log_prob(y[:, 1:])
    assert found == pytest.approx(expected.mean().item(), abs=1e-9)


@pytest.mark.parametrize("num_extra", [0, 4])
def test_weights_are_unbiased_for_the_evidence(num_extra):
    """E[p(x, z) r(u | z) / q(z, u)] = p(x), also of the bound with more index draws."""
    guide = make(conjugate, Y, num_extra=num_extra, scale=0.15, init_scale=1.0)  # wider than the posterior
    torch.manual_seed(0)
    weights = (LogWeights(conjugate, guide, (Y,)).log_weights(40_000) - LOG_EVIDENCE).exp()
    assert weights.mean() == pytest.approx(1.0, abs=4.0 * float(weights.std()) / 200.0)
    renyi = RenyiELBO(alpha=0.0, num_particles=20_000, vectorize_particles=True)
    assert -renyi.loss(conjugate, guide, Y) == pytest.approx(LOG_EVIDENCE, abs=0.1)


def test_more_index_draws_make_a_tighter_bound():
    """The auxiliary ELBO, then its importance-weighted forms, all below the evidence."""
    elbos = {}
    for num_extra in (0, 1, 8, 64):
        guide = make(conjugate, Y, num_extra=num_extra, scale=0.5)
        torch.manual_seed(1)
        weights = LogWeights(conjugate, guide, (Y,)).log_weights(20_000)
        elbos[num_extra] = float(weights.mean()), float(weights.std()) / math.sqrt(20_000)
    for less, more in ((0, 1), (1, 8), (8, 64)):
        assert elbos[more][0] > elbos[less][0] - 2.0 * elbos[more][1]
    assert elbos[64][0] > elbos[0][0] + 4.0 * elbos[0][1]
    assert elbos[64][0] < LOG_EVIDENCE


@pytest.mark.parametrize("num_extra", [0, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "elbo", ["stl", *(pytest.param(elbo, marks=pytest.mark.long) for elbo in ("annealed", "graph", "enum"))]
)
def test_gradients_agree_in_the_mean(elbo, num_extra):
    """Every estimator has the mean of the plain one, for all parameters, those of r included."""
    options = {"num_particles": 1000, "vectorize_particles": True, "max_plate_nesting": 1}
    losses = {
        "stl": TraceSTL_ELBO(**options),
        "annealed": TraceAnnealed_ELBO(lambda step: 1.0, **options),
        "graph": TraceGraph_ELBO(**options),
        "enum": TraceEnum_ELBO(**options),
    }
    guide = make(conjugate, Y, num_extra=num_extra)
    params = list(guide.parameters())

    def gradients(loss, rounds=25):
        found = []
        for seed in range(rounds):
            torch.manual_seed(seed)
            guide.zero_grad()
            loss.loss_and_grads(conjugate, guide, Y)
            found.append(torch.cat([param.grad.flatten() for param in params]))
        found = torch.stack(found)
        return found.mean(0), found.std(0) / math.sqrt(rounds)

    mean, error = gradients(losses[elbo])
    plain, plain_error = gradients(Trace_ELBO(**options))
    z = (mean - plain) / (error.square() + plain_error.square() + 1e-16).sqrt()
    # About 48 degrees of freedom, some three hundred parameters.
    assert z.abs().max() < 5.0
    assert z.square().mean() < 2.0


@pytest.mark.long
def test_importance_weighted_objectives_agree():
    """The doubly reparameterised gradient in the extended space has the mean of the plain one."""
    guide = make(conjugate, Y)
    params = list(guide.parameters())
    means = []
    for dreg in (True, False):
        loss = TraceIW_ELBO(num_particles=8, dreg=dreg, vectorize_particles=True, max_plate_nesting=1)
        found = []
        for seed in range(150):
            torch.manual_seed(seed + 1000 * dreg)
            guide.zero_grad()
            loss.loss_and_grads(conjugate, guide, Y)
            found.append(torch.cat([param.grad.flatten() for param in params]))
        found = torch.stack(found)
        means.append((found.mean(0), found.std(0) / math.sqrt(150)))
    z = (means[0][0] - means[1][0]) / (means[0][1].square() + means[1][1].square() + 1e-16).sqrt()
    assert z.abs().max() < 5.0


def test_log_prob_is_an_estimate_from_below():
    guide = make(conjugate, Y, num_index_samples=2000)
    draws = guide.sample_posterior(50)
    assert guide.lower_bound
    with torch.no_grad():
        close = guide.log_prob(draws)
        guide.num_index_samples = 20
        rough = torch.stack([guide.log_prob(draws) for _ in range(100)])
        grid = torch.linspace(-6.0, 8.0, 201).unsqueeze(-1)
        mass = guide.get_posterior().log_prob_bound(grid, 1000).exp().sum() * 14.0 / 200
    assert rough.mean() < close.mean()
    error = rough.exp().std(0) / 10.0
    assert ((rough.exp().mean(0) - close.exp()).abs() < 5.0 * error + 0.2 * close.exp()).all()
    assert mass == pytest.approx(1.0, abs=0.03)
    assert guide.log_prob({"mu": torch.tensor(1.0)}).shape == ()


def test_draws_and_indices_are_one_auxiliary_site():
    guide = make(conjugate, Y, index_dim=3)
    trace = poutine.trace(guide).get_trace(Y)
    (name,) = [n for n, site in trace.nodes.items() if site.get("infer", {}).get("is_auxiliary")]
    assert trace.nodes[name]["value"].shape == (1 + 2 * 3,)
    assert guide.sample_latent().shape == (1,)


@pytest.mark.long
def test_two_far_modes_at_the_defaults():
    """6 sd apart, where a flow that starts at one mode stays there: quadrature is the mixture itself."""
    guide = AutoCIF(two_modes, num_layers=2, hidden=(8,))
    result = fit(two_modes, guide, 6.0, num_steps=1000, seed=0, progress=False)
    assert result.start == "modes"
    draws = guide.sample_posterior(20_000)["x"]
    assert (draws > 0).double().mean() == pytest.approx(0.7, abs=0.1)
    diagnosis = diagnose(two_modes, guide, 6.0, num_samples=1000, seed=0)
    assert diagnosis.elbo > -0.3
    assert any("extended space" in reason for reason in diagnosis.reasons)


class TestCover:
    """The normal over all modes, against the moments of a mixture."""

    @staticmethod
    def mixture(locs, scales, shares):
        law = dist.MixtureSameFamily(
            dist.Categorical(torch.as_tensor(shares)),
            dist.Normal(torch.tensor(locs), torch.tensor(scales)).to_event(1),
        )

        def value_and_grad(z):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                value = law.log_prob(z)
                (gradient,) = torch.autograd.grad(value.sum(), z)
            return value.detach(), gradient

        return law, value_and_grad

    def test_moments(self):
        law, density = self.mixture(
            [[-5.0, 0.0], [5.0, 1.0], [0.0, 6.0]], [[1.0, 0.5], [0.7, 1.0], [1.0, 1.0]], [0.5, 0.3, 0.2]
        )
        found = find_gaussian(density, torch.zeros(2), cover=True)
        assert found.kinds == ("modes",)
        torch.testing.assert_close(found.loc[0], law.mean, atol=0.02, rtol=0.0)
        variance = (found.scale[0] @ found.scale[0].mT).diagonal()
        torch.testing.assert_close(variance, law.variance, atol=0.1, rtol=0.0)

    def test_a_long_narrow_one(self):
        """Of which the covariance, squared, is more than rounding allows."""
        law, density = self.mixture([[1e4, 0.0], [-1e4, 5e-3]], [[1.0, 1e-3], [1.0, 1e-3]], [0.5, 0.5])
        found = _cover(density, Ascent(torch.tensor([[1e4, 0.0], [-1e4, 5e-3]]), torch.zeros(2), []))
        ratio = found.scale[0].diagonal().log().sum()
        assert ratio == pytest.approx(math.log(1e4) + math.log(1e-3), abs=0.01)
        assert law.batch_shape == ()

    def test_one_mode_is_left_to_the_ranking_by_elbo(self):
        _, density = self.mixture([[1.0, 2.0]], [[1.0, 0.5]], [1.0])
        found = find_gaussian(density, torch.zeros(2), cover=True)
        assert found.kinds != ("modes",)
        torch.testing.assert_close(found.loc[0], torch.tensor([1.0, 2.0]), atol=1e-3, rtol=0.0)


def test_where_the_indices_start():
    """Unused, or moving the latents by about ``index_scale``."""
    spreads = {}
    for index_scale in (0.0, 0.1):
        torch.manual_seed(0)
        guide = AutoCIF(zoo.one_dim, "planar", 1, index_scale=index_scale, affine=None).materialize()
        x = torch.cat([torch.zeros(2000, 1), torch.randn(2000, 1)], -1)  # one point, many indices
        with torch.no_grad():
            spreads[index_scale] = float(guide.get_posterior().extended.transform(x)[:, 0].std())
    assert spreads[0.0] == 0.0
    assert 0.02 < spreads[0.1] < 0.5


def test_a_callable_flow():
    guide = AutoCIF(zoo.hierarchy, flow=Planar, num_layers=3, order="before").materialize(torch.zeros(4))
    assert sum(isinstance(getattr(part, "transform", None), Planar) for part in guide._flow) == 3
    assert guide.median()["theta"].shape == (4,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flow": "glow"}, "flow: expected one of"),
        ({"flow": 3}, "flow: expected a key of FLOWS or a callable"),
        ({"flow": Planar, "hidden": (3,)}, "hidden: expected None with a callable flow"),
        ({"num_layers": 0}, "num_layers: expected a positive integer"),
        ({"index_dim": 0.5}, "index_dim: expected a positive integer"),
        ({"hidden": 3}, "hidden: expected a sequence of positive integers"),
        ({"index_hidden": (0,)}, "index_hidden: expected a positive integer"),
        ({"order": "between"}, "order: expected one of"),
        ({"num_extra": -1}, "num_extra: expected an integer of at least 0"),
        ({"index_scale": -1.0}, "index_scale: expected a positive number"),
        ({"num_index_samples": 0}, "num_index_samples: expected a positive integer"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        AutoCIF(zoo.one_dim, **options)
