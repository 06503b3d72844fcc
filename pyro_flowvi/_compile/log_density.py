"""A model's log density and gradient as a traced graph: many points a call, without Pyro's own time."""

from collections.abc import Callable

import torch
from torch import Tensor

from .._program.batching import in_parts
from .._program.log_density import REFUSALS, UnconstrainedModel
from .errors import CannotCompile
from .trace import trace

__all__ = ["ValueAndGrad", "traced"]

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Points, shape ``(P, D)``, to log densities ``(P,)`` and their gradients ``(P, D)``."""
WIDTH = 128
"""Points that a graph takes at once; fewer are filled up, more are taken in parts."""


def traced(density: UnconstrainedModel, width: int = WIDTH) -> ValueAndGrad:
    """``density.value_and_grad``, traced once where that is possible.

    Before it is used the graph is compared with the model on points that it has not seen.

    :param density: the model.
    :param width: points that the graph takes at once.
    :return: a function of points; the plain one where the model does what a graph cannot hold.
    """

    def plain(z: Tensor) -> tuple[Tensor, Tensor]:
        return in_parts(density.value_and_grad, z, width)

    if not density.batched or density.subsampled:
        return plain
    offsets = torch.linspace(-1.0, 1.0, width, dtype=torch.float64).unsqueeze(-1)
    waves = torch.cos(torch.arange(density.dim, dtype=torch.float64))
    points = density.start + 0.5 * (offsets * waves).to(density.start)
    try:
        graph = trace(density.value_and_grad, [], [points])
    except CannotCompile:
        return plain

    def fill_and_run(part: Tensor) -> tuple[Tensor, Tensor]:
        filled = part.new_zeros(width, part.shape[1]) + part[:1]
        filled[: len(part)] = part
        try:
            value, gradient = graph.graph(*graph.constants, filled)
        except REFUSALS:
            value, gradient = density.value_and_grad(filled)
        return value[: len(part)], gradient[: len(part)]

    @torch.no_grad()
    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        if any(value._version != version for value, version in graph.pinned):
            return plain(z)
        return in_parts(fill_and_run, z, width)

    fresh = density.start + 0.3 * (offsets * waves.flip(0)).to(density.start)
    tolerance = 1e-6 if points.dtype == torch.float64 else 1e-3
    pairs = zip(run(fresh), plain(fresh), strict=True)
    agree = all(torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True) for a, b in pairs)
    return run if agree and not graph.pinned_args else plain
