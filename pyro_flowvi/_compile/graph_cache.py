"""The graphs of one SVI: which of them serves a call, whether it still fits, when another is built."""

import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor
from torch.utils import _pytree as pytree

from .._program.pyro_private import PYRO_STACK, stored_params
from .eager_check import compare
from .errors import CannotCompile, CompileWarning, brief, user_line, users_level
from .inductor import warm_up
from .optimizers import FlatParameters, inner_optimizer, make_buckets, meet
from .policy import Mode, Policy
from .preflight import EagerStep
from .reached_state import kind_of
from .step import Average, CompiledStep
from .tensor_objectives import Objective, tensor_loss

__all__ = ["GraphCache"]

MAX_GRAPHS = 8
"""Compiled steps that one object makes: one for each combination of shapes and other arguments."""
MAX_SHORT_LIVED = 3
"""Graphs in succession that served one step, or none, before what the program reaches was another."""


class _Call(NamedTuple):
    """The arguments of a step."""

    key: tuple[Any, Any, Any]
    """What a graph depends on: structure, kinds of the leaves, modes of the modules."""
    tensors: list[Tensor]
    rebuild: Callable[[Sequence[Tensor]], Any]
    """From tensors to ``(args, kwargs)``."""

    @property
    def shapes(self) -> tuple[Any, Any]:
        """The key without the modes."""
        return self.key[:2]


@dataclass
class _Count:
    """How often one combination of shapes was asked for without a graph, and the size of its graph."""

    calls: int = 0
    size: int = 0


class _Bindings:
    """Parameters and optimizers that the graphs hold by reference.

    :param optim: Pyro's optimizer.
    :param params: the parameters that are stepped.
    :param fuse: whether optimizers may become part of the graphs.
    """

    def __init__(self, optim: PyroOptim, params: list[Tensor], fuse: bool) -> None:
        meet(optim, params)
        self.buckets: list[FlatParameters] = make_buckets(params, optim, fuse)
        self._optimizers = {param: optim.optim_objs[param] for param in params}
        self._stored: dict[str, Tensor] = {}
        self._trained: dict[Tensor, bool] = {}

    def watch(self, met: list[Tensor]) -> None:
        """Has :meth:`hold` look at these parameters too, of which some may be frozen."""
        for param in met:
            self._trained[param] = param.requires_grad
            name = pyro.get_param_store().param_name(param)
            if name is not None:
                self._stored[name] = param

    def are_of(self, params: list[Tensor]) -> bool:
        """Whether these are the parameters that are stepped."""
        return self._optimizers.keys() == set(params)

    def hold(self, optim: PyroOptim) -> bool:
        """Whether parameters and optimizers are still the same objects, in the same memory."""
        known, optimizers = stored_params(), optim.optim_objs
        for name, param in self._stored.items():  # written for speed: every step asks
            if known.get(name) is not param:
                return False
        for param, trained in self._trained.items():
            if param.requires_grad != trained:
                return False
        for param, optimizer in self._optimizers.items():
            if optimizers.get(param) is not optimizer:
                return False
        return all(bucket.in_place() for bucket in self.buckets)

    def follow_rules(self) -> bool:
        """Whether the optimizers' hyperparameters are still those in the graphs."""
        return all(bucket.follows_rule() for bucket in self.buckets)

    def take_over(self) -> bool:
        """Takes over moments and rates that were changed from outside; False where the buckets cannot."""
        if all(bucket.intact() for bucket in self.buckets):
            return True
        for bucket in self.buckets:
            bucket.adopt()
        # Other learning rates, other hyperparameters: other buckets.
        return all(bucket.intact() and bucket.follows_rule() for bucket in self.buckets)


def _traceable(loss: Any) -> Objective:
    objective = tensor_loss(loss)
    if objective is None:
        raise CannotCompile(f"the objective {type(loss).__name__} has no form that can be traced")
    return objective


class GraphCache:
    """The compiled steps of one SVI by what they depend on, and why one no longer holds.

    Model, guide and optimizer are read from the SVI at every call, since users may replace them; it is not
    kept, so that a guide lives no longer than its SVI.

    :param svi: the SVI.
    :param loss: its objective.
    :param policy: when to trace and to compile; None is never.
    :param strict: raises where a step cannot be compiled, instead of giving up with a warning.
    :param limits: as for :meth:`CompiledStep.lower`.
    :param average: as there.
    :raises CannotCompile: if it is strict, and the objective is not supported.
    """

    def __init__(
        self,
        svi: SVI,
        loss: Any,
        policy: Policy | None,
        *,
        strict: bool,
        limits: Tensor | None,
        average: Average | None = None,
    ) -> None:
        self.policy, self.strict, self._limits, self._average = policy, strict, limits, average
        self.cause: CannotCompile | None = None
        """Why there will be no more graphs."""
        self.steps: dict[Any, CompiledStep] = {}
        self.num_built = 0
        self._traced: dict[Any, tuple[CompiledStep, list[Tensor]]] = {}
        """Steps that were not worth compiling so far, with the parameters that they met."""
        self._counts: dict[Any, _Count] = {}
        self._eager = EagerStep(svi.model, svi.guide, loss, svi.loss_and_grads)
        self._bindings: _Bindings | None = None
        self._fuse = True
        self._last: Any = None
        self._short_lived = 0
        if strict:
            _traceable(loss)

    @property
    def mode(self) -> Mode | None:
        """How steps run; None before the first call of :meth:`find` that could decide."""
        for step in self.steps.values():
            return "machine code" if step.machine_code else "interpreted"
        return "eager" if self.policy is None or self.cause is not None or self._counts else None

    def find(
        self, svi: SVI, args: Any, kwargs: Any, left: int | None
    ) -> tuple[CompiledStep | None, list[Tensor]]:
        """The step that serves a call, with its inputs; None where the call is for eager Pyro.

        :param left: how many steps are to come, this one included, where that is known.
        :raises CannotCompile: if the cache is strict, and the step cannot be compiled.
        """
        policy = self.policy
        if policy is None or self.cause is not None:
            return None, []
        try:
            if PYRO_STACK or torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled():
                return None, []  # what a handler or a mode does to the step is for eager Pyro to say
            call = self._describe(args, kwargs)
            step = self.steps.get(call.key)
            audit = step is not None and step.calls + 1 >= step.next_audit
            if step is not None and not self._fits(svi, step, call.tensors, audit):
                self.steps.pop(call.key, None)
                self._counts[call.shapes].calls, step = 0, None
            if step is None:
                if self._pays(policy, call, left):
                    step = self._build(svi, policy, args, kwargs, left)
                if step is None:
                    return None, []
            elif audit or step.is_new_to(call.tensors):
                compare(self._eager, step, args, kwargs, call.tensors, seed=step.next_audit)
                step.next_audit *= 10 if audit else 1
        except CannotCompile as cause:
            self.give_up(cause)
            return None, []
        return step, call.tensors

    def _describe(self, args: Any, kwargs: Any) -> _Call:
        training = (module.training for module in self._eager.modules)
        state = (torch.get_default_dtype(), *training)
        if self._last is not None and not kwargs:
            last_args, last_kinds, last_state, call = self._last
            same = len(args) == len(last_args) and all(a is b for a, b in zip(args, last_args, strict=True))
            if same and state == last_state and [kind_of(arg) for arg in args] == last_kinds:
                return call  # type: ignore[no-any-return]
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if any(t.requires_grad or t.layout != torch.strided or t.is_complex() for t in tensors):
            raise CannotCompile("an argument requires a gradient, is sparse or is complex")
        kinds = tuple(
            (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
            if isinstance(leaf, Tensor)
            else (type(leaf), leaf)
            for leaf in leaves
        )
        key = (str(structure), kinds, state)
        try:
            hash(key)
        except TypeError:
            kind = next(type(x).__name__ for x in leaves if not isinstance(x, Tensor) and x.__hash__ is None)
            raise CannotCompile(
                f"an argument is a {kind}, whose contents the graph would hold; pass tensors"
            ) from None
        is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]

        def rebuild(inputs: Sequence[Tensor]) -> Any:
            supply = iter(inputs)
            full = [next(supply) if varies else leaf for varies, leaf in zip(is_tensor, leaves, strict=True)]
            return pytree.tree_unflatten(full, structure)

        call = _Call(key, tensors, rebuild)
        if all(isinstance(arg, Tensor) for arg in args) and not kwargs:
            self._last = args, [kind_of(arg) for arg in args], state, call
        return call

    def _fits(self, svi: SVI, step: CompiledStep, tensors: list[Tensor], audit: bool) -> bool:
        """Whether a step still fits the state around it; takes over moments that were replaced."""
        bindings, eager = self._bindings, self._eager
        same = svi.model is eager.model and svi.guide is eager.guide
        if same and not eager.reached.holds(audit):
            self._note_changes(step)
            self._forget()
            return False
        if bindings is None or not (same and bindings.hold(svi.optim)):
            self._forget()
            return False
        if not bindings.follow_rules():
            # They may change at every step, as a one-cycle schedule has it: the optimizer stays outside.
            self._fuse = False
            self._forget()
            return False
        if not bindings.take_over():
            self._forget()
            return False
        return step.holds(tensors)

    def _note_changes(self, step: CompiledStep) -> None:
        """Refuses a program whose state changes so often that its graphs serve next to no step."""
        self._short_lived = self._short_lived + 1 if step.calls <= 1 else 0
        if self._short_lived >= MAX_SHORT_LIVED:
            names = ", ".join(sorted(set(self._eager.reached.changes()))[:3]) or "the memory of tensors"
            raise CannotCompile(
                f"what model and guide reach changes at every step ({names}), and each time it is traced anew"
            )

    def _pays(self, policy: Policy, call: _Call, left: int | None) -> bool:
        """Whether to trace; counts the call."""
        if self.num_built >= MAX_GRAPHS:
            raise CannotCompile(
                f"more than {MAX_GRAPHS} graphs are needed: shapes, values of arguments that are not "
                "tensors, or tensors that the model reads change too often; pass tensors of few shapes"
            )
        count = self._counts.setdefault(call.shapes, _Count())
        count.calls += 1
        return policy.traces(count.calls, left, count.size)

    def _build(
        self, svi: SVI, policy: Policy, args: Any, kwargs: Any, left: int | None
    ) -> CompiledStep | None:
        """As :meth:`_make`, which whatever it raises leaves nothing behind."""
        stored = set(stored_params())
        try:
            return self._make(svi, policy, args, kwargs, left)
        except Exception as error:
            for name in stored_params().keys() - stored:
                del pyro.get_param_store()[name]
            if isinstance(error, CannotCompile):
                raise
            line = user_line(traceback.extract_tb(error.__traceback__))
            raise CannotCompile(f"a trial of the eager step failed with {brief(error)}", line) from error

    def _make(
        self, svi: SVI, policy: Policy, args: Any, kwargs: Any, left: int | None
    ) -> CompiledStep | None:
        """Inspects, traces and lowers a step, and compares it; None if its graph is not worth that."""
        objective = _traceable(self._eager.loss)
        warm_up()
        if not self._eager.reached.holds():
            self._forget()
        self._eager.model, self._eager.guide = svi.model, svi.guide
        self._eager.look(pytree.tree_leaves((args, kwargs)))
        self._last = None
        call = self._describe(args, kwargs)
        if call.key not in self._traced:
            self._traced[call.key] = self._trace(svi, objective, call, args, kwargs)
        step, met = self._traced[call.key]
        count = self._counts[call.shapes]
        count.size = step.traced.size
        mode = policy.mode(count.calls, left, count.size)
        if mode == "eager":
            return None
        bindings = self._bind(svi.optim, step.params)
        bindings.watch(met)
        self._eager.reached.leave(step.params)
        self.num_built += 1
        step.lower(bindings.buckets, call.tensors, self._limits, mode == "machine code", self._average)
        for seed, perturbed in ((1, False), (2, True)):
            compare(self._eager, step, args, kwargs, call.tensors, seed, perturbed)
        self.steps[call.key], _ = self._traced.pop(call.key)
        return step

    def _trace(
        self, svi: SVI, objective: Objective, call: _Call, args: Any, kwargs: Any
    ) -> tuple[CompiledStep, list[Tensor]]:
        """A step that is traced, and the parameters that it met."""

        def has_state(param: Tensor) -> bool:
            optimizer = svi.optim.optim_objs.get(param)
            return optimizer is not None and bool(inner_optimizer(optimizer).state.get(param))

        params, sites = self._eager.inspect(args, kwargs, has_state)
        advance = getattr(self._eager.loss, "advance", None)
        with self._eager.undisturbed(*call.tensors):
            step = CompiledStep(objective, svi.model, svi.guide, params, call.tensors, call.rebuild, advance)
        return step, list(sites.params.values())

    def _bind(self, optim: PyroOptim, params: list[Tensor]) -> _Bindings:
        """The bindings, made anew where those that exist are not to these parameters and optimizers."""
        if self._bindings is None or not (self._bindings.are_of(params) and self._bindings.hold(optim)):
            self.steps.clear()
            self._bindings = _Bindings(optim, params, self._fuse)
        return self._bindings

    def _forget(self) -> None:
        self.steps, self._traced, self._bindings = {}, {}, None

    def give_up(self, cause: CannotCompile) -> None:
        """Leaves all further steps to eager Pyro, with a warning, or raises if the cache is strict."""
        if self.strict:
            raise cause
        self.cause = cause
        self._forget()
        warnings.warn(f"CompiledSVI runs eagerly: {cause}", CompileWarning, stacklevel=users_level())
