"""What a program does that a recorded step would not do: found by running it, before it is traced."""

import itertools
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.util import torch_item
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .cause import CannotCompile, is_library
from .compiled_step import CompiledStep
from .fused import flatten
from .reach import PLAIN, Surroundings

__all__ = ["EagerStep"]

TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-3}
"""How far a compiled gradient may be from the eager one, relative to its norm."""
MAX_KEPT = 2**20
"""Larger tensors of the program are not copied: what changes them in place stays eager."""
PERTURBATION = 1e-2
"""Relative change of the parameters under which a new compiled step is compared with eager once more."""

Program = Callable[..., Any]


class Sites(Messenger):
    """Collects the names of sample sites and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: set[str] = set()
        self.params: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        self.samples.add(msg["name"])

    def _pyro_post_param(self, msg: Any) -> None:
        self.params[msg["name"]] = msg["value"].unconstrained()


_GENERATORS = ("Python's random module", "numpy.random")


def _generators() -> tuple[Any, Any]:
    name, keys, position, *rest = np.random.get_state()
    return random.getstate(), (name, np.asarray(keys).tobytes(), position, *rest)


def _drawing_line(run: Callable[[], Any]) -> str | None:
    state, line, found = _generators(), "", ""

    def trace_lines(frame: Any, event: str, arg: Any) -> Any:
        nonlocal line, found
        if found or is_library(frame.f_code.co_filename):
            return None
        if line and _generators() != state:
            found = line
        here = frame.f_back if event == "return" else frame
        if event != "call" and here is not None and not is_library(here.f_code.co_filename):
            line = f"{here.f_code.co_filename}:{here.f_lineno}, in {here.f_code.co_name}"
        return trace_lines

    previous = sys.gettrace()
    sys.settrace(trace_lines)
    try:
        run()
    finally:
        sys.settrace(previous)
    return found or None


def _agree(one: Tensor, other: Tensor, tolerance: float, scale: float = 0.0) -> bool:
    """Whether two tensors agree to a tolerance relative to their norm, plus ``scale``; NaN equals NaN."""
    one, other = one.detach().double(), other.detach().double()
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return False
    one, other = one[finite], other[finite]
    return bool((one - other).norm() <= tolerance * (torch.maximum(one.norm(), other.norm()) + scale))


class EagerStep:
    """The loss and gradients of eager Pyro, against which a compiled step is held.

    :param model: a Pyro model.
    :param guide: a guide.
    :param loss: Pyro's objective.
    :param loss_and_grads: its method, or what ``pyro.infer.SVI`` makes of a function.
    """

    def __init__(self, model: Program, guide: Program, loss: Any, loss_and_grads: Program) -> None:
        self.model, self.guide, self.loss, self.loss_and_grads = model, guide, loss, loss_and_grads
        self._objects: list[Any] = []
        self.surroundings = Surroundings()

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose buffers a step may change."""
        return self.surroundings.modules

    def look(self, arguments: list[Any]) -> None:
        """Finds what model, guide, loss and those arguments that are objects reach now."""
        for value in arguments:
            if not isinstance(value, (Tensor, *PLAIN)) and all(value is not old for old in self._objects):
                self._objects.append(value)
        self.surroundings = Surroundings(self.model, self.guide, self.loss, *self._objects)

    @contextmanager
    def undisturbed(self, *tensors: Tensor) -> Iterator[None]:
        """Gives generators, and tensors that the program may change, back as they were."""
        # Views of parameters are left to whoever changes the parameters.
        params = [*pyro.get_param_store()._params.values(), *self._own_parameters()]
        owned = {param.untyped_storage().data_ptr() for param in params}
        reached = (*self.surroundings.tensors, *tensors)
        found = [value for value in reached if value.untyped_storage().data_ptr() not in owned]
        kept = [(value, value.detach().clone()) for value in found if value.numel() <= MAX_KEPT]
        python, numpy = random.getstate(), np.random.get_state()
        with torch.random.fork_rng():
            try:
                yield
            finally:
                random.setstate(python)
                np.random.set_state(numpy)
                with torch.no_grad():
                    for value, old in kept:  # compiled code does not count versions
                        if not torch.equal(value, old):
                            value.copy_(old)

    def _own_parameters(self) -> Iterator[Tensor]:
        """Parameters of modules, whether or not the param store has them."""
        return (
            p for module in self.surroundings.modules for p in module._parameters.values() if p is not None
        )

    def run(self, args: Any, kwargs: Any, seed: int) -> tuple[float, dict[Tensor, Tensor], Sites]:
        """Loss, gradients by parameter, and the names met; changes nothing."""
        arguments = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        with self.undisturbed(*arguments):
            return self._run_and_keep(args, kwargs, seed)

    def inspect(
        self, args: Any, kwargs: Any, stepped: Callable[[Tensor], bool]
    ) -> tuple[list[Tensor], Sites]:
        """The parameters to step, and the names met.

        :param stepped: whether an optimizer has state for a parameter, and so moves it also where the
            objective does not depend on it.

        :raises CannotCompile: if runs with one seed differ, or draw from a generator that is not torch's, or
            runs with several seeds meet different sites.
        """
        large = [(value, value._version) for value in self.surroundings.tensors if value.numel() > MAX_KEPT]
        arguments = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        with self.undisturbed(*arguments):
            before = _generators()
            loss, grads, sites = self._run_and_keep(args, kwargs)
            if any(value._version != version for value, version in large):
                raise CannotCompile("the program changes a large tensor in place")
            changed = self.surroundings.changes()
            if changed:
                names = ", ".join(sorted(changed)[:3])
                raise CannotCompile(
                    f"the program changes Python values of its own ({names}), as no graph does"
                )
            for name, old, new in zip(_GENERATORS, before, _generators(), strict=True):
                if old != new:
                    line = _drawing_line(lambda: self._run_and_keep(args, kwargs))
                    raise CannotCompile(f"the program draws from {name}, which a graph cannot", line)
        buffers = {id(b) for module in self.modules for b in module._buffers.values()}
        again, grads_again, _ = self.run(args, kwargs, 0)
        if not _close(loss, again) or grads.keys() != grads_again.keys():
            raise CannotCompile(
                "two runs with one seed differ: the program holds state or randomness of its own"
            )
        if buffers != {id(b) for module in self.modules for b in module._buffers.values()}:
            raise CannotCompile("a module replaces its buffers; change them in place")
        for seed in (1, 2):
            _, grads_other, other = self.run(args, kwargs, seed)
            for one, two, kind in (
                (sites.samples, other.samples, "site"),
                (set(sites.params), set(other.params), "parameter"),
            ):
                if one != two:
                    names = ", ".join(sorted(one ^ two))
                    raise CannotCompile(f"the {kind} {names} is met in some runs and not in others")
            if grads.keys() != grads_other.keys():
                raise CannotCompile("parameters have a gradient in some runs and not in others")
        met = [param for _, param in sorted(sites.params.items())]
        params = list(dict.fromkeys(p for p in met if p in grads or (p.requires_grad and stepped(p))))
        if not grads:
            raise CannotCompile("no parameter has a gradient")
        spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in set(met) if p.numel())
        if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
            raise CannotCompile("parameters share memory")
        return params, sites

    def _run_and_keep(
        self, args: Any, kwargs: Any, seed: int = 0
    ) -> tuple[float, dict[Tensor, Tensor], Sites]:
        """As :meth:`run`, but generators and tensors stay as the run leaves them."""
        # Stock SVI leaves zeros in gradients, which are not this run's.
        left = {p: p.grad for p in (*pyro.get_param_store()._params.values(), *self._own_parameters())}
        for param in left:
            param.grad = None
        with Sites() as sites, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            loss = torch_item(self.loss_and_grads(self.model, self.guide, *args, **kwargs))
        grads = {param: param.grad for param in sites.params.values() if param.grad is not None}
        for param in sites.params.values():
            param.grad = left.get(param)
        return loss, grads, sites

    @torch.no_grad()
    def compare(
        self,
        step: CompiledStep,
        args: Any,
        kwargs: Any,
        tensors: Sequence[Tensor],
        seed: int,
        perturbed: bool = False,
    ) -> None:
        """Takes a step with some seed both ways, and undoes it.

        :raises CannotCompile: if losses, gradients or updates differ.
        """
        before = [[value.clone() for value in bucket.state] for bucket in step.buckets]
        limits = None if step.limits is None else step.limits.clone()
        if step.limits is not None:
            step.limits.fill_(math.inf)
        try:
            with self.undisturbed(*tensors):
                if perturbed:
                    torch.manual_seed(seed)
                    for value in (value for bucket in step.buckets for value in bucket.values):
                        value.add_(PERTURBATION * (1 + value.abs()) * torch.randn_like(value))
                start = [[value.clone() for value in bucket.values] for bucket in step.buckets]
                torch.manual_seed(seed)
                stats, *plain = [value.clone() for value in step.run(*tensors)]
                loss = stats[0]
                grads = _gradients(step, before, plain)
                if bool(loss.isfinite()):
                    _check_updates(step, start, before)
                for bucket, values in zip(step.buckets, start, strict=True):
                    for value, old in zip(bucket.values, values, strict=True):
                        value.copy_(old)
            try:
                with torch.enable_grad(), pyro.validation_enabled(False):
                    expected_loss, expected, _ = self.run(args, kwargs, seed)
            except Exception:
                if perturbed:
                    return  # nothing is known where eager Pyro fails as well
                raise
        finally:
            if step.limits is not None and limits is not None:
                step.limits.copy_(limits)
            for bucket, state in zip(step.buckets, before, strict=True):
                for value, old in zip(bucket.state, state, strict=True):
                    value.copy_(old)
        self._check(step, loss.item(), grads, start, expected_loss, expected)

    def _check(
        self,
        step: CompiledStep,
        loss: float,
        grads: dict[Tensor, Tensor],
        start: list[list[Tensor]],
        expected_loss: float,
        expected: dict[Tensor, Tensor],
    ) -> None:
        known = math.isfinite(expected_loss) and all(bool(g.isfinite().all()) for g in expected.values())
        if not known and not (math.isfinite(loss) and math.isfinite(expected_loss)):
            return
        dtype = next(iter(grads)).dtype
        if not _close(loss, expected_loss, dtype):
            raise CannotCompile(
                f"the compiled loss is {loss:.6g} where the eager one is {expected_loss:.6g}: something that "
                "changes between steps is computed by Python"
            )
        rules = {param: bucket.rule for bucket in step.buckets for param in bucket.params}
        values = {
            param: value
            for bucket, olds in zip(step.buckets, start, strict=True)
            for param, value in zip(bucket.params, olds, strict=True)
        }
        wanted = {}
        for param in grads:
            rule, grad = rules[param], expected.get(param, torch.zeros_like(param))
            wanted[param] = grad if rule is None else rule.gradient(values[param], grad)
        # A path gradient at the posterior is rounding alone: hence the least scale.
        scale = 1e-3 * max(1.0, *(float(grad.double().norm()) for grad in wanted.values()))
        for param, grad in grads.items():
            if not _agree(grad, wanted[param], TOLERANCES.get(param.dtype, 0.05), scale):
                name = pyro.get_param_store().param_name(param)
                raise CannotCompile(f"the compiled gradient of {name} differs from the eager one")


def _gradients(step: CompiledStep, before: list[list[Tensor]], plain: list[Tensor]) -> dict[Tensor, Tensor]:
    """The gradients of the step just taken, from the moments or as it gave them."""
    supply = iter(plain)
    grads: dict[Tensor, Tensor] = {}
    for bucket, state in zip(step.buckets, before, strict=True):
        parts = bucket.split(next(supply) if bucket.rule is None else bucket.seen_gradient(state[-4]))
        grads.update(zip(bucket.params, (part.clone() for part in parts), strict=True))
    return grads


def _check_updates(step: CompiledStep, start: list[list[Tensor]], before: list[list[Tensor]]) -> None:
    """Whether the fused optimizers moved the parameters as their rule says."""
    for bucket, values, state in zip(step.buckets, start, before, strict=True):
        if bucket.rule is None:
            continue
        first, second = state[-4:-2]
        flat = flatten(values)
        _, second = bucket.rule.moments(bucket.seen_gradient(first), first, second)
        moved = bucket.rule.move(flat, bucket.first, bucket.second, bucket.steps, bucket.lr, bucket.sizes)
        tolerance = TOLERANCES.get(flat.dtype, 0.05)
        found = flatten(bucket.values) - flat
        good = _agree(moved - flat, found, tolerance, 1e-3 * float(flat.norm()))
        if not (good and _agree(second, bucket.second, tolerance)):
            raise CannotCompile("the compiled optimizer's step differs from the eager one")


def _close(one: float, other: float, dtype: torch.dtype = torch.float64) -> bool:
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return one == other or abs(one - other) <= TOLERANCES.get(dtype, 0.05) * (1.0 + abs(other))
