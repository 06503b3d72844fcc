"""Functions against their recorded and simplified graphs."""

import torch

from pyro_flowvi._compile.run_by_operation import by_operation
from pyro_flowvi._compile.simplify import simplify
from pyro_flowvi._compile.trace import trace


def with_gradient(function):
    def run(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = function(x)
            return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    return run


def size(nodes):
    """Number of operations."""
    return sum(node.op == "call_function" for node in nodes.nodes)


def check(function, x, other=None):
    """The graph at another point is the function there; its operations, simplified."""
    other = (
        x + 0.3 * torch.cos(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)
        if other is None
        else other
    )
    traced = trace(function, [], [x.clone()])
    run = by_operation(traced.graph, traced.constants, [x], frozen=len(traced.constants))
    with torch.no_grad():
        for found, expected in zip(run(other.clone()), function(other.clone()), strict=True):
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-5
            assert torch.allclose(found, expected, rtol=tolerance, atol=1e-2 * tolerance, equal_nan=True)
    nodes, _ = simplify(traced.graph, [*traced.constants, x], lambda i: i < len(traced.constants))
    return nodes


def count(nodes, *targets):
    return sum(node.target in targets for node in nodes.nodes)
