"""The ELBO of a tempered target."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._types import Program
from .path_gradient import TraceSTL_ELBO

__all__ = ["TraceAnnealed_ELBO"]


class TraceAnnealed_ELBO(TraceSTL_ELBO):
    """The ELBO of a target that is tempered at first: E[β log p(x, z) - log q(z)].

    Rezende and Mohamed 2015, equation 20; the gradient is that of :class:`TraceSTL_ELBO` by default.  A
    guide that starts with small β meets all modes before any of them is deep.  The loss that is reported is
    that of the tempered target.

    :param schedule: β as a function of the step, from 0: a number above 0, as a rule rising to 1.
    :param path: takes the path gradient; otherwise that of ``Trace_ELBO``, which costs less a step and is the
        less noisy one far from the posterior.
    :param num_particles: as in :class:`TraceSTL_ELBO`, as are the other keywords.
    :raises ValueError: if ``schedule`` is not callable; at a step, if it gives no positive number.

    Example::

        >>> elbo = TraceAnnealed_ELBO(lambda step: min(1.0, 0.1 + step / 1000), num_particles=16)
        >>> elbo.steps = 400  # to resume
        >>> elbo.beta.item()
        0.5
    """

    def __init__(
        self,
        schedule: Callable[[int], float],
        path: bool = True,
        *,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        retain_graph: bool | None = None,
    ) -> None:
        if not callable(schedule):
            raise ValueError(f"schedule: expected a callable of the step, got {schedule!r}")
        super().__init__(num_particles, max_plate_nesting, vectorize_particles, retain_graph=retain_graph)
        self.schedule, self._path = schedule, bool(path)
        # Tensors, of which a compiled step holds a reference and an audit restores the values.
        self._steps: Tensor = torch.zeros((), dtype=torch.long, device="cpu")
        self.beta: Tensor = torch.ones((), dtype=torch.float64, device="cpu")
        """β of the present step."""
        self.steps = 0

    def _state(self) -> dict[str, Tensor]:
        return {**super()._state(), "steps": self._steps, "beta": self.beta}

    @property
    def steps(self) -> int:
        """How many steps have been taken; set it to resume."""
        return int(self._steps)

    @steps.setter
    def steps(self, value: int | Tensor) -> None:
        step = int(value)
        beta = float(self.schedule(step))
        if not (beta > 0.0 and math.isfinite(beta)):
            raise ValueError(f"schedule: expected a positive number, got {beta} at step {step}")
        self._steps.fill_(step)
        self.beta.fill_(beta)

    def advance(self) -> None:
        """Goes on to the next step; whoever steps without :meth:`loss_and_grads` calls it."""
        self.steps += 1

    def _combine(self, model: Tensor, guide: Tensor) -> Tensor:
        return self.beta.to(model) * model - guide

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        value = super().loss_and_grads(model, guide, *args, **kwargs)
        self.advance()
        return value
