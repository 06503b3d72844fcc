"""Gradient steps of an SVI: eager at first, by graphs where that pays."""

import math
from typing import Any

from pyro.infer import SVI
from torch import Tensor

from .._program.call import refusing_data
from .._program.devices import check_devices
from .._types import CompileMode
from .errors import CannotCompile
from .graph_cache import GraphCache
from .policy import CompileWherePays, InterpretWherePays, Mode, Policy, Settled
from .step import Average, CompiledStep, StepStats

__all__ = ["Stepper"]


class Stepper:
    """Takes the steps of an SVI, for :class:`CompiledSVI` and for the loop of :func:`~pyro_flowvi.fit`.

    The SVI is handed over anew at every call and not kept: see :class:`GraphCache`.

    :param svi: Pyro's SVI, or a subclass, whose own ``step`` is not called.
    :param loss: the objective that it was made with.
    :param compile: as for :class:`CompiledSVI`.
    :param interprets: whether "auto" uses graphs that are not worth compiling, operation by operation.
    :param limits: two norms: a gradient above the first is scaled down to it, one above the second leaves
        everything as it was.  This is for steps by a graph; the optimizer sees to eager ones.
    :param average: of gradients over several ranks, in steps by a graph.
    :raises CannotCompile: with ``compile=True``, for an objective that is not supported.
    """

    def __init__(
        self,
        svi: SVI,
        loss: Any,
        *,
        compile: CompileMode,
        interprets: bool = False,
        limits: Tensor | None = None,
        average: Average | None = None,
    ) -> None:
        strict = bool(compile) and compile != "auto"
        policy: Policy | None = Settled("machine code") if strict else None
        if compile == "auto":
            policy = InterpretWherePays() if interprets else CompileWherePays()
        self.graphs = GraphCache(svi, loss, policy, strict=strict, limits=limits, average=average)
        self.started = False
        """Whether a step was taken, by this process or an earlier one."""
        self.rate = math.nan
        """The learning rate, which the optimizers have."""

    def forget(self) -> None:
        """The moments are the optimizers': nothing is to be done."""

    def leave(self) -> None:
        """The parameters are where they were."""

    @property
    def mode(self) -> Mode | None:
        """How steps are run; None while that is open."""
        return self.graphs.mode

    def resume(self, mode: Mode | None) -> None:
        """Has the next step run as it would have been without an interruption.

        :param mode: that of the interrupted run.
        """
        self.started = True
        if mode is not None:
            self.graphs.policy = None if mode == "eager" else Settled(mode)

    def take(self, svi: SVI, args: Any, kwargs: Any, count: int, left: int | None) -> list[StepStats]:
        """Takes up to ``count`` of ``left`` steps that are to come; stops after a loss that is not finite.

        :param left: None where it is not known.
        :raises CannotCompile: with ``compile=True``, where the step cannot be compiled.
        """
        step, tensors = self._find(svi, args, kwargs, left)
        if step is None:
            return [StepStats(self._step_eagerly(svi, args, kwargs, left))]
        try:
            return step.take(svi.optim, tensors, min(count, step.steps_to_audit()))
        except CannotCompile as cause:
            self.graphs.give_up(cause)
            return [StepStats(self._step_eagerly(svi, args, kwargs, left))]

    def losses(self, svi: SVI, args: Any, kwargs: Any, count: int, left: int) -> list[float] | list[Tensor]:
        """As :meth:`take`, but goes on after any loss, and does not wait for those of a GPU: tensors."""
        step, tensors = self._find(svi, args, kwargs, left)
        if step is None:
            return [self._step_eagerly(svi, args, kwargs, left)]
        try:
            return step.losses(svi.optim, tensors, min(count, step.steps_to_audit()))
        except CannotCompile as cause:
            self.graphs.give_up(cause)
            return [self._step_eagerly(svi, args, kwargs, left)]

    def _find(
        self, svi: SVI, args: Any, kwargs: Any, left: int | None
    ) -> tuple[CompiledStep | None, list[Tensor]]:
        if not self.started:
            return None, []  # the first step is eager: it makes the parameters, with validation
        return self.graphs.find(svi, args, kwargs, left)

    def _step_eagerly(self, svi: SVI, args: Any, kwargs: Any, left: int | None) -> float:
        first, guide = not self.started, svi.guide
        if first:
            check_devices(svi.model, guide, args, kwargs)
            svi.guide = refusing_data(guide)
        try:
            loss: float = SVI.step(svi, *args, **kwargs)
        finally:
            svi.guide = guide
        self.started = True
        if first and self.graphs.strict:
            self._find(svi, args, kwargs, left)  # so that what cannot be compiled is known after one step
        return loss
