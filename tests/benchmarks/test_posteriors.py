"""The models of the posteriordb benchmark: against plain formulas, and by Stein's identities."""

import math
import os

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from pyro import poutine

from benchmarks.common import posteriors
from pyro_flowvi._program.log_density import UnconstrainedModel

FOLDER = os.environ.get("PYRO_FLOWVI_POSTERIORDB")
NAMES = list(posteriors.RECIPES)
EACH = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _float64():
    """As the benchmark has it, whatever the default type is."""
    torch.set_default_dtype(torch.float64)


def simulated(name):
    """A posterior with made-up data in the layout of posteriordb, without reference draws."""
    rng = np.random.default_rng(0)
    data = {
        "eight_schools": {"y": rng.normal(5.0, 9.0, 8), "sigma": rng.uniform(9.0, 18.0, 8)},
        "garch": {"y": rng.normal(5.0, 2.0, 37), "sigma1": 0.5},
        "arK": {"y": rng.normal(0.0, 0.5, 40), "K": 5},
        "low_dim_gauss_mix": {"y": rng.choice([-3.0, 3.0], 50) + rng.normal(size=50)},
        "gp_pois_regr": {"x": np.linspace(-10.0, 10.0, 11), "k": rng.poisson(9.0, 11)},
        "kidiq": {
            "kid_score": rng.normal(87.0, 20.0, 30),
            "mom_hs": rng.integers(0, 2, 30),
            "mom_iq": rng.normal(100.0, 15.0, 30),
        },
        "sblri": {"X": rng.normal(0.0, 97.0, (20, 5)), "y": rng.normal(0.0, 200.0, 20)},
    }[name.split("-")[0]]
    recipe = posteriors.RECIPES[name]
    tensors = {key: torch.as_tensor(value, dtype=torch.get_default_dtype()) for key, value in data.items()}
    return posteriors.Posterior(name, recipe, recipe.arguments(tensors), {})


def points(posterior, num=4):
    dim = UnconstrainedModel(posterior.model, posterior.args).dim
    return torch.from_numpy(np.random.default_rng(1).uniform(-1.0, 1.0, (num, dim)))


def expected_log_joint(name, sites, *args):
    """Log prior and log likelihood of one draw in NumPy and SciPy, written from the Stan programs."""
    stats = scipy.stats
    s = {key: value.numpy() for key, value in sites.items()}
    first, *rest = (arg.numpy() for arg in args)
    if name.startswith("eight_schools"):
        prior = stats.norm.logpdf(s["mu"], 0, 5) + stats.halfcauchy.logpdf(s["tau"], scale=5)
        if name.endswith("noncentered"):
            theta = s["mu"] + s["tau"] * s["theta_trans"]
            prior += stats.norm.logpdf(s["theta_trans"]).sum()
        else:
            theta = s["theta"]
            prior += stats.norm.logpdf(theta, s["mu"], s["tau"]).sum()
        return prior + stats.norm.logpdf(first, theta, rest[0]).sum()
    if name == "garch-garch11":
        alpha1, beta1, _ = s["parts"]
        h = [float(rest[0])]
        for before in first[:-1]:
            h.append(math.sqrt(s["alpha0"] + alpha1 * (before - s["mu"]) ** 2 + beta1 * h[-1] ** 2))
        return stats.norm.logpdf(first, s["mu"], h).sum() + math.log(2.0)  # the triangle has area 1/2
    if name == "arK-arK":
        # The series again: what comes before the first target, and the targets.
        series = np.concatenate([first[0][::-1], rest[0]])
        total = stats.norm.logpdf(np.append(s["beta"], s["alpha"]), 0, 10).sum()
        total += stats.halfcauchy.logpdf(s["sigma"], scale=2.5)
        for t in range(5, len(series)):
            mean = s["alpha"] + sum(s["beta"][k - 1] * series[t - k] for k in range(1, 6))
            total += stats.norm.logpdf(series[t], mean, s["sigma"])
        return total
    if name.startswith("low_dim"):
        density = s["theta"] * stats.norm.pdf(first, s["mu"][0], s["sigma"][0])
        density = density + (1 - s["theta"]) * stats.norm.pdf(first, s["mu"][1], s["sigma"][1])
        prior = stats.norm.logpdf(s["mu"], 0, 2).sum() + stats.halfnorm.logpdf(s["sigma"], scale=2).sum()
        return np.log(density).sum() + prior + stats.beta.logpdf(s["theta"], 5, 5)
    if name.startswith("gp"):
        kernel = s["alpha"] ** 2 * np.exp(-0.5 * (first[:, None] - first) ** 2 / s["rho"] ** 2)
        f = np.linalg.cholesky(kernel + 1e-10 * np.eye(11)) @ s["f_tilde"]
        prior = stats.gamma.logpdf(s["rho"], 25, scale=1 / 4) + stats.halfnorm.logpdf(s["alpha"], scale=2)
        prior += stats.norm.logpdf(s["f_tilde"]).sum()
        return prior + stats.poisson.logpmf(rest[0], np.exp(f)).sum()
    likelihood = stats.norm.logpdf(rest[0], first @ s["beta"], s["sigma"]).sum()
    if name.startswith("kidiq"):
        return likelihood + stats.halfcauchy.logpdf(s["sigma"], scale=2.5)
    prior = stats.norm.logpdf(s["beta"], 0, 10).sum() + stats.halfnorm.logpdf(s["sigma"], scale=10)
    return likelihood + prior


@EACH
def test_log_density_against_scipy(name):
    posterior = simulated(name)
    z = points(posterior)
    sites, log_det = posterior.unpack(z)
    found = posterior.log_density(z) - log_det
    for i, value in enumerate(found):
        one = {key: site[i] for key, site in sites.items()}
        assert value.item() == pytest.approx(expected_log_joint(name, one, *posterior.args), rel=1e-9)


@EACH
def test_particles_at_once_and_one_by_one(name):
    posterior = simulated(name)
    z, density = points(posterior), UnconstrainedModel(posterior.model, posterior.args)
    together = posterior.log_density(z)
    one_by_one = torch.stack([density.log_density(row) for row in z])
    assert torch.allclose(together, one_by_one.detach(), rtol=1e-12)


@EACH
def test_any_dimension_for_the_particles(name):
    """A plate further to the left, which Pyro's estimators use where a model has plates of its own."""
    posterior = simulated(name)
    z = points(posterior)
    sites, log_det = posterior.unpack(z)
    apart = {key: site.unsqueeze(1) for key, site in sites.items()}
    with pyro.plate("particles", len(z), dim=-2):
        trace = poutine.trace(poutine.condition(posterior.model, data=apart)).get_trace(*posterior.args)
    trace.compute_log_prob()
    terms = [site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample"]
    total = torch.stack([term.expand(len(z), 1) for term in terms]).sum(0).squeeze(-1)
    assert torch.allclose(total + log_det, posterior.log_density(z), rtol=1e-12)


@EACH
def test_maps_between_sites_parameters_and_vectors(name):
    posterior = simulated(name)
    z = points(posterior)
    sites, log_det = posterior.unpack(z)
    assert torch.allclose(posterior.pack(sites), z)
    grouped = posterior.recipe.to_parameters(sites, *posterior.args)
    back = posterior.recipe.to_sites(grouped, *posterior.args)
    for key, value in sites.items():
        assert torch.allclose(back[key], value, atol=1e-6)  # the kernel of the GP is nearly singular
    jacobian = torch.autograd.functional.jacobian(lambda x: torch.cat(free(posterior, x)), z[0])
    assert torch.linalg.slogdet(jacobian).logabsdet.item() == pytest.approx(log_det[0].item(), rel=1e-9)


def free(posterior, x):
    """The sites at x as one vector of as many independent numbers: of a simplex, all parts but the last."""
    sites, _ = posterior.unpack(x[None])
    return [(v[..., :-1] if k == "parts" else v).reshape(-1) for k, v in sites.items()]


def test_garch_parts_are_uniform_on_the_triangle():
    recipe = posteriors.RECIPES["garch-garch11"]
    drawn = torch.distributions.Dirichlet(torch.ones(3)).sample((20_000,))
    zeros = torch.zeros(20_000)
    values = recipe.to_parameters({"mu": zeros, "alpha0": zeros, "parts": drawn})
    corner = (values["alpha1"] < 0.5) & (values["beta1"] < 0.5)
    assert corner.float().mean().item() == pytest.approx(0.5, abs=0.02)  # area 1/4 of 1/2


@pytest.mark.parametrize("length", [1, 2, 3, 8, 37])
def test_decaying_sum(length):
    x, decay = torch.randn(3, length), torch.tensor([0.0, 0.4, 0.97]).requires_grad_()
    found, expected = posteriors.decaying_sum(x, decay), [x[:, 0]]
    for t in range(1, length):
        expected.append(x[:, t] + decay * expected[-1])
    expected = torch.stack(expected, -1)
    assert torch.allclose(found, expected)
    if length > 1:
        weights = torch.randn(3, length)
        gradients = [torch.autograd.grad((s * weights).sum(), decay)[0] for s in (found, expected)]
        assert torch.allclose(*gradients)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_failing_cholesky_is_nan_for_its_particle_alone():
    posterior = simulated("gp_pois_regr-gp_pois_regr")
    z = points(posterior)
    sites, _ = posterior.unpack(z)
    good = posterior.log_density(z)
    sites["alpha"][1], sites["rho"][1] = 1e6, 1e3
    bad = posterior.pack(sites).requires_grad_()
    density = posterior.log_density(bad)
    assert density.isnan().tolist() == [False, True, False, False]
    keep = torch.tensor([0, 2, 3])
    assert torch.allclose(density[keep], good[keep])
    (gradient,) = torch.autograd.grad(density[keep].sum(), bad)
    assert gradient[keep].isfinite().all()


def test_ordered_means_start_in_order():
    posterior = simulated("low_dim_gauss_mix-low_dim_gauss_mix")
    mu = posterior.unpack(points(posterior))[0]["mu"]
    assert (mu[:, 1] > mu[:, 0]).all()


@EACH
def test_numpyro_has_the_same_density(name):
    pytest.importorskip("numpyro")
    import jax.numpy as jnp
    from numpyro.infer.util import log_density

    from benchmarks.common import posteriors_numpyro as peers

    posterior = simulated(name)
    sites, log_det = posterior.unpack(z := points(posterior, 2))
    expected = posterior.log_density(z) - log_det
    for i in range(2):
        params = {key: jnp.asarray(value[i].numpy()) for key, value in sites.items()}
        found, _ = log_density(peers.MODELS[name], peers.arrays(posterior.args), {}, params)
        assert float(found) == pytest.approx(expected[i].item(), rel=1e-9)


# -- with reference draws ------------------------------------------------------------------------

needs_data = pytest.mark.skipif(FOLDER is None, reason="PYRO_FLOWVI_POSTERIORDB names no posteriordb")


@needs_data
@EACH
def test_stein_identities(name):
    """Within 5 standard errors, of up to 182 per posterior."""
    posterior = posteriors.load(FOLDER, [name])[name]
    gradients, products = posteriors.stein(posterior)
    assert np.abs(gradients).max() < 5.0
    assert np.abs(products).max() < 5.0


@needs_data
def test_stein_identities_fail_for_another_model():
    """The check has power: with the measurement errors 10 % larger it does not pass."""
    name = "eight_schools-eight_schools_noncentered"
    right = posteriors.load(FOLDER, [name])[name]
    y, sigma = right.args
    wrong = posteriors.Posterior(name, right.recipe, (y, 1.1 * sigma), right.reference)
    gradients, products = posteriors.stein(wrong)
    assert max(np.abs(gradients).max(), np.abs(products).max()) > 5.0


@needs_data
@EACH
def test_reference_draws_survive_the_maps(name):
    posterior = posteriors.load(FOLDER, [name])[name]
    sites = posterior.reference_sites()
    found = posterior.parameters(sites)
    assert found.keys() == posterior.reference.keys()
    for key, draws in posterior.reference.items():
        np.testing.assert_allclose(found[key], draws, rtol=1e-6, atol=1e-9)
    bijected = posterior.unpack(posterior.pack(sites))[0]
    for key, value in sites.items():
        assert torch.allclose(bijected[key], value)
