"""One gradient step as a graph: model, guide, gradient and optimizer, as machine code or as it is."""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from .._ranks import LostRank
from .._types import Program
from .errors import CannotCompile, brief
from .inductor import lower
from .optimizers import FlatParameters, flatten
from .run_by_operation import by_operation
from .simplify import let_views_copy
from .trace import Traced, trace

__all__ = ["CompiledStep", "StepStats"]

_FALLIBLE = (
    *("bernoulli", "binomial", "multinomial", "poisson", "gamma", "dirichlet"),
    *("cholesky", "linalg", "index", "gather", "scatter", "embedding"),
)
"""Parts of the names of operations that raise for some values."""


Average = Callable[[Sequence[Tensor], Sequence[Tensor] | None, float, int], tuple[list[Tensor], float, int]]
"""From parameters with gradients, loss and number of dropped particles to what they are over all ranks.

Without gradients they are those of a rank that has none.
"""


class StepStats(NamedTuple):
    """What is known of a step: of an eager one, the loss alone.

    :param num_dropped: particles that were left out; None where Pyro took the step.
    :param grad_norm: None there too, and where no limits were set on it.
    """

    loss: float
    num_dropped: int | None = None
    grad_norm: float | None = None

    @property
    def eager(self) -> bool:
        """Whether Pyro took the step."""
        return self.num_dropped is None


class CompiledStep:
    """The step of one model and guide for one combination of shapes.

    :param objective: ``(model, guide, args, kwargs) -> (loss, surrogate)``, tensors.
    :param model: a Pyro model.
    :param guide: a guide.
    :param params: the parameters that the surrogate depends on.
    :param tensors: example tensor arguments.
    :param rebuild: from tensor arguments to the model's ``(args, kwargs)``.
    :param advance: moves an objective that has a schedule on to the next step.
    :raises CannotCompile: if the step cannot be traced.
    """

    def __init__(
        self,
        objective: Program,
        model: Program,
        guide: Program,
        params: list[Tensor],
        tensors: Sequence[Tensor],
        rebuild: Program,
        advance: Callable[[], None] | None = None,
    ) -> None:
        def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
            args, kwargs = rebuild(inputs)
            loss, surrogate, *dropped = objective(model, guide, args, kwargs)
            grads = torch.autograd.grad(surrogate, params, allow_unused=True)
            zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True))
            loss = loss.detach().clone()
            return loss, dropped[0].to(loss) if dropped else torch.zeros_like(loss), *zeros

        with pyro.validation_enabled(False):
            self.traced: Traced = trace(gradients, params, tensors)
        self.params, self._examples = params, [weakref.ref(tensor) for tensor in tensors]
        self.buckets: list[FlatParameters] = []
        self.limits: Tensor | None = None
        self.average: Average | None = None
        """Of gradients over several ranks; None for this one alone, as in a comparison."""
        self.machine_code = True
        self.calls, self.next_audit = 0, 1
        self._advance = advance
        names = [str(node.target) for node in self.traced.graph.graph.nodes]
        names = [name for name in names if "solve_triangular" not in name]  # whatever it is given, it answers
        self._may_fail = any(part in name for name in names for part in _FALLIBLE)

    def lower(
        self,
        buckets: list[FlatParameters],
        tensors: Sequence[Tensor],
        limits: Tensor | None,
        machine_code: bool,
        average: Average | None = None,
    ) -> None:
        """Makes one function of the graph and the optimizers' steps.

        :param buckets: the parameters, all of them, with their optimizers.
        :param limits: a tensor of two norms: a gradient above the first is scaled down to it, one above the
            second, or not finite, leaves everything as it was; what is not finite makes the loss NaN.
        :param machine_code: compiles it; otherwise the graph's operations are called one by one.
        :param average: of several ranks, between the gradient and the optimizers' steps.
        """
        self.buckets, self.limits, self.machine_code = buckets, limits, machine_code
        order = {id(p): i for i, p in enumerate(self.params)}
        positions = [[order[id(p)] for p in bucket.params] for bucket in buckets]
        static = [bucket.state for bucket in buckets]
        ends = [sum(map(len, static[: i + 1])) for i in range(len(static))]

        def step(*inputs: Tensor) -> tuple[Tensor, ...]:
            states = [inputs[end - len(own) : end] for end, own in zip(ends, static, strict=True)]
            values: dict[int, Tensor] = {}
            for state, where in zip(states, positions, strict=True):
                values.update(zip(where, state, strict=False))
            rest = inputs[ends[-1] :]
            bounds, rest = (rest[0], rest[1:]) if limits is not None else (None, rest)
            loss, dropped, *grads = self.traced.graph(*(values[i] for i in range(len(order))), *rest)
            flat = [flatten(grads[i] for i in where) for where in positions]
            norm, good = torch.zeros_like(loss), None
            if bounds is not None:
                norm = torch.stack([g.double().square().sum() for g in flat]).sum().sqrt()
                good = loss.isfinite() & (norm <= bounds[1])
                shrink = (bounds[0] / norm.clamp(min=1e-300)).clamp(max=1.0)
                flat = [g * shrink.to(g.dtype) for g in flat]
                loss = torch.where(norm.isfinite(), loss, torch.nan)
            for bucket, state, grad in zip(buckets, states, flat, strict=True):
                if bucket.rule is not None:
                    for old, new in zip(state, bucket.stepped(state, grad), strict=True):
                        old.copy_(new if good is None else torch.where(good, new, old))
            outputs = (grad for bucket, grad in zip(buckets, flat, strict=True) if bucket.rule is None)
            stats = torch.stack([loss.double(), dropped.double(), norm.double()])
            return stats, *outputs

        held = [value for state in static for value in state]
        held += ([] if limits is None else [limits]) + self.traced.constants
        self.average = average
        if machine_code and average is None:
            let_views_copy(self.traced.graph.graph)
            self.traced.graph.recompile()
            self.run = lower(step, [*held, *tensors], len(held))
        else:
            self.run = self._with_steps_apart(positions, tensors)

    def _with_steps_apart(self, positions: list[list[int]], tensors: Sequence[Tensor]) -> Program:
        """The same step with the gradient alone as a graph, the optimizers' part in place."""
        held = [*(p.detach() for p in self.params), *self.traced.constants]
        graph: Program
        if self.machine_code:
            graph = lower(self.traced.graph, [*held, *tensors], len(held))
        else:
            graph = by_operation(self.traced.graph, held, tensors)
        if self.average is not None:
            graph = self._averaged(graph)
        buckets, limits = self.buckets, self.limits

        @torch.no_grad()
        def step(*tensors: Tensor) -> tuple[Tensor, ...]:
            loss, dropped, *grads = graph(*tensors)
            flat = [flatten(grads[i] for i in where) for where in positions]
            norm = torch.zeros_like(loss)
            moves = True
            if limits is not None:
                norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in flat]))
                size, clip, skip = norm.item(), *limits.tolist()
                moves = math.isfinite(loss.item()) and size <= skip
                if size > clip:
                    flat = [g.mul_(clip / size) for g in flat]
                if not math.isfinite(size):
                    loss = torch.full_like(loss, math.nan)
            for bucket, grad in zip(buckets, flat, strict=True):
                if bucket.rule is not None and moves:
                    bucket.step_in_place(grad)
            outputs = (grad for bucket, grad in zip(buckets, flat, strict=True) if bucket.rule is None)
            return torch.stack([loss.double(), dropped.double(), norm.double()]), *outputs

        return step

    def _averaged(self, graph: Program) -> Program:
        """A gradient over all ranks: of one that fails on this rank, numbers that are none."""

        def averaged(*tensors: Tensor) -> tuple[Tensor, ...]:
            average = self.average
            if average is None:
                found: tuple[Tensor, ...] = graph(*tensors)
                return found
            try:
                loss, dropped, *grads = graph(*tensors)
            except Exception:  # the other ranks wait for this one, and recover with it
                means, value, count = average(self.params, None, math.nan, 0)
                loss = dropped = torch.zeros((), dtype=torch.float64, device=self.params[0].device)
            else:
                means, value, count = average(self.params, grads, loss.item(), int(dropped.item()))
            return loss.new_tensor(value), dropped.new_tensor(float(count)), *means

        return averaged

    def is_new_to(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the first arguments that are others than those it was traced with; once."""
        if self._examples and any(ref() is not t for ref, t in zip(self._examples, tensors, strict=True)):
            self._examples = []
            return True
        return False

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether what the trace has read from tensors is still the same."""
        return all(value._version == version for value, version in self.traced.pinned) and all(
            tensors[index] is value and value._version == version
            for index, value, version in self.traced.pinned_args
        )

    def __call__(self, optim: PyroOptim, tensors: Sequence[Tensor]) -> Tensor:
        """Takes the step; after the last of several, :meth:`write` is due.

        :return: loss, number of dropped particles, norm of the gradient (zero without limits), in memory
            that the next step overwrites.
        :raises CannotCompile: if an operation fails; the generator is then as before the step.
        """
        generator = torch.get_rng_state() if self._may_fail else None
        try:
            stats, *grads = self.run(*tensors)
        except LostRank:
            raise
        except Exception as error:
            if generator is not None:
                torch.set_rng_state(generator)
            raise CannotCompile(f"the compiled step failed with {brief(error)}") from error
        self.calls += 1
        if grads:
            self._step_outside(optim, grads)
        if self._advance is not None:
            self._advance()
        return stats  # type: ignore[no-any-return]

    def write(self) -> None:
        """Gives the optimizers what they do not share with the graph."""
        for bucket in self.buckets:
            bucket.write()

    def take(self, optim: PyroOptim, tensors: Sequence[Tensor], count: int) -> list[StepStats]:
        """Takes up to ``count`` steps; stops after a loss that is not finite, or before a step that fails.

        :raises CannotCompile: if the first one fails.
        """
        found: list[StepStats] = []
        try:
            for _ in range(count):
                loss, dropped, norm = self(optim, tensors).tolist()
                found.append(StepStats(loss, int(dropped), None if self.limits is None else norm))
                if not math.isfinite(loss):
                    break
        except CannotCompile:
            if not found:
                raise
        finally:
            self.write()
        return found

    def losses(self, optim: PyroOptim, tensors: Sequence[Tensor], count: int) -> list[float] | list[Tensor]:
        """Takes up to ``count`` steps; their losses, as tensors on a GPU, which need not wait for each other.

        :raises CannotCompile: if the first one fails; it stops before a later one.
        """
        found: list[Any] = []
        try:
            for _ in range(count):
                stats = self(optim, tensors)
                found.append(stats.tolist()[0] if stats.is_cpu else stats[0].clone())
        except CannotCompile:
            if not found:
                raise
        finally:
            self.write()
        return found

    def steps_to_audit(self) -> int:
        """Steps before the one that is compared with eager Pyro, at least one."""
        return max(1, self.next_audit - self.calls - 1)

    def _step_outside(self, optim: PyroOptim, grads: Sequence[Tensor]) -> None:
        plain = [bucket for bucket in self.buckets if bucket.rule is None]
        params = [param for bucket in plain for param in bucket.params]
        views = [view for bucket, grad in zip(plain, grads, strict=True) for view in bucket.split(grad)]
        for param, view in zip(params, views, strict=True):
            param.grad = view
        optim(params)
        for param in params:
            param.grad = None
