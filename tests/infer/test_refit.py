"""fit(init=): a fit that starts from a guide that was fitted before."""

import pickle
from functools import cache, partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.distributions import HalfNormal, Normal

from pyro_flowvi import AutoCIF, AutoFlowMixture, AutoPlanar, AutoRealNVP, fit

NUM_DRAWS = 20_000


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def own(*data):
    """In the dtype of the run."""
    return tuple(values.to(torch.get_default_dtype()) for values in data)


def check(guide, truth):
    """Every mean within a tenth of a standard deviation, and these within a tenth."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = guide.sample_posterior(NUM_DRAWS)
    for site, (mean, sd) in truth.items():
        values = drawn[site].log() if site == "tau" else drawn[site]
        assert ((values.mean(0) - mean) / sd).abs().max() < 0.1, site
        assert ((values.std(0) / sd).log()).abs().max() < 0.1, site


# -- a regression: the posterior is normal ---------------------------------------------------------

X = draw(105, 4, seed=0)
Y = X @ torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64) + draw(105, seed=1)


def regression(width):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), width).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(w @ x.T, 1.0), obs=y)

    return model


def regression_truth(width, x, y):
    covariance = torch.linalg.inv(x.T @ x + torch.eye(x.shape[-1], dtype=x.dtype) / width**2)
    return {"w": own(covariance @ x.T @ y, covariance.diagonal().sqrt())}


@cache
def fitted_regression():
    model = regression(2.0)
    guide = AutoRealNVP(model)
    fit(model, guide, *own(X[:100], Y[:100]), seed=0, progress=False)
    return guide


@pytest.fixture
def fitted():
    return fitted_regression()


def refit(init, width, x, y, kind=AutoRealNVP, **options):
    model = regression(width)
    guide = kind(model)
    result = fit(model, guide, *own(x, y), init=init, seed=1, progress=False, **options)
    check(guide, regression_truth(width, x, y))
    return guide, result


@pytest.mark.parametrize(
    ("width", "rows"),
    [(2.0, slice(105)), (0.2, slice(100)), (2.0, slice(20, 100)), (2.0, slice(50))],
    ids=["new rows", "hyperparameter", "fold", "half"],
)
def test_a_regression(fitted, width, rows):
    _, result = refit(fitted, width, X[rows], Y[rows])
    assert result.start == "previous"
    assert result.converged
    assert len(result.losses) == 0
    assert result.stop_reason == "converged"
    assert "converged: 0 steps" in repr(result)
    assert "earlier guide" in repr(result)
    assert result.best_state.keys()


def test_a_place_that_is_far_off_is_left(fitted):
    refit(fitted, 2.0, X[:100], 20.0 + 10.0 * Y[:100])


def test_new_columns_and_fewer(fitted):
    x = torch.cat([X, draw(105, 2, seed=2)], -1)
    refit(fitted, 2.0, x, Y)
    refit(fitted, 2.0, X[:, :3], Y)


def test_what_fit_returned(fitted):
    model = regression(2.0)
    result = fit(model, AutoRealNVP(model), *own(X[:100], Y[:100]), num_steps=50, seed=0, progress=False)
    assert refit(result, 1.0, X, Y)[1].start == "previous"


def test_a_guide_without_its_model(fitted):
    previous = pickle.loads(pickle.dumps(fitted))
    assert previous._raw_model[0] is None
    assert refit(previous, 1.0, X, Y)[1].start == "previous"


def test_the_guide_itself(fitted):
    model = regression(2.0)
    guide = AutoRealNVP(model)
    fit(model, guide, *own(X[:100], Y[:100]), init=fitted, seed=0, progress=False)
    result = fit(model, guide, *own(X, Y), init=guide, seed=0, progress=False)
    assert (result.start, len(result.losses)) == ("previous", 0)
    check(guide, regression_truth(2.0, X, Y))


def test_the_earlier_guide_stays_as_it_is(fitted):
    before = {name: param.clone() for name, param in fitted.named_parameters()}
    refit(fitted, 0.5, X, Y)
    assert all(torch.equal(before[name], param) for name, param in fitted.named_parameters())


@pytest.mark.parametrize(
    "kind",
    [
        partial(AutoPlanar, num_layers=2),
        partial(AutoRealNVP, num_layers=2),
        partial(AutoRealNVP, affine="elementwise"),
        partial(AutoRealNVP, affine="low_rank"),
        partial(AutoRealNVP, tails=True),
    ],
    ids=["planar", "layers", "elementwise", "low rank", "tails"],
)
def test_other_flows_take_moments(fitted, kind):
    refit(fitted, 1.0, X, Y, kind=kind)


@pytest.mark.parametrize(
    "kind",
    [lambda m: AutoFlowMixture(m, 2, "planar", 2), lambda m: AutoCIF(m, "planar", 2, index_hidden=(4,))],
    ids=["mixture", "indexed"],
)
def test_from_guides_that_are_no_bijections(kind):
    model = regression(2.0)
    previous = kind(model)
    fit(model, previous, *own(X[:100], Y[:100]), num_steps=20, seed=0, progress=False)
    assert refit(previous, 1.0, X, Y)[1].start == "previous"
    # A guide of its own kind has its parameters.
    again = kind(model).materialize(*own(X, Y))
    again.take_over(previous, again.density(*own(X, Y)), all_data=False)
    for one, other in zip(again.parameters(), previous.parameters(), strict=True):
        assert torch.equal(one, other)


def unfitted():
    return AutoRealNVP(regression(2.0))


@pytest.mark.parametrize(
    ("kind", "init", "expected"),
    [
        (AutoRealNVP, unfitted, "has not seen data"),
        (AutoRealNVP, lambda: AutoNormal(regression(2.0)), "a fitted guide of this package"),
        (AutoRealNVP, lambda: "guide", "a fitted guide of this package"),
        (AutoNormal, None, "no flow"),
        (partial(AutoRealNVP, affine=None), None, "without an affine map"),
        (lambda m: AutoFlowMixture(m, 2, "planar", 2), None, "components"),
    ],
    ids=["unfitted", "of Pyro", "no guide", "to Pyro's", "no affine map", "mixture"],
)
def test_what_cannot_be_taken_over(fitted, kind, init, expected):
    model = regression(2.0)
    with pytest.raises(ValueError, match=f"^init: expected .*{expected}"):
        fit(model, kind(model), *own(X, Y), init=fitted if init is None else init(), progress=False)


def test_other_latents_altogether(fitted):
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"^init: expected .*'z'.*'w'"):
        fit(model, AutoRealNVP(model), init=fitted, progress=False)


def test_goes_on_from_a_checkpoint(fitted, tmp_path):
    first, _ = refit(fitted, 1.0, X, Y, checkpoint=tmp_path / "run")
    second, result = refit(fitted, 1.0, X, Y, checkpoint=tmp_path / "run")
    assert (result.stop_reason, result.start) == ("converged", "previous")
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_part_of_the_data_does_not_move_it(fitted):
    model = regression(2.0)
    guide = AutoRealNVP(model)
    batches = [own(X[:10], Y[:10] + 5.0)]
    fit(model, guide, batches=batches, num_steps=1, lr=1e-6, init=fitted, seed=0, progress=False)
    check(guide, regression_truth(2.0, X[:100], Y[:100]))


# -- a hierarchy: the posterior of its roots is an integral in one dimension ----------------------

NOISE = 0.5 + draw(63, seed=3).abs()
GROUPS = 1.0 + 0.7 * draw(63, seed=4) + NOISE * draw(63, seed=5)


def hierarchy(width):
    def model(y, noise):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(width))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, noise), obs=y)

    return model


def hierarchy_truth(width, y, noise):
    """By quadrature over log tau, given which mu and theta are normal."""
    u = torch.linspace(-6.0, 3.0, 4001, dtype=torch.float64)
    tau = u.exp().unsqueeze(-1)
    variance = tau**2 + noise**2
    precision = 1.0 / 25.0 + (1.0 / variance).sum(-1)
    mu = (y / variance).sum(-1) / precision
    log_p = Normal(0.0, variance.sqrt()).log_prob(y - mu.unsqueeze(-1)).sum(-1)
    log_p = log_p + Normal(0.0, 5.0).log_prob(mu) - 0.5 * precision.log()
    weights = (log_p + HalfNormal(width).log_prob(u.exp()) + u).softmax(0)

    def moments(mean, variance):
        centre = weights @ mean
        spread = weights @ (variance + (mean - centre) ** 2)
        return own(centre, spread.sqrt())

    pull = tau**2 / variance
    theta = mu.unsqueeze(-1) + pull * (y - mu.unsqueeze(-1))
    spread = pull * noise**2 + (1.0 - pull) ** 2 / precision.unsqueeze(-1)
    return {
        "mu": moments(mu, 1.0 / precision),
        "tau": moments(u, torch.zeros_like(u)),
        "theta": moments(theta, spread),
    }


@cache
def fitted_hierarchy():
    model = hierarchy(2.0)
    guide = AutoRealNVP(model)
    fit(model, guide, *own(GROUPS[:60], NOISE[:60]), seed=0, progress=False)
    return guide


@pytest.fixture
def grouped():
    return fitted_hierarchy()


@pytest.mark.parametrize(
    ("width", "rows"),
    [(2.0, slice(63)), (0.7, slice(60)), (2.0, slice(12, 60)), (2.0, slice(30, 60))],
    ids=["new rows", "hyperparameter", "fold", "half"],
)
def test_a_hierarchy(grouped, width, rows):
    model, data = hierarchy(width), (GROUPS[rows], NOISE[rows])
    guide = AutoRealNVP(model)
    result = fit(model, guide, *own(*data), init=grouped, seed=1, progress=False)
    assert result.start == "previous"
    assert len(result.losses) <= 225
    assert guide.structure.taken
    check(guide, hierarchy_truth(width, *data))


@pytest.mark.long
def test_a_hierarchy_that_is_far_off(grouped):
    model, data = hierarchy(2.0), (3.0 * GROUPS[:60] + 10.0, NOISE[:60])
    guide = AutoRealNVP(model)
    fit(model, guide, *own(*data), init=grouped, seed=1, progress=False)
    check(guide, hierarchy_truth(2.0, *data))


def test_a_flat_guide_follows_one_that_went_flat(grouped):
    model, data = hierarchy(2.0), own(GROUPS[:60], NOISE[:60])
    previous = AutoRealNVP(model).materialize(*data)
    previous._take_flat("the flat guide had the better ELBO")
    guide = AutoRealNVP(model).materialize(*data)
    guide.take_over(previous, guide.density(*data), all_data=False)
    assert not guide.structure.taken
    # But not one that had to be flat.
    guide = AutoRealNVP(model).materialize(*data)
    previous = AutoRealNVP(model, structure=None).materialize(*data)
    guide.take_over(previous, guide.density(*data), all_data=False)
    assert guide.structure.taken


@pytest.mark.long
def test_counts_whose_latents_are_skewed():
    """Flows of the latents' noise, and what was learned of messages, are taken over as well."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Poisson(theta.exp()), obs=y)

    rates = (1.0 + 0.7 * draw(315, seed=6)).exp()
    (y,) = own(torch.poisson(rates, generator=torch.Generator().manual_seed(7)))
    previous, guide, fresh = AutoRealNVP(model), AutoRealNVP(model), AutoRealNVP(model)
    fit(model, previous, y[:300], seed=0, progress=False)
    result = fit(model, guide, y, init=previous, seed=1, progress=False)
    expected = fit(model, fresh, y, seed=2, progress=False)
    assert len(result.losses) <= 225
    assert result.best_loss == pytest.approx(expected.best_loss, abs=0.2)
    drawn = fresh.sample_posterior(NUM_DRAWS)
    values = {"mu": drawn["mu"], "tau": drawn["tau"].log()}
    check(guide, {site: (value.mean(0), value.std(0)) for site, value in values.items()})


@pytest.mark.long
def test_varying_slopes():
    def model(x, y, width):
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        t = pyro.sample("t", dist.HalfNormal(width * torch.ones(2)).to_event(1))
        factor = pyro.sample("C", dist.LKJCholesky(2, 2.0))
        with pyro.plate("groups", len(y)):
            ab = pyro.sample("ab", dist.MultivariateNormal(m, scale_tril=t[..., :, None] * factor))
            pyro.sample("y", dist.Normal(ab[..., :1] + ab[..., 1:] * x, 1.0).to_event(1), obs=y)

    x = draw(84, 6, seed=8)
    y = 1.0 + draw(84, 1, seed=9) + (0.5 * draw(84, 1, seed=10) - 0.5) * x + draw(84, 6, seed=11)
    x, y = own(x, y)
    previous = AutoRealNVP(model)
    fit(model, previous, x[:80], y[:80], 2.0, seed=0, progress=False)
    for data in ((x, y, 2.0), (x[:80], y[:80], 0.5), (x[:64], y[:64], 2.0)):
        guide, fresh = AutoRealNVP(model), AutoRealNVP(model)
        result = fit(model, guide, *data, init=previous, seed=1, progress=False)
        expected = fit(model, fresh, *data, seed=2, progress=False)
        assert result.start == "previous"
        assert result.best_loss == pytest.approx(expected.best_loss, abs=0.05)
        drawn = fresh.sample_posterior(NUM_DRAWS)
        check(guide, {site: (drawn[site].mean(0), drawn[site].std(0)) for site in ("m", "t")})
