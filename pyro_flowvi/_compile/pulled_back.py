"""A model's log density in the noise of a flow, as two graphs that know of each other."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._program.batching import in_parts
from ..transforms.base import forward_and_log_det
from .errors import CannotCompile
from .flow_step import call_between
from .log_density import TracedDensity, ValueAndGrad
from .run_by_operation import as_function, without_repetition
from .trace import trace

__all__ = ["pulled_back", "pulled_back_at"]

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
"""How far the graph's gradients may be from the modules', relative to their norm."""


def _by_modules(flow: Any, x: Tensor, slope_at: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Images, log-determinants, and the gradient of ``(slope * image).sum()`` with these."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        image, log_det = forward_and_log_det(flow, at)
        total = (image * slope_at(image.detach())).sum() + log_det.sum()
        (gradient,) = torch.autograd.grad(total, at)
    return image.detach(), log_det.detach(), gradient


def pulled_back_at(flow: Any, density: ValueAndGrad, x: Tensor) -> tuple[Tensor, Tensor]:
    """log p of the images of points with the log-determinants, and the gradient by the points, by modules."""
    values: list[Tensor] = []

    def slope_at(z: Tensor) -> Tensor:
        value, slope = density(z)
        values.append(value)
        return slope

    _, log_det, gradient = _by_modules(flow, x, slope_at)
    return values[0] + log_det, gradient


class _PulledBack:
    """The density by graphs, of as many points as the model's has."""

    def __init__(self, flow: Any, density: TracedDensity, like: Tensor) -> None:
        self._density = density
        x, slope = torch.randn_like(like), torch.randn_like(like)

        def run(x: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
            image, log_det, gradient = _by_modules(flow, x, lambda _: slope)
            return image, log_det, log_det, gradient

        graph = trace(run, [], [x, slope])
        if graph.pinned_args:
            raise CannotCompile("what the flow does depends on the values of its noise")
        nodes, held = without_repetition(graph.graph, graph.constants, [x, slope])
        call_between(nodes, len(graph.constants), self._score)
        self._run = as_function(nodes, graph.constants, held)
        self._value = like[:, 0]

    def _score(self, z: Tensor, log_det: Tensor, _: Tensor) -> Tensor:
        value, slope = self._density(z)
        self._value = value + log_det
        return slope

    @torch.no_grad()
    def exactly(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of as many points as it was recorded for."""
        gradient = self._run(x)[0].clone()
        return self._value, gradient

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of any number of points."""
        width = self._density.width

        def fill_and_run(part: Tensor) -> tuple[Tensor, Tensor]:
            filled = torch.cat([part, part[:1].expand(width - len(part), -1)])
            value, gradient = self.exactly(filled)
            return value[: len(part)], gradient[: len(part)]

        return in_parts(fill_and_run, x, width)


def pulled_back(flow: Any, density: ValueAndGrad, like: Tensor) -> ValueAndGrad:
    """log p of a flow's images with the log-determinants, and the gradient by the noise.

    :param flow: a transform of vectors; it stays as it is for as long as the function is used.
    :param density: of the images; one that is recorded makes the whole a graph, where the flow allows.
    :param like: of the noise's length, dtype and device.

    Example::

        >>> from pyro_flowvi.transforms import ElementwiseAffine
        >>> def normal(z):
        ...     return -0.5 * z.square().sum(-1), -z
        >>> density = pulled_back(ElementwiseAffine(1, scale=2.0), normal, torch.zeros(1))
        >>> value, gradient = density(torch.ones(1, 1))
        >>> round(value.item(), 4), gradient.item()
        (-1.3069, -4.0)
    """

    def by_modules(x: Tensor) -> tuple[Tensor, Tensor]:
        return pulled_back_at(flow, density, x)

    if not isinstance(density, TracedDensity) or not density.holds:
        return by_modules
    x = torch.randn(density.width, len(like)).to(like)
    try:
        graph = _PulledBack(flow, density, x)
        found, expected = graph.exactly(0.5 * x)[1], by_modules(0.5 * x)[1]
    except CannotCompile:
        return by_modules
    finite = expected.isfinite()
    gap, size = (float(each[finite].norm()) for each in (found - expected, expected))
    agrees = torch.equal(finite, found.isfinite()) and gap <= TOLERANCE.get(x.dtype, 5e-2) * (1.0 + size)
    return graph if agrees else by_modules
