"""What Pyro's validation refuses in stock SVI is refused here in the same words, and nothing else."""

import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoGuideList, AutoNormal

from pyro_flowvi import AutoCIF, AutoFlowMixture, AutoPlanar, compare, diagnose, fit, to_arviz
from pyro_flowvi._program.log_weights import LogWeights


def data():
    x = torch.linspace(-1.0, 2.0, 12).reshape(6, 2).cos()
    return x, x.sum(-1)


def coefficients(event=True):
    return pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(int(event)))


def sound(x, y):
    b = coefficients()
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


def no_plate(x, y):
    pyro.sample("y", dist.Normal(x @ coefficients(), 1.0), obs=y)


def no_event(x, y):
    b = coefficients(event=False)
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


def column_of_means(x, y):
    b = coefficients()
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x @ b).unsqueeze(-1), 1.0), obs=y)


def factor_of_rows(x, y):
    pyro.factor("f", -((y - x @ coefficients()) ** 2))


UNSOUND = [no_plate, no_event, column_of_means, factor_of_rows]


def stock_error(model):
    with pytest.raises(ValueError, match="invalid log_prob shape") as told:
        SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(*data())
    pyro.clear_param_store()
    return str(told.value)


@pytest.mark.parametrize("model", UNSOUND, ids=lambda f: f.__name__)
@pytest.mark.parametrize("guide", [AutoPlanar, AutoNormal, AutoCIF], ids=lambda c: c.__name__)
def test_a_shape_that_stock_svi_refuses(model, guide):
    expected = stock_error(model)
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        fit(model, guide(model), *data(), num_steps=2, progress=False)
    for judge in (diagnose, to_arviz, lambda m, g, *args: compare(m, [g], *args)):
        with pytest.raises(ValueError, match="invalid log_prob shape"):
            judge(model, guide(model), *data())


def test_nothing_is_checked_where_validation_is_off():
    with pyro.validation_enabled(False):
        fit(no_plate, AutoPlanar(no_plate), *data(), num_steps=2, progress=False)


def test_the_objective_s_own_nesting_counts():
    shallow = Trace_ELBO(max_plate_nesting=0)
    with pytest.raises(ValueError, match="plate stack overflow"):
        fit(sound, AutoPlanar(sound), *data(), loss=shallow, num_steps=2, progress=False)
    fit(no_plate, AutoPlanar(no_plate), *data(), loss=shallow, num_steps=2, progress=False)  # as stock SVI


def masked(x, y):
    b = coefficients()
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y, obs_mask=y > 0)


def subsampled(x, y):
    b = coefficients()
    with pyro.plate("rows", len(x), subsample_size=3) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ b, 1.0), obs=y[rows])


def with_factor_and_computed(x, y):
    b = coefficients()
    pyro.deterministic("residuals", y - x @ b)
    pyro.factor("f", -(b**2).sum())
    with poutine.mask(mask=y > 0), pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


@config_enumerate
def chain(x, y):
    turn = pyro.sample("turn", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    state = torch.zeros(len(x)).long()
    rows = pyro.plate("rows", len(x))
    for t in pyro.markov(range(2)):
        with rows:
            state = pyro.sample(f"state_{t}", dist.Categorical(turn[state]))
            pyro.sample(f"y_{t}", dist.Normal(mu[state], 1.0), obs=x[:, t])


def looped(x, y):
    b = coefficients()
    for i in pyro.plate("rows", len(x)):
        pyro.sample(f"y_{i}", dist.Normal(x[i] @ b, 1.0), obs=y[i])


SOUND = [sound, masked, subsampled, with_factor_and_computed, chain, looped]
GUIDES = {"planar": AutoPlanar, "cif": AutoCIF, "mixture": lambda model: AutoFlowMixture(model, 2)}


@pytest.mark.parametrize("guide", [pytest.param(v, id=k) for k, v in GUIDES.items()])
@pytest.mark.parametrize("model", SOUND, ids=lambda f: f.__name__)
def test_what_stock_objectives_accept_passes_without_a_word(model, guide):
    LogWeights(model, guide(model).materialize(*data()), data())  # as fit and the diagnostics begin


def test_a_list_of_guides_and_vectorised_particles():
    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    guide = AutoGuideList(model)
    guide.append(AutoPlanar(poutine.block(model, hide=["scale"])))
    guide.append(AutoNormal(poutine.block(model, expose=["scale"])))
    for loss in (
        Trace_ELBO(4, 1, vectorize_particles=True),
        TraceEnum_ELBO(strict_enumeration_warning=False),
    ):
        fit(model, guide, data()[1], loss=loss, num_steps=2, progress=False)


def test_a_site_that_the_guide_lacks_is_told_as_pyro_tells_it():
    def guide(x, y):
        pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def model(x, y):
        pyro.sample("lost", dist.Normal(0.0, 1.0))
        sound(x, y)

    with pytest.warns(UserWarning, match="Found vars in model but not guide: {'lost'}"):
        diagnose(model, guide, *data(), num_samples=100, probes=False)


def test_a_draw_that_the_model_refuses_is_no_fault_of_the_shapes():
    def model(y):
        width = pyro.sample("width", dist.LogNormal(0.0, 0.1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Uniform(0.0, width), obs=y)

    def guide(y):
        pyro.sample("width", dist.LogNormal(0.0, 0.1))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diagnose(model, guide, torch.tensor([0.5, 5.0]), num_samples=100)
    assert found.verdict == "poor"
