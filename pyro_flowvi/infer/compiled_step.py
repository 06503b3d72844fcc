"""One compiled gradient step: model, guide, gradient and optimizer in one graph."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from .fused import Bucket, flatten
from .tracing import Traced, lower, trace

__all__ = ["CompiledStep"]

Program = Callable[..., Any]


class CompiledStep:
    """The step of one model and guide for one combination of shapes.

    :param objective: ``(model, guide, args, kwargs) -> (loss, surrogate)``, tensors.
    :param model: a Pyro model.
    :param guide: a guide.
    :param params: the parameters that the surrogate depends on.
    :param tensors: example tensor arguments.
    :param rebuild: from tensor arguments to the model's ``(args, kwargs)``.
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
    ) -> None:
        def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
            args, kwargs = rebuild(inputs)
            loss, surrogate = objective(model, guide, args, kwargs)
            grads = torch.autograd.grad(surrogate, params, allow_unused=True)
            zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True))
            return loss.detach().clone(), *zeros

        with pyro.validation_enabled(False):
            self.traced: Traced = trace(gradients, params, tensors)
        self.params, self._examples = params, [weakref.ref(tensor) for tensor in tensors]
        self.buckets: list[Bucket] = []
        self.calls, self.next_audit = 0, 1

    def lower(self, buckets: list[Bucket], tensors: Sequence[Tensor], guarded: bool) -> None:
        """Compiles the graph together with the optimizers' steps.

        :param buckets: the parameters, all of them, with their optimizers.
        :param guarded: a loss or gradient that is not finite leaves everything as it was and makes the
            loss NaN.
        """
        self.buckets = buckets
        order = {id(p): i for i, p in enumerate(self.params)}
        positions = [[order[id(p)] for p in bucket.params] for bucket in buckets]
        static = [bucket.state for bucket in buckets]
        ends = [sum(map(len, static[: i + 1])) for i in range(len(static))]

        def step(*inputs: Tensor) -> tuple[Tensor, ...]:
            states = [inputs[end - len(own) : end] for end, own in zip(ends, static, strict=True)]
            values: dict[int, Tensor] = {}
            for state, where in zip(states, positions, strict=True):
                values.update(zip(where, state, strict=False))
            loss, *grads = self.traced.graph(*(values[i] for i in range(len(order))), *inputs[ends[-1] :])
            flat = [flatten(grads[i] for i in where) for where in positions]
            good = (
                torch.stack([loss.isfinite(), *(g.isfinite().all() for g in flat)]).all() if guarded else None
            )
            for bucket, state, grad in zip(buckets, states, flat, strict=True):
                if bucket.rule is not None:
                    for old, new in zip(state, bucket.stepped(state, grad), strict=True):
                        old.copy_(new if good is None else torch.where(good, new, old))
            outputs = (grad for bucket, grad in zip(buckets, flat, strict=True) if bucket.rule is None)
            return loss if good is None else torch.where(good, loss, torch.nan), *outputs

        held = [value for state in static for value in state] + self.traced.constants
        self.run = lower(step, [*held, *tensors], len(held))

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
        """Takes the step; the loss, in memory that the next step overwrites."""
        loss, *grads = self.run(*tensors)
        self.calls += 1
        if grads:
            self._step_outside(optim, grads)
        return loss  # type: ignore[no-any-return]

    def _step_outside(self, optim: PyroOptim, grads: Sequence[Tensor]) -> None:
        plain = [bucket for bucket in self.buckets if bucket.rule is None]
        params = [param for bucket in plain for param in bucket.params]
        views = [view for bucket, grad in zip(plain, grads, strict=True) for view in bucket.split(grad)]
        for param, view in zip(params, views, strict=True):
            param.grad = view
        optim(params)
        for param in params:
            param.grad = None
