"""Test settings: float64, a fixed seed, an empty param store; --device, --dtype, --run-long, --run-slow."""

import gc
import importlib
import io
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, settings

import pyro_flowvi
from tests import second_device

torch.set_num_threads(1)
# The same examples every time, so that a change is all that a failure can come from.
for profile, count in (("few", 12), ("many", 150)):
    settings.register_profile(
        profile,
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def pytest_addoption(parser):
    parser.addoption("--device", help="torch's default device; for tests marked cuda a GPU, if there is one")
    parser.addoption("--dtype", default="float64", choices=["float32", "float64"])
    parser.addoption("--run-long", action="store_true", help="also run tests marked long")
    parser.addoption("--run-slow", action="store_true", help="run all tests, those marked slow too")


def pytest_configure(config):
    if config.getoption("--device") == second_device.NAME:
        second_device.register()
        second_device.SecondDevice().__enter__()
    more = config.getoption("--run-long") or config.getoption("--run-slow")
    settings.load_profile("many" if more else "few")


def pytest_collection_modifyitems(config, items):
    if not (config.getoption("--device") or torch.cuda.is_available()):
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU, or --device"))
    if config.getoption("--run-slow"):
        return
    left_out = {"slow"} if config.getoption("--run-long") else {"slow", "long"}
    for item in items:
        for mark in left_out & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=f"needs --run-{mark}"))


def pytest_collection_finish():
    # Full collections, by which names are freed, need not go through all of torch and of the tests each time.
    gc.collect()
    gc.freeze()


@pytest.fixture
def device(request):
    """The device of a test marked cuda: --device, or the GPU."""
    name = request.config.getoption("--device") or "cuda"
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(name)


@pytest.fixture(autouse=True)
def _fresh_state(request, doctest_namespace):
    torch.set_default_dtype(getattr(torch, request.config.getoption("--dtype")))
    # Tests marked cuda say themselves what lies on the device.
    marked = request.node.get_closest_marker("cuda")
    if not marked and request.config.getoption("--device") not in (None, "cpu"):
        torch.set_default_device(request.config.getoption("--device"))
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    doctest_namespace.update(
        io=io, math=math, np=np, torch=torch, pyro=pyro, dist=dist, pyro_flowvi=pyro_flowvi
    )
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.fixture
def double():
    """A float64 default dtype, whatever --dtype is."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def outside(monkeypatch):
    """Tells of every fit whether its steps were taken outside Pyro."""
    fitting, told = importlib.import_module("pyro_flowvi.infer._fit"), []
    original = fitting.steps_outside

    def noted(*args):
        steps = original(*args)
        told.append(steps is not None)
        return steps

    monkeypatch.setattr(fitting, "steps_outside", noted)
    return told
