"""Data that are no tensors: the error names argument, site and remedy, before anything is trained."""

import re
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_flowvi import AutoPlanar, CompiledSVI, compare, diagnose, fit, to_arviz

Y = np.linspace(0.0, 1.0, 4)
T = torch.from_numpy(Y)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def regression(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("seen", dist.Normal(b * x, 1.0), obs=y)


def nested(data):
    regression(T, data["y"] if isinstance(data, dict) else data.y)


class Module(pyro.nn.PyroModule):
    def forward(self, x, y):
        return regression(x, y)


@dataclass
class Data:
    y: object


def train(model, *args, guide=AutoPlanar, **kwargs):
    fit(model, guide(model), *args, num_steps=2, progress=False, **kwargs)
    assert not len(pyro.get_param_store())


def step(model, *args):
    CompiledSVI(model, AutoPlanar(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(*args)


CALLS = {
    "fit": train,
    "fit of Pyro's guide": lambda *call: train(*call, guide=AutoNormal),
    "diagnose": lambda model, *args: diagnose(model, AutoPlanar(model), *args),
    "compare": lambda model, *args: compare(model, [AutoPlanar(model)], *args),
    "to_arviz": lambda model, *args: to_arviz(model, AutoPlanar(model), *args),
    "materialize": lambda model, *args: AutoPlanar(model).materialize(*args),
    "CompiledSVI": step,
    "a batch of keywords": lambda model, x, y: train(model, batches=[{"x": x, "y": y}]),
    "a batch": lambda model, *args: train(model, batches=[args]),
    "validation": lambda model, *args: train(model, T, T, validation=args),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_call_names_argument_site_and_remedy(call):
    said = r"argument y: expected a tensor, .* at site 'seen', got numpy.ndarray of shape \(4,\); pass torch"
    for error in (ValueError, TypeError):
        with pytest.raises(error, match=said + r".as_tensor\(y\)"):
            call(regression, T, Y)


@pytest.mark.parametrize(
    ("model", "args", "path", "remedy"),
    [
        (regression, (T, Y.astype("float32")), "y", "torch.as_tensor(y, dtype=torch.float64)"),
        (regression, (T, Y.tolist()), "y", "torch.as_tensor(y)"),
        (Module(), (T, Y), "y", "torch.as_tensor(y)"),
        (nested, ({"y": Y},), "data['y']", "torch.as_tensor(data['y'])"),
        (nested, (Data(Y),), "data.y", "torch.as_tensor(data.y)"),
        (nested, (SimpleNamespace(y=Y),), "data.y", "torch.as_tensor(data.y)"),
        (lambda *data: regression(T, data[0]), (Y,), "data[0]", "torch.as_tensor(data[0])"),
    ],
)
def test_where_the_data_may_be(model, args, path, remedy):
    with pytest.raises(ValueError, match=f"^argument {re.escape(path)}: .*pass {re.escape(remedy)}$"):
        train(model, *args)


def test_pandas():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match=r"got pandas.Series .* pass torch.as_tensor\(y.to_numpy\(\)"):
        train(regression, T, pandas.Series(Y))
    with pytest.raises(ValueError, match=r"site 'seen'.* got pandas.Series.* makes of its argument data"):
        train(nested, pandas.DataFrame({"y": Y}))


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("x", [Y, Y.astype("float32"), Y.tolist()], ids=["double", "single", "list"])
@pytest.mark.parametrize("guide", [AutoPlanar, AutoNormal])
def test_an_array_that_the_model_computes_with(x, guide):
    with pytest.raises(
        ValueError, match=r"argument x: .*with which the model raised .* pass torch.as_tensor"
    ):
        train(regression, x, T, guide=guide)


def test_data_that_are_no_argument():
    with pytest.raises(ValueError, match=r"site 'seen': .* write obs=torch.as_tensor\(...\)"):
        train(lambda: regression(T, Y))


def test_what_a_model_makes_tensors_of_is_its_own_matter():
    def model(x, y, shape, name):
        assert (name, shape) == ("rows", [4])
        regression(torch.as_tensor(x), torch.as_tensor(np.asarray(y)))

    guide = AutoPlanar(model)
    args = Y, Y.tolist(), [4], "rows"
    fit(model, guide, *args, num_steps=2, compile=False, progress=False)
    diagnose(model, guide, *args, num_samples=100, probes=False)


def test_numbers_are_data_where_pyro_takes_them():
    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample("b", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    with pytest.raises(ValueError, match=r"argument y: .*at site 'y', got a float; pass torch"):
        train(model, 1.0)
    with pyro.validation_enabled(False):
        fit(model, AutoPlanar(model), 1.0, num_steps=2, progress=False)


def test_errors_that_have_another_cause_stay_as_they_are():
    def model(x):
        pyro.sample("b", dist.Normal(0.0, 1.0))
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        train(model, Y)

    def negative(x):
        pyro.sample("b", dist.Normal(0.0, torch.tensor(-1.0)))

    with pytest.raises(ValueError, match=r"^Expected parameter scale"):
        train(negative, Y)
