"""Private names of Pyro are imported in one place, and mean what the package takes them for."""

import ast
import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

import pyro_flowvi
from pyro_flowvi._program.pyro_private import (
    PYRO_STACK,
    get_traces,
    is_module_local_param_enabled,
    replace_stored,
    stored_params,
)

PACKAGE = Path(pyro_flowvi.__file__).parent
WRAPPED = re.compile(r"get_param_store\(\)\._|\bstore\._|\._get_traces\(|\._PYRO_STACK")
HOME = PACKAGE / "_program" / "pyro_private.py"


@pytest.mark.parametrize(
    "path",
    [path for path in PACKAGE.rglob("*.py") if path != HOME],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_no_other_module_uses_them(path):
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] == "pyro"
            and not node.level
        ):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            assert not [name for name in names if name.startswith("_")], ast.unparse(node)
        if isinstance(node, ast.Import):
            for alias in node.names:
                root, *rest = alias.name.split(".")
                assert root != "pyro" or not [name for name in rest if name.startswith("_")], alias.name
    assert not WRAPPED.findall(source)


def test_the_stack_holds_the_handlers_in_force():
    assert not PYRO_STACK
    with poutine.scale(scale=2.0) as handler:
        assert [handler] == PYRO_STACK
    assert not PYRO_STACK


def test_module_local_parameters():
    assert not is_module_local_param_enabled()
    with pyro.settings.context(module_local_params=True):
        assert is_module_local_param_enabled()


def test_entries_of_the_store():
    first = pyro.param("a", torch.zeros(2))
    assert stored_params()["a"] is first
    other = torch.ones(2, requires_grad=True)
    replace_stored("a", other)
    assert pyro.param("a") is other
    store = pyro.get_param_store()
    assert store.param_name(other) == "a"
    assert store.param_name(first) is None


def test_traces_are_scored():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    ((model_trace, guide_trace),) = get_traces(Trace_ELBO(), model, model, (), {})
    x = guide_trace.nodes["x"]["value"]
    assert model_trace.nodes["x"]["value"] is x
    assert torch.allclose(model_trace.nodes["x"]["log_prob"], dist.Normal(0.0, 1.0).log_prob(x))
