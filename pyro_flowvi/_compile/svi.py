"""CompiledSVI: Pyro's SVI with the gradient step traced once and run as machine code."""

import math
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

from .._checks import check_positive_int
from .._program.pyro_private import PYRO_STACK, stored_params
from .._types import Program
from .eager_check import compare
from .errors import CannotCompile, CompileWarning, is_library
from .inductor import warm_up
from .optimizers import FlatParameters, TorchOptim, inner_optimizer, make_buckets, meet
from .preflight import EagerStep
from .reached_state import kind_of
from .step import CompiledStep
from .tensor_objectives import tensor_loss
from .trace import UNSUPPORTED_TORCH

__all__ = ["CompiledSVI"]

STEPS_BEFORE = 200
"""Calls of ``step`` with the same shapes that "auto" runs eagerly first."""
PAYS_AT_LEAST = 1500
"""Steps that "auto" wants, one more for each operation of the graph, before :meth:`run` compiles."""
INTERPRETED_FROM = 300
"""Steps from which :func:`pyro_flowvi.fit` traces at all."""
MACHINE_CODE_FROM = 10_000
"""Steps, and ten more for each operation of the graph, from which it compiles: below that the seconds of
the compiler, 10 to 60 of them where its cache is cold, are more than those it saves."""
MAX_GRAPHS = 8
"""Compiled steps that one object makes: one for each combination of shapes and other arguments."""
MAX_OPERATIONS = 20_000
"""Larger graphs would be compiled for many minutes; "auto" leaves them eager."""


class CompiledSVI(SVI):
    """``pyro.infer.SVI`` whose step runs as machine code: model, guide, gradient and optimizer in one.

    The loss and its gradient are traced once into a graph, to which Adam, AdamW or ClippedAdam are added;
    Inductor compiles it.  Parameters stay those of the modules and of the param store at every moment, and
    random numbers follow ``pyro.set_rng_seed`` and are those of eager Pyro.  Before it is used, and at its
    10th, 100th, ... call, a compiled step is compared with the eager one; what cannot be compiled runs
    eagerly, after one :class:`CompileWarning` that names the cause.

    A graph holds what Python did while it was traced.  Pass what changes between steps as tensor arguments:
    a new shape, or a new value of an argument that is not a tensor, is a new graph, of which eight
    are kept.

    :param model: a Pyro model.
    :param guide: any Pyro guide for it.
    :param optim: a ``pyro.optim`` optimizer, a ``torch.optim`` class, or an optimizer of that kind over the
        parameters.  Adam, AdamW and ClippedAdam are compiled, the others run between compiled gradients.
    :param loss: ``Trace_ELBO``, ``TraceMeanField_ELBO``, ``TraceEnum_ELBO`` or ``RenyiELBO``, an objective
        of this package, or a function that returns a differentiable loss; any other runs eagerly.
    :param compile: True compiles after the first step, and raises where that fails; "auto" compiles where
        it pays, judged by counts alone: in :meth:`run` by the number of steps and the size of the graph, in
        :meth:`step` after 200 calls; False never does.
    :raises ValueError: if an argument is not of the described kind.
    :raises CannotCompile: with ``compile=True``, for an objective or a version of torch that is not
        supported.

    Example::

        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
        >>> losses = svi.run(300, torch.tensor([2.0, 3.0, 4.0]), progress=False)
        >>> losses.shape, abs(guide.median()["mu"].item() - 3.0) < 0.5
        (torch.Size([300]), True)
    """

    def __init__(
        self, model: Program, guide: Program, optim: Any, loss: Any = None, *, compile: bool | str = "auto"
    ) -> None:
        for name, value in (("model", model), ("guide", guide)):
            if not callable(value):
                raise ValueError(f"{name}: expected a callable, got {value!r}")
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile: expected True, False or 'auto', got {compile!r}")
        if isinstance(optim, type) and issubclass(optim, torch.optim.Optimizer):
            optim = PyroOptim(optim, {})
        elif isinstance(optim, torch.optim.Optimizer):
            optim = TorchOptim(optim)
        if not isinstance(optim, PyroOptim):
            raise ValueError(f"optim: expected an optimizer of pyro.optim or torch.optim, got {optim!r}")
        loss = Trace_ELBO() if loss is None else loss
        if not callable(loss):
            raise ValueError(f"loss: expected a pyro.infer.ELBO or a function, got {loss!r}")
        super().__init__(model, guide, optim, loss)
        self.compile = compile
        self.cause: CannotCompile | None = None
        """Why all steps are eager; None while they are compiled or may be."""
        self._limits: Tensor | None = None
        self._mode: str | None = None
        """Settles how steps run, where an earlier process has begun: "interpreted" or "machine code"."""
        self._interprets = False
        """Whether a graph that is not worth compiling is used as it is, operation by operation."""
        self._fuse = True
        self._objective = tensor_loss(loss)
        self._advance: Callable[[], None] | None = getattr(loss, "advance", None)
        self._eager = EagerStep(model, guide, loss, self.loss_and_grads)
        self._started = False
        self._steps: dict[Any, CompiledStep] = {}
        self._traced: dict[Any, CompiledStep] = {}
        self._eager_calls: dict[Any, int] = {}
        self._sizes: dict[Any, int] = {}
        self._builds = 0
        self._buckets: list[FlatParameters] = []
        self._met: list[Tensor] = []
        self._stored: list[tuple[str, Tensor]] = []
        self._trained: list[tuple[Tensor, bool]] = []
        self._optimizers: list[tuple[Tensor, Any]] = []
        self._last: Any = None
        self._obstacle = UNSUPPORTED_TORCH
        if self._objective is None and self._obstacle is None:
            self._obstacle = f"the objective {type(loss).__name__} has no form that can be traced"
        if self._obstacle and compile is True:
            raise CannotCompile(self._obstacle)

    @property
    def compiled(self) -> bool:
        """Whether a step has been traced and is in use."""
        return bool(self._steps)

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Takes one gradient step.

        :param args: the model's and guide's positional arguments; tensors may be nested in tuples, lists and
            dicts.
        :param kwargs: their keyword arguments.
        :return: the loss, as Pyro's SVI reports it.
        :raises CannotCompile: with ``compile=True``, where the step cannot be compiled.
        """
        return self._take_many(args, kwargs, 1, None)[0][0]

    def _take_many(self, args: Any, kwargs: Any, count: int, left: int | None) -> list[list[float]]:
        """Takes up to ``count`` of ``left`` steps that are to come; stops after a loss that is not finite.

        :return: loss, dropped particles and norm of the gradient of each.
        """
        step, tensors = self._prepare(args, kwargs, left)
        if step is None:
            return [[self._step_eagerly(args, kwargs, left), math.nan, math.nan]]
        count = max(1, min(count, step.next_audit - step.calls - 1))
        return self._run_traced(step, tensors, count, to_the_end=False)

    def run(self, num_steps: int, *args: Any, progress: bool = True, **kwargs: Any) -> Tensor:
        """Takes many steps on the same arguments.

        A learning-rate schedule advances where its own ``step`` is called: between runs.

        :param num_steps: how many.
        :param args: as for :meth:`step`.
        :param progress: shows a progress bar.
        :param kwargs: as for :meth:`step`.
        :return: the losses, shape ``(num_steps,)``, on the parameters' device.
        :raises ValueError: if ``num_steps`` is not a positive integer.
        :raises CannotCompile: as :meth:`step`.
        """
        check_positive_int("num_steps", num_steps)
        losses: list[Any] = []
        with tqdm(total=num_steps, disable=not progress, desc=type(self.guide).__name__) as bar:
            while len(losses) < num_steps:
                left = num_steps - len(losses)
                step, tensors = self._prepare(args, kwargs, left)
                if step is None:
                    losses.append(self._step_eagerly(args, kwargs, left))
                    bar.update()
                    continue
                chunk = min(left, max(1, num_steps // 100), max(1, step.next_audit - step.calls - 1))
                losses.extend(stats[0] for stats in self._run_traced(step, tensors, chunk))
                bar.update(chunk)
                if isinstance(losses[-1], float):
                    bar.set_postfix_str(f"loss {losses[-1]:.4g}", refresh=False)
        if any(isinstance(loss, Tensor) for loss in losses):
            device = next(loss.device for loss in losses if isinstance(loss, Tensor))
            return torch.stack([torch.as_tensor(loss, device=device) for loss in losses])
        return torch.tensor(losses)

    def _run_traced(
        self, step: CompiledStep, tensors: list[Tensor], count: int, to_the_end: bool = True
    ) -> list[Any]:
        """Takes steps; loss, dropped particles and norm of the gradient of each."""
        found: list[Any] = []
        try:
            for _ in range(count):
                stats = step(self.optim, tensors)
                found.append(stats.tolist() if stats.is_cpu or not to_the_end else stats.clone())
                if self._advance is not None:
                    self._advance()
                if not (to_the_end or math.isfinite(found[-1][0])):
                    break
        finally:
            for bucket in self._buckets:
                bucket.write()
        return found

    def _step_eagerly(self, args: Any, kwargs: Any, left: int | None = None) -> float:
        loss: float = super().step(*args, **kwargs)
        first, self._started = not self._started, True
        if first and self.compile is True:
            self._prepare(args, kwargs, left)  # so that what cannot be compiled is known after one step
        return loss

    # What follows finds the compiled step that serves a call.

    def _describe(self, args: Any, kwargs: Any) -> tuple[Any, list[Tensor], Program]:
        """What a graph depends on in a call; its tensors; a function from tensors to ``(args, kwargs)``."""
        training = (module.training for module in self._eager.modules)
        state = (torch.get_default_dtype(), *training)
        if self._last is not None and not kwargs:
            last_args, last_kinds, last_state, described = self._last
            same = len(args) == len(last_args) and all(a is b for a, b in zip(args, last_args, strict=True))
            if same and state == last_state and [kind_of(arg) for arg in args] == last_kinds:
                return described  # type: ignore[no-any-return]
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

        described = key, tensors, rebuild
        if all(isinstance(arg, Tensor) for arg in args) and not kwargs:
            self._last = args, [kind_of(arg) for arg in args], state, described
        return described

    def _prepare(
        self, args: Any, kwargs: Any, left: int | None = None
    ) -> tuple[CompiledStep | None, list[Tensor]]:
        """The compiled step for a call with its inputs; None where the step is to be eager."""
        if self.cause is not None or not self.compile or not self._started:
            return None, []  # the first step is eager: it makes the parameters, with validation
        try:
            if PYRO_STACK or torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled():
                return None, []  # what a handler or a mode does to the step is for eager Pyro to say
            key, tensors, _ = self._describe(args, kwargs)
            step = self._steps.get(key)
            if step is not None and not self._is_valid(step, tensors):
                self._steps.pop(key, None)
                self._eager_calls[key[:2]], step = 0, None
            if step is None:
                step = self._build(args, kwargs, left) if self._pays(key, left) else None
                if step is None:
                    return None, []
            elif step.calls + 1 >= step.next_audit or step.is_new_to(tensors):
                compare(self._eager, step, args, kwargs, tensors, seed=step.next_audit)
                step.next_audit *= 10 if step.calls + 1 >= step.next_audit else 1
        except CannotCompile as cause:
            self._give_up(cause)
            return None, []
        return step, tensors

    def _is_valid(self, step: CompiledStep, tensors: list[Tensor]) -> bool:
        """Whether a step still fits the state around it; takes over moments that were replaced."""
        if not (self._eager.reached.holds() and self._holds_parameters()):
            self._forget()
        elif not all(bucket.follows_rule() for bucket in self._buckets):
            # They may change at every step, as a one-cycle schedule has it: the optimizer stays outside.
            self._fuse = False
            self._forget()
        elif not all(bucket.intact() for bucket in self._buckets):
            for bucket in self._buckets:
                bucket.adopt()
            if not all(bucket.intact() and bucket.follows_rule() for bucket in self._buckets):
                # Other learning rates, other hyperparameters: other buckets.
                self._forget()
        return bool(self._buckets) and step.holds(tensors)

    def _holds_parameters(self) -> bool:
        """Whether model, guide, optimizers and parameters are still those that were compiled."""
        known, optimizers = stored_params(), self.optim.optim_objs
        return (
            self.model is self._eager.model
            and self.guide is self._eager.guide
            and all(known.get(name) is param for name, param in self._stored)
            and all(param.requires_grad == trained for param, trained in self._trained)
            and all(optimizers.get(param) is optimizer for param, optimizer in self._optimizers)
            and all(bucket.in_place() for bucket in self._buckets)
        )

    def _has_state(self, param: Tensor) -> bool:
        optimizer = self.optim.optim_objs.get(param)
        return optimizer is not None and bool(inner_optimizer(optimizer).state.get(param))

    def _forget(self) -> None:
        self._steps, self._traced, self._buckets = {}, {}, []

    def _pays(self, key: Any, left: int | None) -> bool:
        """Whether to compile, by counts alone."""
        if self._builds >= MAX_GRAPHS:
            self._give_up(
                CannotCompile(
                    f"more than {MAX_GRAPHS} graphs are needed: shapes, values of arguments that are not "
                    "tensors, or tensors that the model reads change too often; pass tensors of few shapes"
                )
            )
            return False
        if self.compile is True:
            return True
        calls = self._eager_calls[key[:2]] = self._eager_calls.get(key[:2], 0) + 1
        if self._mode is not None:
            return True
        if self._interprets:
            return calls + (left or 0) > INTERPRETED_FROM
        if self._sizes.get(key[:2], 0) > MAX_OPERATIONS:
            return False
        if left is None:
            return calls > STEPS_BEFORE
        return calls + left > PAYS_AT_LEAST + self._sizes.get(key[:2], 0)

    def _build(self, args: Any, kwargs: Any, left: int | None) -> CompiledStep | None:
        """Inspects, traces and compiles; None if "auto" finds the graph too large."""
        if self._obstacle or self._objective is None:
            raise CannotCompile(str(self._obstacle))
        warm_up()
        if not self._eager.reached.holds():
            self._forget()
        self._eager.model, self._eager.guide = self.model, self.guide
        self._eager.look(pytree.tree_leaves((args, kwargs)))
        self._last = None
        key, tensors, rebuild = self._describe(args, kwargs)
        step = self._traced.get(key)
        if step is None:
            params, sites = self._eager.inspect(args, kwargs, self._has_state)
            self._met = list(sites.params.values())
            with self._eager.undisturbed(*tensors):
                step = CompiledStep(self._objective, self.model, self.guide, params, tensors, rebuild)
            self._traced[key] = step
        machine_code = True
        if self._mode is not None:
            machine_code = self._mode == "machine code"
        elif self._interprets and self.compile == "auto":
            coming = self._eager_calls[key[:2]] + (left or 0)
            machine_code = MACHINE_CODE_FROM + 10 * step.traced.size < coming
        elif self.compile == "auto":
            self._sizes[key[:2]] = step.traced.size
            coming = self._eager_calls[key[:2]] + (left or 0)
            too_few = left is not None and coming <= PAYS_AT_LEAST + step.traced.size
            if too_few or step.traced.size > MAX_OPERATIONS:
                return None
        if {p for bucket in self._buckets for p in bucket.params} != set(step.params):
            self._steps.clear()
            meet(self.optim, step.params)
            self._buckets = make_buckets(step.params, self.optim, self._fuse)
            self._optimizers = [(param, self.optim.optim_objs[param]) for param in step.params]
        named = [(pyro.get_param_store().param_name(param), param) for param in self._met]
        self._stored = [(name, param) for name, param in named if name is not None]
        self._trained = [(param, param.requires_grad) for param in self._met]
        self._builds += 1
        step.lower(self._buckets, tensors, self._limits, machine_code)
        for seed, perturbed in ((1, False), (2, True)):
            compare(self._eager, step, args, kwargs, tensors, seed, perturbed)
        self._steps[key] = self._traced.pop(key)
        return step

    def _give_up(self, cause: CannotCompile) -> None:
        if self.compile is True:
            raise cause
        self.cause = cause
        self._forget()
        frames = enumerate(traceback.walk_stack(sys._getframe()), 1)
        level = next((i for i, (frame, _) in frames if not is_library(frame.f_code.co_filename)), 1)
        warnings.warn(f"CompiledSVI runs eagerly: {cause}", CompileWarning, stacklevel=level)
