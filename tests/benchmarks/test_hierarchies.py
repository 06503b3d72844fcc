"""The hierarchical models of the benchmarks: their exact posteriors, and their forms in Pyro and NumPyro."""

from functools import partial

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

from benchmarks.common import hierarchies


@pytest.fixture(autouse=True)
def _float64():
    """As the benchmark has it, whatever the default type is."""
    torch.set_default_dtype(torch.float64)


def made_up_radon(intercepts=hierarchies.broadcasting, num_houses=600):
    rng = np.random.default_rng(0)
    county = torch.from_numpy(rng.integers(0, hierarchies.NUM_COUNTIES, num_houses))
    effects = 1.0 + 0.5 * rng.normal(size=hierarchies.NUM_COUNTIES)
    floor = torch.from_numpy(rng.integers(0, 2, num_houses).astype(float))
    noise = torch.from_numpy(0.7 * rng.normal(size=num_houses))
    y = torch.from_numpy(effects)[county] - 0.6 * floor + noise
    return hierarchies.radon_of(intercepts, county, floor, y)


@pytest.fixture(params=[made_up_radon, hierarchies.made_up_walk], ids=["radon", "walk"])
def hierarchy(request):
    return request.param()


def sites(hierarchy, log_scales, effects):
    """One draw as values of the model's sites."""
    values = dict(zip(("tau", "sigma"), log_scales.exp(), strict=True))
    values |= dict(zip(hierarchy.names, effects, strict=True))
    a = [values.pop(name) for name in hierarchy.names if name.startswith("a[")]
    return values | ({"a": torch.stack(a)} if a else {})


def log_joint(hierarchy, values):
    model = partial(hierarchy.model, pyro, pyro.distributions)
    trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*hierarchy.args)
    return trace.log_prob_sum()


def test_exact_posterior_against_the_model(hierarchy):
    """log p(sites, y) = log p(scales, y) + log p(effects | scales, y), but for one constant."""
    torch.manual_seed(0)
    gaps = []
    for log_scales in (torch.tensor([0.3, 0.9]).log(), torch.tensor([1.4, 0.5]).log()):
        marginal, mean, factor = hierarchy.given(log_scales)
        posterior = torch.distributions.MultivariateNormal(mean, precision_matrix=factor @ factor.T)
        for effects in (mean, posterior.sample()):
            joint = log_joint(hierarchy, sites(hierarchy, log_scales, effects))
            # The marginal is of the logarithms of the scales.
            gaps.append(joint + log_scales.sum() - marginal - posterior.log_prob(effects))
    assert torch.stack(gaps).std() < 1e-8


@pytest.mark.long
def test_draws_have_the_moments_of_the_grid(hierarchy):
    points, weights = hierarchy.grid()
    points, weights = points[weights > 1e-9], weights[weights > 1e-9]
    _, means, factors = hierarchy.given(points)
    mean = weights @ means
    variance = weights @ (torch.cholesky_inverse(factors).diagonal(dim1=-2, dim2=-1) + means.square())
    sd = (variance - mean.square()).sqrt()
    draws = hierarchy.exact(40_000)
    found = torch.from_numpy(np.stack([draws[name] for name in hierarchy.names], -1))
    assert ((found.mean(0) - mean) / sd).abs().max() < 0.025  # five standard errors
    assert (found.std(0) / sd).log().abs().max() < 0.02


@pytest.mark.long
def test_a_finer_and_wider_grid_gives_the_same(hierarchy, monkeypatch):
    def moments():
        points, weights = hierarchy.grid()
        mean = weights @ points
        return mean, (weights @ (points - mean).square()).sqrt()

    mean, sd = moments()
    monkeypatch.setattr(hierarchies, "SPACING", 0.2)
    monkeypatch.setattr(hierarchies, "WIDTH", 10.0)
    finer_mean, finer_sd = moments()
    assert ((mean - finer_mean) / sd).abs().max() < 5e-3
    assert (sd / finer_sd).log().abs().max() < 5e-3


def test_both_forms_of_radon_have_one_density():
    values = [made_up_radon(form) for form in (hierarchies.plain, hierarchies.broadcasting)]
    effects = torch.randn(len(values[0].names))
    plain, broadcasting = (log_joint(h, sites(h, torch.tensor([0.1, -0.2]), effects)) for h in values)
    assert plain == broadcasting


def test_only_the_broadcasting_form_takes_particles():
    for form, fails in ((hierarchies.plain, True), (hierarchies.broadcasting, False)):
        hierarchy = made_up_radon(form)

        def run(hierarchy=hierarchy):
            with pyro.plate("particles", 3, dim=-2):
                model = partial(hierarchy.model, pyro, pyro.distributions)
                return poutine.trace(model).get_trace(*hierarchy.args).compute_log_prob()

        if fails:
            with pytest.raises((ValueError, IndexError, RuntimeError)):
                run()
        else:
            run()


def test_numpyro_has_the_same_density(hierarchy):
    numpyro = pytest.importorskip("numpyro")
    import jax.numpy as jnp
    from numpyro.infer.util import log_density

    from benchmarks.common.posteriors_numpyro import arrays

    values = sites(hierarchy, torch.tensor([0.1, -0.2]), torch.randn(len(hierarchy.names)))
    params = {name: jnp.asarray(value.numpy()) for name, value in values.items()}
    model = partial(hierarchy.model, numpyro, numpyro.distributions)
    found, _ = log_density(model, arrays(hierarchy.args), {}, params)
    assert float(found) == pytest.approx(log_joint(hierarchy, values).item(), rel=1e-9)
