"""Recorded graphs: what they hold, and what they refuse."""

import numpy as np
import pytest
import torch

from pyro_flowvi._compile.errors import CannotCompile
from pyro_flowvi._compile.trace import trace


def written(x):
    memory = torch.zeros(3, dtype=x.dtype)
    memory[0] = x[0]
    return memory


def written_as_a_view(x):
    memory = torch.zeros(3, dtype=x.dtype)
    view = memory[1:]
    torch.add(x, 1.0, out=memory)
    return view


READINGS = {
    "item": lambda x: x * x[0].item(),
    "a list": lambda x: x * x.tolist()[0],
    "numpy": lambda x: x * float(x.numpy()[0]),
    "asarray": lambda x: x * float(np.asarray(x)[0]),
    "written memory": lambda x: x * written(x).sum().item(),
    "a view of written memory": lambda x: x * written_as_a_view(x)[0].item(),
    "a mask of written memory": lambda x: x[written(x) > 0.0],
    "a branch": lambda x: x * 2.0 if x.sum() > 0.0 else x,
    "equal": lambda x: x * 2.0 if torch.equal(x, x + 0.0) else x,
    "nonzero": lambda x: x[torch.nonzero(x > 0.0)[:, 0]],
    "unique": lambda x: torch.unique(x),
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_values_that_a_graph_depends_on(read):
    """Those of arguments pin the arguments, those of parameters refuse."""
    x = torch.tensor([1.0, 2.0, 3.0])
    traced = trace(lambda x: (read(x),), [], [x])
    assert [i for i, _, _ in traced.pinned_args] == [0]
    assert "test_trace.py" in traced.read_at
    weight = torch.nn.Parameter(x)
    with pytest.raises(CannotCompile, match="parameters"):
        trace(lambda x: (x + read(weight.detach()).sum(),), [weight], [x])


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_values_of_constants_may_be_read(read):
    held, x = torch.tensor([1.0, 2.0, 3.0]), torch.ones(1)
    traced = trace(lambda x: (x + read(held).sum(),), [], [x])
    assert not traced.pinned_args
    assert any(value is held for value, _ in traced.pinned)
    assert torch.equal(traced.graph(*traced.constants, x)[0], x + read(held).sum())
    before = {id(value): version for value, version in traced.pinned}
    held.add_(1.0)
    assert held._version != before[id(held)]


def test_memory_that_random_numbers_were_written_to_is_not_read():
    def function(x):
        memory = torch.zeros(3)
        memory[0].normal_()
        return (x * memory.sum().item(),)

    with pytest.raises(CannotCompile, match="random draws"):
        trace(function, [], [torch.ones(3)])


def test_memory_that_only_constants_were_written_to_is_read():
    held = torch.ones(3)

    def function(x):
        memory = torch.zeros(3)
        memory[0] = held[0]
        return (x * memory.sum().item(),)

    traced = trace(function, [], [torch.ones(3)])
    assert not traced.pinned_args
    assert torch.equal(traced.graph(*traced.constants, torch.full((3,), 2.0))[0], torch.full((3,), 2.0))


def test_random_numbers_are_those_of_the_function():
    def function(x):
        turned = torch.empty(3, 2).t().normal_()
        gamma = torch.distributions.Gamma(x.exp(), 1.0).sample()
        return turned + x, torch.randperm(5), torch.bernoulli(x.sigmoid()), gamma, torch.rand_like(x)

    x = torch.randn(3)
    traced = trace(function, [], [x])
    for seed in (1, 2):
        torch.manual_seed(seed)
        found = traced.graph(*traced.constants, x)
        torch.manual_seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(found, function(x), strict=True))


def test_sparse_constants_are_inputs():
    matrix = torch.eye(3).to_sparse()
    traced = trace(lambda x: (torch.sparse.mm(matrix, x),), [], [torch.ones(3, 1)])
    x = torch.randn(3, 1)
    assert torch.equal(traced.graph(*traced.constants, x)[0], x)


def test_the_same_tensor_as_two_arguments_is_two():
    x = torch.ones(3)
    traced = trace(lambda a, b: (a - b, a), [], [x, x])
    assert torch.equal(traced.graph(x, 2.0 * x)[0], -x)


def test_an_error_names_the_line():
    with pytest.raises(CannotCompile, match=r"RuntimeError.*test_trace\.py"):
        trace(lambda x: (x @ torch.ones(5),), [], [torch.ones(3)])


def test_a_constant_that_the_program_changes_is_not_read():
    held = torch.zeros(3)

    def function(x):
        held[0].add_(1.0)
        return (x * held.sum().item(),)

    with pytest.raises(CannotCompile, match="changes in place"):
        trace(function, [], [torch.ones(3)])
