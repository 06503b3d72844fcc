"""CompiledSVI sees what the program has changed: its losses are those of stock SVI, step by step."""

import argparse
import collections
import dataclasses
import functools
import types
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

from pyro_flowvi import CompiledSVI
from pyro_flowvi.infer import CompileWarning

CHANGE, STEPS = 4, 8


class Base:
    beta = 0.1


class Derived(Base):
    pass


class Slots:
    __slots__ = ("beta",)


@dataclasses.dataclass
class Options:
    beta: float = 0.1


class Private(PyroModule):
    def __init__(self):
        super().__init__()
        self._beta = 0.1


class Nested(PyroModule):
    def __init__(self):
        super().__init__()
        self.inner = Private()
        self.layers = nn.ModuleList([Private()])


class Holder:
    def __init__(self):
        self.inner = types.SimpleNamespace(options={"list": [Options()]})

    def beta(self):
        return self.inner.options["list"][0].beta


class Wrapped:
    def __init__(self):
        self._hidden = 0.1

    @property
    def beta(self):
        return self._hidden

    def by_name(self, name):
        return getattr(self, "_" + name)


def tagged(): ...


KINDS = {}
GLOBAL = 0.1


def kind(make):
    """Registers a function that makes a reader and a writer of one number."""
    KINDS[make.__name__] = make
    return make


def of_attribute(holder, key):
    return lambda: getattr(holder, key), functools.partial(setattr, holder, key)


@kind
def private_attribute():
    return of_attribute(Private(), "_beta")


@kind
def submodule():
    module = Nested()
    return lambda: module.inner._beta, lambda v: setattr(module.inner, "_beta", v)


@kind
def module_in_a_list():
    module = Nested()
    return lambda: module.layers[0]._beta, lambda v: setattr(module.layers[0], "_beta", v)


@kind
def class_attribute_of_a_base():
    return lambda: Derived.beta, lambda v: setattr(Base, "beta", v)


@kind
def class_attribute_that_an_instance_shadows():
    instance = Derived()
    Base.beta = 0.1
    return lambda: instance.beta, lambda v: setattr(instance, "beta", v)


@kind
def namespace_of_argparse():
    space = argparse.Namespace()
    return lambda: space.beta, lambda v: setattr(space, "beta", v)


@kind
def simple_namespace():
    space = types.SimpleNamespace()
    return lambda: space.beta, lambda v: setattr(space, "beta", v)


@kind
def slots():
    instance = Slots()
    return lambda: instance.beta, lambda v: setattr(instance, "beta", v)


@kind
def data_class():
    options = Options()
    return lambda: options.beta, lambda v: setattr(options, "beta", v)


@kind
def attribute_of_a_function():
    return lambda: tagged.beta, lambda v: setattr(tagged, "beta", v)


@kind
def nested_attributes():
    holder = Holder()
    return holder.beta, lambda v: setattr(holder.inner.options["list"][0], "beta", v)


@kind
def property_of_an_object():
    wrapped = Wrapped()
    return lambda: wrapped.beta, lambda v: setattr(wrapped, "_hidden", v)


@kind
def attribute_by_computed_name():
    wrapped = Wrapped()
    return lambda: wrapped.by_name("hid" + "den"), lambda v: setattr(wrapped, "_hidden", v)


@kind
def partial_function():
    options = {}
    return functools.partial(lambda o: o["beta"], o=options), lambda v: options.update(beta=v)


@kind
def default_of_an_argument():
    def read(options={"beta": 0.1}):  # noqa: B006
        return options["beta"]

    return read, lambda v: read.__defaults__[0].update(beta=v)


@kind
def cell_of_a_closure():
    beta = 0.1

    def write(value):
        nonlocal beta
        beta = value

    return lambda: beta, write


@kind
def global_number():
    return lambda: GLOBAL, lambda v: globals().update(GLOBAL=v)


@kind
def dict_of_500():
    table = dict.fromkeys(range(500), 0.0)
    return lambda: table[377], lambda v: table.update({377: v})


@kind
def list_of_1000():
    values = [0.0] * 1000
    return lambda: values[800], lambda v: values.__setitem__(800, v)


@kind
def list_of_300_objects():
    values = [Options() for _ in range(300)]
    return lambda: values[211].beta, lambda v: setattr(values[211], "beta", v)


@kind
def user_dict():
    table = collections.UserDict()
    return lambda: table["beta"], lambda v: table.update(beta=v)


@kind
def small_array():
    values = np.zeros(400)
    return lambda: values[13], lambda v: values.__setitem__(13, v)


@kind
def attribute_of_a_distribution():
    prior = dist.Normal(0.0, 1.0)
    return lambda: prior.scale.item(), lambda v: setattr(prior, "scale", torch.tensor(v))


def programs(read):
    def model():
        beta = read()
        with beta if isinstance(beta, poutine.messenger.Messenger) else poutine.scale(scale=float(beta)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    return model, guide


def train(svi_class, read, write, changes=(CHANGE,), steps=STEPS, **options):
    """Losses of a run in which one value changes, and the SVI."""
    pyro.clear_param_store()
    write(0.1)
    svi = svi_class(*programs(read), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), **options)
    losses = []
    for i in range(steps):
        if i in changes:
            write(1.0)
        pyro.set_rng_seed(i)
        losses.append(svi.step())
    return losses, svi


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_losses_are_those_of_stock_svi(make):
    expected, _ = train(SVI, *make())
    found, svi = train(CompiledSVI, *make(), compile=True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected[CHANGE] != pytest.approx(train(SVI, *make(), changes=())[0][CHANGE], rel=1e-3)
    assert svi._stepper.graphs.num_built == 2


def test_attribute_of_a_handler():
    handler = poutine.scale(scale=0.1)
    pair = lambda: handler, lambda v: setattr(handler, "scale", v)
    expected, _ = train(SVI, *pair)
    assert train(CompiledSVI, *pair, compile=True)[0] == pytest.approx(expected, rel=1e-5)


def test_a_large_array_is_compared_at_audits():
    values = np.zeros(10_000)
    pair = lambda: values[77], lambda v: values.__setitem__(77, v)
    expected, _ = train(SVI, *pair, steps=14)
    found, svi = train(CompiledSVI, *pair, steps=14, compile=True)
    assert found[11:] == pytest.approx(expected[11:], rel=0.1)
    assert svi._stepper.graphs.num_built == 2


class Trainer:
    """Keeps books beside the programs that it trains."""

    def __init__(self):
        self.beta, self.losses, self.epoch = 0.1, [], 0

    def model(self):
        with poutine.scale(scale=self.beta):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    def guide(self):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    def train(self, svi_class, **options):
        svi = svi_class(self.model, self.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), **options)
        for self.epoch in range(STEPS):
            self.beta = 0.1 if self.epoch < CHANGE else 1.0
            pyro.set_rng_seed(self.epoch)
            self.losses.append(svi.step())
        return svi


def test_what_no_program_names_may_change():
    stock, fast = Trainer(), Trainer()
    stock.train(SVI)
    pyro.clear_param_store()
    svi = fast.train(CompiledSVI, compile=True)
    assert fast.losses == pytest.approx(stock.losses, rel=1e-5)
    assert svi._stepper.graphs.num_built == 2


def test_state_that_changes_at_every_step_ends_in_eager_steps(monkeypatch):
    monkeypatch.setattr("pyro_flowvi._compile.policy.STEPS_BEFORE", 1)
    table = {"beta": 0.1}
    svi = CompiledSVI(*programs(lambda: table["beta"]), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())

    def train():
        for _ in range(20):
            table["beta"] += 0.01
            svi.step()

    with pytest.warns(CompileWarning, match=r"changes at every step \(.*beta"):
        train()
    assert svi._stepper.graphs.num_built <= 3


def test_a_count_that_the_model_keeps_is_that_of_stock_svi(monkeypatch):
    """The trial of a step is undone, in the program's own values too."""
    monkeypatch.setattr("pyro_flowvi._compile.policy.STEPS_BEFORE", 1)
    outcomes = []
    for svi_class in (SVI, CompiledSVI):
        pyro.clear_param_store()
        table, seen = {"count": 0}, []

        def read(table=table, seen=seen):
            table["count"] += 1
            seen.append(table["count"])
            return min(1.0, table["count"] / 10)

        svi = svi_class(*programs(read), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompileWarning)
            pyro.set_rng_seed(0)
            outcomes.append(([svi.step() for _ in range(STEPS)], table, seen))
    assert outcomes[0] == outcomes[1]
