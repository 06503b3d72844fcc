"""An optimizer that leaves out steps whose gradient is not finite or far too large."""

import math
import warnings
from collections import deque
from collections.abc import Iterable
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from .._compile.optimizers import inner_optimizer
from .._program.pyro_private import stored_params

__all__ = ["GuardedOptim", "NotFinite"]

_ZERO_IS_FRESH = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, ClippedAdam)
"""Optimizers whose fresh state is zeros: set in place, since compiled steps hold views of it."""
CLIP, SKIP = 5.0, 20.0
"""Multiples of the running median of gradient norms: above the first a gradient is scaled down, above the
second the step is left out."""
NORMS = 100
"""Gradient norms in the running median."""


class NotFinite(Exception):
    """A gradient is not finite; raised before any parameter moves."""


class GuardedOptim(PyroOptim):
    """Passes steps on to an optimizer, but for gradients that are not finite or far too large.

    A gradient whose norm is above the first of ``limits`` is scaled down to it; above the second the step
    is left out; one that is not finite raises :class:`NotFinite`.  Keeps every parameter that it has met, by
    name, and the value at which it met it.  For the rest it is the optimizer that it guards.
    """

    def __init__(self, optim: PyroOptim, *programs: Any) -> None:
        self.optim = optim
        self.params: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}
        self.limits = torch.full((2,), math.inf, dtype=torch.float64)
        self.norm = math.nan
        """Of the last gradient that came this way."""
        self.norms: deque[float] = deque(maxlen=NORMS)
        """Of the last gradients, however their steps were taken."""
        self._modules = [program for program in programs if isinstance(program, torch.nn.Module)]

    def __getattr__(self, name: str) -> Any:
        if name == "optim":
            raise AttributeError(name)
        return getattr(self.optim, name)

    def _names(self) -> dict[int, str]:
        """Names of parameters that live in modules and not in the param store, by identity."""
        return {id(param): name for name, param in self._local().items()}

    def meet(self, params: Iterable[Tensor]) -> None:
        """Keeps parameters by name, with their values where they are new."""
        store, local = pyro.get_param_store(), None
        for param in params:
            name = store.param_name(param)
            if name is None:
                local = self._names() if local is None else local
                name = local.get(id(param), f"param_{len(self.params)}")
            if self.params.get(name) is not param:
                self.params[name] = param
                self.first[name] = param.detach().clone()

    def _local(self) -> dict[str, Tensor]:
        """Parameters of modules by name; of two with one name the model's has a prefix."""
        known: dict[str, Tensor] = {}
        for module in self._modules:
            for name, param in module.named_parameters():
                known[name if known.get(name, param) is param else f"model.{name}"] = param
        return known

    def _known(self) -> dict[str, Tensor]:
        return self._local() | stored_params()

    def meet_trained(self, names: Iterable[str]) -> None:
        """Meets, of the parameters of these names, those that exist and are trained."""
        known = self._known()
        self.meet([known[name] for name in names if name in known and known[name].requires_grad])

    def find(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Meets the parameters of these names, of which the programs have been run; by name.

        :raises ValueError: if there is none of a name.
        """
        known = self._known()
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(f"checkpoint: expected parameters of this model and guide, got {missing}")
        found = {name: known[name] for name in names}
        self.meet(found.values())
        return found

    def _order(self) -> dict[int, str]:
        return {id(param): name for name, param in self.params.items()}

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        params = list(params)
        order = self._order()
        if any(id(param) not in order for param in params):
            self.meet(params)
            order = self._order()
        params.sort(key=lambda param: order[id(param)])  # the order of a set differs between processes
        gradients = [param.grad for param in params if param.grad is not None]
        if gradients:
            norms = torch.stack([torch.linalg.vector_norm(g.detach()) for g in gradients])
            self.norm = float(torch.linalg.vector_norm(norms.double()))
            if not math.isfinite(self.norm):
                raise NotFinite
            clip, skip = self.limits.tolist()
            if self.norm > skip:
                return
            if self.norm > clip:
                torch._foreach_mul_(gradients, clip / self.norm)
        self.optim(params, *args, **kwargs)

    def note(self, norm: float) -> None:
        """Counts the norm of a step's gradient in the running median."""
        if math.isfinite(norm) and norm > 0.0:
            self.norms.append(norm)

    def set_limits(self) -> None:
        """Sets the limits to multiples of the running median, once there are enough norms."""
        if len(self.norms) >= NORMS // 5:
            median = sorted(self.norms)[len(self.norms) // 2]
            self.limits.copy_(torch.tensor([CLIP * median, SKIP * median]))

    @torch.no_grad()
    def forget(self) -> None:
        """Sets moments and step counts of the optimizers to zero, and lifts the limits."""
        self.norms.clear()
        self.limits.fill_(math.inf)
        for optimizer in map(inner_optimizer, self.optim.optim_objs.values()):
            if not isinstance(optimizer, _ZERO_IS_FRESH):
                optimizer.state.clear()
            for state in optimizer.state.values():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        value.zero_()
                    elif key == "step":
                        state[key] = 0

    def advance(self, rate: float | None) -> None:
        """Sets the learning rate of the next step, or steps the schedule that the optimizer has."""
        if rate is not None:
            for optimizer in self.optim.optim_objs.values():
                for group in optimizer.param_groups:
                    group["lr"] = rate
        elif isinstance(self.optim, PyroLRScheduler):
            with warnings.catch_warnings():
                # A parameter that appears late has a scheduler that was stepped before it.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self.optim.step()
