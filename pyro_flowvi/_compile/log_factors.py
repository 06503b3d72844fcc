"""The terms that a model's log density is the sum of, as a recorded graph of many points."""

import torch
from torch import Tensor

from .._program.batching import in_parts
from .._program.log_density import REFUSALS, UnconstrainedModel
from .errors import CannotCompile
from .log_density import record_batch
from .run_by_operation import by_operation

__all__ = ["LogFactors"]

WIDTH = 128
MOST_NUMBERS = 2_000_000
"""Terms of all points that are computed at once."""


class LogFactors:
    """``density.log_factors`` of many points.

    :param density: the model.
    :raises CannotCompile: if the model allows no such graph.
    :raises ValueError: as ``density.log_factors``.

    Example::

        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2))
        >>> LogFactors(UnconstrainedModel(model))(torch.zeros(5, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(self, density: UnconstrainedModel) -> None:
        if density.subsampled:
            raise CannotCompile("the model sees a random part of its data")
        self._size = len(density.log_factors(density.start))
        self._width = min(WIDTH, max(2, MOST_NUMBERS // max(1, self._size + density.dim)))
        points = density.start + 0.1 * torch.randn(self._width, density.dim).to(density.start)
        graph = record_batch(density, lambda z: (density.log_factors(z),), points)
        if graph.pinned_args:
            raise CannotCompile("what the model does depends on the values of its latents", graph.read_at)
        static = [*density.changing, *graph.constants]
        self._run = by_operation(graph.graph, static, [points], frozen=len(graph.constants))

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """The terms of points ``(P, D)``, shape ``(P, E)``; minus infinity at one that the model refuses."""
        return in_parts(self._fill_and_run, z, self._width)

    def _fill_and_run(self, part: Tensor) -> Tensor:
        filled = torch.cat([part, part[:1].expand(self._width - len(part), -1)])
        try:
            terms: Tensor = self._run(filled.contiguous())[0]
        except REFUSALS:
            if len(part) == 1:
                return part.new_full((1, self._size), -torch.inf)
            return in_parts(self._fill_and_run, part, -(-len(part) // 2))
        return terms[: len(part)]
