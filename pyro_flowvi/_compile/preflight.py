"""What of a program no graph can hold, found before it is traced by steps of eager Pyro."""

import itertools
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pyro.infer.util import torch_item
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._program.pyro_private import stored_params
from .._types import Program
from .errors import CannotCompile, is_library
from .places import PLAIN
from .reached_state import ReachedState

__all__ = ["TOLERANCES", "EagerStep", "close", "generators"]

TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-3}
"""How far a compiled gradient may be from the eager one, relative to its norm."""
MAX_KEPT = 2**20
"""Larger tensors of the program are not copied: what changes them in place stays eager."""


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


def generators() -> tuple[Any, Any]:
    """The states of Python's and numpy's generators."""
    name, keys, position, *rest = np.random.get_state()
    return random.getstate(), (name, np.asarray(keys).tobytes(), position, *rest)


def _drawing_line(run: Callable[[], Any]) -> str | None:
    state, line, found = generators(), "", ""

    def trace_lines(frame: Any, event: str, arg: Any) -> Any:
        nonlocal line, found
        if found or is_library(frame.f_code.co_filename):
            return None
        if line and generators() != state:
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
        self.reached = ReachedState()

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose buffers a step may change."""
        return self.reached.modules

    def look(self, arguments: list[Any]) -> None:
        """Finds what model, guide, loss and those arguments that are objects reach now."""
        for value in arguments:
            if not isinstance(value, (Tensor, *PLAIN)) and all(value is not old for old in self._objects):
                self._objects.append(value)
        self.reached = ReachedState(self.model, self.guide, self.loss, *self._objects)

    @contextmanager
    def undisturbed(self, *tensors: Tensor) -> Iterator[None]:
        """Gives generators, and values that the program may change, back as they were."""
        # Views of parameters are left to whoever changes the parameters.
        params = [*stored_params().values(), *self._own_parameters()]
        owned = {param.untyped_storage().data_ptr() for param in params}
        reached = (*self.reached.tensors, *tensors)
        found = [value for value in reached if value.untyped_storage().data_ptr() not in owned]
        kept = [(value, value.detach().clone()) for value in found if value.numel() <= MAX_KEPT]
        python, numpy = random.getstate(), np.random.get_state()
        known = self.reached.holds(audit=True)
        with torch.random.fork_rng():
            try:
                yield
            finally:
                random.setstate(python)
                np.random.set_state(numpy)
                if known:
                    self.reached.put_back()
                with torch.no_grad():
                    for value, old in kept:  # compiled code does not count versions
                        if not _same(value, old):
                            value.copy_(old)

    def _own_parameters(self) -> Iterator[Tensor]:
        """Parameters of modules, whether or not the param store has them."""
        return (p for module in self.reached.modules for p in module._parameters.values() if p is not None)

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
        large = [(value, value._version) for value in self.reached.tensors if value.numel() > MAX_KEPT]
        arguments = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        with self.undisturbed(*arguments):
            before = generators()
            loss, grads, sites = self._run_and_keep(args, kwargs)
            if any(value._version != version for value, version in large):
                raise CannotCompile("the program changes a large tensor in place")
            changed = self.reached.settle()
            if changed:
                names = ", ".join(sorted(set(changed))[:3])
                raise CannotCompile(
                    f"the program changes Python values of its own ({names}), as no graph does"
                )
            for name, old, new in zip(_GENERATORS, before, generators(), strict=True):
                if old != new:
                    line = _drawing_line(lambda: self._run_and_keep(args, kwargs))
                    raise CannotCompile(f"the program draws from {name}, which a graph cannot", line)
        buffers = {id(b) for module in self.modules for b in module._buffers.values()}
        again, grads_again, _ = self.run(args, kwargs, 0)
        if not close(loss, again) or grads.keys() != grads_again.keys():
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
        left = {p: p.grad for p in (*stored_params().values(), *self._own_parameters())}
        for param in left:
            param.grad = None
        sites = Sites()
        try:
            with sites, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(seed)
                loss = torch_item(self.loss_and_grads(self.model, self.guide, *args, **kwargs))
            grads = {param: param.grad for param in sites.params.values() if param.grad is not None}
        finally:
            for param in (*left, *sites.params.values()):
                param.grad = left.get(param)
        return loss, grads, sites


def _same(value: Tensor, old: Tensor) -> bool:
    """Whether two tensors are equal, missing entries included: a copy would count as a change of the data."""
    if torch.equal(value, old):
        return True
    return value.is_floating_point() and torch.allclose(value, old, rtol=0.0, atol=0.0, equal_nan=True)


def close(one: float, other: float, dtype: torch.dtype = torch.float64) -> bool:
    """Whether two losses agree to the tolerance of their dtype; NaN equals NaN."""
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return one == other or abs(one - other) <= TOLERANCES.get(dtype, 0.05) * (1.0 + abs(other))
