"""What a program does that a recorded step would not do: found by running it, before it is traced."""

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

from .cause import CannotCompile, is_library
from .compiled_step import CompiledStep
from .reach import Surroundings

__all__ = ["EagerStep"]

TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-3}
"""How far a compiled gradient may be from the eager one, relative to its norm."""
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
    :param loss_and_grads: of a Pyro objective.
    """

    def __init__(self, model: Program, guide: Program, loss_and_grads: Program) -> None:
        self.model, self.guide, self.loss_and_grads = model, guide, loss_and_grads
        self.surroundings = Surroundings()

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose buffers a step may change."""
        return self.surroundings.modules

    def look(self) -> None:
        """Finds what model and guide reach now."""
        self.surroundings = Surroundings(self.model, self.guide)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Gives generators and buffers back as they were."""
        buffers = [
            (buffer, buffer.clone())
            for module in self.modules
            for buffer in module._buffers.values()
            if buffer is not None
        ]
        python, numpy = random.getstate(), np.random.get_state()
        with torch.random.fork_rng():
            try:
                yield
            finally:
                random.setstate(python)
                np.random.set_state(numpy)
                with torch.no_grad():
                    for buffer, value in buffers:
                        buffer.copy_(value)

    def run(self, args: Any, kwargs: Any, seed: int) -> tuple[float, dict[Tensor, Tensor], Sites]:
        """Loss, gradients by parameter, and the names met; changes nothing."""
        with self.undisturbed(), Sites() as sites, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            loss = torch_item(self.loss_and_grads(self.model, self.guide, *args, **kwargs))
        grads = {param: param.grad for param in sites.params.values() if param.grad is not None}
        for param in grads:
            param.grad = None
        return loss, grads, sites

    def inspect(self, args: Any, kwargs: Any) -> list[Tensor]:
        """The parameters that the objective depends on.

        :raises CannotCompile: if runs with one seed differ, or draw from a generator that is not torch's, or
            runs with several seeds meet different sites.
        """
        with self.undisturbed():
            before = _generators()
            loss, grads, sites = self._run_and_keep(args, kwargs)
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
        params = [param for _, param in sorted(sites.params.items()) if param in grads]
        if not params:
            raise CannotCompile("no parameter has a gradient")
        return list(dict.fromkeys(params))

    def _run_and_keep(self, args: Any, kwargs: Any) -> tuple[float, dict[Tensor, Tensor], Sites]:
        """As :meth:`run`, but the generators stay where the run leaves them."""
        with Sites() as sites, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            loss = torch_item(self.loss_and_grads(self.model, self.guide, *args, **kwargs))
        grads = {param: param.grad for param in sites.params.values() if param.grad is not None}
        for param in grads:
            param.grad = None
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
        try:
            with self.undisturbed():
                if perturbed:
                    torch.manual_seed(seed)
                    for bucket in step.buckets:
                        bucket.flat.add_(
                            PERTURBATION * torch.randn_like(bucket.flat) * (1 + bucket.flat.abs())
                        )
                start = [bucket.flat.clone() for bucket in step.buckets]
                torch.manual_seed(seed)
                loss, *plain = [value.clone() for value in step.run(*tensors)]
                grads = _gradients(step, before, plain)
                if bool(loss.isfinite()):
                    _check_updates(step, start, before)
                for bucket, value in zip(step.buckets, start, strict=True):
                    bucket.flat.copy_(value)
            try:
                with torch.enable_grad(), pyro.validation_enabled(False):
                    expected_loss, expected, _ = self.run(args, kwargs, seed)
            except Exception:
                if perturbed:
                    return  # nothing is known where eager Pyro fails as well
                raise
        finally:
            for bucket, state in zip(step.buckets, before, strict=True):
                for value, old in zip(bucket.state, state, strict=True):
                    value.copy_(old)
        self._check(step, loss.item(), grads, start, expected_loss, expected)

    def _check(
        self,
        step: CompiledStep,
        loss: float,
        grads: dict[Tensor, Tensor],
        start: list[Tensor],
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
            for bucket, flat in zip(step.buckets, start, strict=True)
            for param, value in zip(bucket.params, bucket.split(flat), strict=True)
        }
        wanted = {}
        for param in grads:
            rule, grad = rules[param], expected.get(param, torch.zeros_like(param))
            wanted[param] = grad if rule is None else rule.gradient(values[param], grad)
        scale = 1e-3 * max(float(grad.double().norm()) for grad in wanted.values())
        for param, grad in grads.items():
            if not _agree(grad, wanted[param], TOLERANCES.get(param.dtype, 0.05), scale):
                name = pyro.get_param_store().param_name(param)
                raise CannotCompile(f"the compiled gradient of {name} differs from the eager one")


def _gradients(step: CompiledStep, before: list[list[Tensor]], plain: list[Tensor]) -> dict[Tensor, Tensor]:
    """The gradients of the step just taken, from the moments or as it gave them."""
    supply = iter(plain)
    grads: dict[Tensor, Tensor] = {}
    for bucket, state in zip(step.buckets, before, strict=True):
        parts = bucket.split(next(supply) if bucket.rule is None else bucket.seen_gradient(state[1]))
        grads.update(zip(bucket.params, (part.clone() for part in parts), strict=True))
    return grads


def _check_updates(step: CompiledStep, start: list[Tensor], before: list[list[Tensor]]) -> None:
    """Whether the fused optimizers moved the parameters as their rule says."""
    for bucket, flat, state in zip(step.buckets, start, before, strict=True):
        if bucket.rule is None:
            continue
        _, second = bucket.rule.moments(bucket.seen_gradient(state[1]), state[1], state[2])
        moved = bucket.rule.move(flat, bucket.first, bucket.second, bucket.steps, bucket.lr)
        tolerance = TOLERANCES.get(flat.dtype, 0.05)
        good = _agree(moved - flat, bucket.flat - flat, tolerance, 1e-3 * float(flat.norm()))
        if not (good and _agree(second, bucket.second, tolerance)):
            raise CannotCompile("the compiled optimizer's step differs from the eager one")


def _close(one: float, other: float, dtype: torch.dtype = torch.float64) -> bool:
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return one == other or abs(one - other) <= TOLERANCES.get(dtype, 0.05) * (1.0 + abs(other))
