"""A compiled step as a CUDA graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["cuda_graph"]


def cuda_graph(compiled: Any, inputs: Sequence[Tensor], num_static: int) -> Callable[..., Any]:
    """The kernels of a step as one CUDA graph: launched at once, on fixed addresses, without the host.

    torch's default generator is registered with a graph while it is captured, so that each replay draws
    anew and follows the seed.

    :param compiled: takes a list of tensors, some of which it may change in place; must not wait for the GPU.
    :param inputs: example inputs.
    :param num_static: how many of them, from the first, are these very tensors at every call.
    :return: a function of the remaining inputs.
    """
    held = [*inputs[:num_static], *(value.clone() for value in inputs[num_static:])]
    arguments = held[num_static:]
    before = [value.clone() for value in held]
    with torch.random.fork_rng():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries set themselves up at their first calls
                compiled(list(held))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = compiled(list(held))
    for value, old in zip(held, before, strict=True):
        value.copy_(old)

    def step(*given: Tensor) -> Sequence[Tensor]:
        for own, value in zip(arguments, given, strict=True):
            own.copy_(value)
        graph.replay()
        return outputs  # type: ignore[no-any-return]

    return step
