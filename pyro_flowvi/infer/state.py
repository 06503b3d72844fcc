"""The state of one run of :func:`pyro_flowvi.fit`: parameters, the best values so far, what went wrong."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from ..init import REFUSALS
from .fused import inner_optimizer, meet
from .particles import Particles

__all__ = ["GuardedOptim", "NotFinite", "Run", "is_worse"]

COMPARISON_DRAWS = 256
"""Draws on which two states of a guide are compared, with common random numbers."""
SMALL_BATCH = 16
COMPARISON_DRAWS_APART = 16
"""The same where the model cannot run them together."""

Program = Callable[..., Any]
_ZERO_IS_FRESH = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, ClippedAdam)
"""Optimizers whose fresh state is zeros: set in place, since compiled steps hold views of it."""


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
        self._modules = [program for program in programs if isinstance(program, torch.nn.Module)]

    def __getattr__(self, name: str) -> Any:
        if name == "optim":
            raise AttributeError(name)
        return getattr(self.optim, name)

    def _names(self) -> dict[int, str]:
        """Names of parameters that live in modules and not in the param store, by identity."""
        return {id(param): name for name, param in self._local().items()}

    def _meet(self, params: Any) -> None:
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
        return self._local() | pyro.get_param_store()._params

    def meet_trained(self, names: Iterable[str]) -> None:
        """Meets, of the parameters of these names, those that exist and are trained."""
        known = self._known()
        self._meet([known[name] for name in names if name in known and known[name].requires_grad])

    def find(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Meets the parameters of these names, of which the programs have been run; by name.

        :raises ValueError: if there is none of a name.
        """
        known = self._known()
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(f"checkpoint: expected parameters of this model and guide, got {missing}")
        found = {name: known[name] for name in names}
        self._meet(found.values())
        return found

    def _order(self) -> dict[int, str]:
        return {id(param): name for name, param in self.params.items()}

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        params = list(params)
        order = self._order()
        if any(id(param) not in order for param in params):
            self._meet(params)
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

    @torch.no_grad()
    def forget(self) -> None:
        """Sets moments and step counts of the optimizers to zero."""
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


@dataclass
class Run:
    """One run: the pair, its data and the best state so far.

    :param judge: draws on whose weights states are compared: on validation data if there are any.
    :param ranked: whether states can be compared.
    :param comparison_draws: draws of a comparison.
    :param held_out: whether states are compared on data that they are not trained on.
    """

    model: Program
    guide: Program
    kwargs: dict[str, Any]
    loss: Any
    judge: Particles
    optim: GuardedOptim
    ranked: bool
    comparison_draws: int = COMPARISON_DRAWS
    held_out: bool = False
    losses: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_weights: Tensor = field(default_factory=lambda: torch.full((1,), -math.inf))

    def evaluate(self) -> Tensor:
        """Log weights on draws that are the same at every call; their mean is the ELBO.

        A state that the model cannot evaluate has the ELBO minus infinity.
        """
        size = self.comparison_draws if self.judge.vectorized else COMPARISON_DRAWS_APART
        with torch.random.fork_rng(), pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            try:
                weights = self.judge.log_weights(size)
            except REFUSALS:
                parts = torch.arange(size).split(SMALL_BATCH)
                weights = torch.cat([self._few_weights(len(part)) for part in parts])
        return weights.nan_to_num(-math.inf, -math.inf, -math.inf)

    def _few_weights(self, size: int) -> Tensor:
        """Log weights of a few draws, minus infinity if the model refuses one of them."""
        try:
            return self.judge.log_weights(size)
        except REFUSALS:
            return torch.full((size,), -math.inf)

    def keep_unless_worse(self) -> Tensor:
        """Keeps the present state as the best, unless an earlier one is better beyond its noise.

        :return: its log weights.
        """
        weights = self.evaluate()
        if not (self.best and self.ranked and is_worse(weights, self.best_weights)):
            self.best_weights = weights
            self.best = {name: param.detach().clone() for name, param in self.optim.params.items()}
        return weights

    def keep_start(self) -> None:
        """Makes the state before the first step the best so far."""
        self.optim.meet_trained(self.judge.params)
        meet(self.optim.optim, self.optim.params.values())
        self.keep_unless_worse()

    @property
    def best_loss(self) -> float:
        return -float(self.best_weights.mean())

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the best state back; what it does not know yet goes back to where it started."""
        for name, param in self.optim.params.items():
            param.copy_(self.best.get(name, self.optim.first[name]))

    def find_bad_site(self, args: tuple[Any, ...]) -> str | None:
        """The first site of the step just run that is not finite, in value, density or gradient."""
        with poutine.block(), pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for model_trace, guide_trace in self.loss._get_traces(self.model, self.guide, args, self.kwargs):
                for trace in (guide_trace, model_trace):
                    for name, site in trace.nodes.items():
                        if site["type"] == "sample" and _site_is_bad(site):
                            return str(name)
                    inputs = list(self.optim.params.values())
                    for name, site in trace.nodes.items():
                        if site["type"] == "sample" and _gradient_is_bad(site, inputs):
                            return str(name)
        return None


def is_worse(weights: Tensor, best: Tensor) -> bool:
    """Whether the mean of paired log weights fell, beyond twice its standard error."""
    now, before = weights.isfinite(), best.isfinite()
    if int(now.sum()) != int(before.sum()):  # draws without a density decide
        return bool(now.sum() < before.sum())
    gain = (weights - best)[now & before]
    return len(gain) > 1 and bool(gain.mean() < -2.0 * gain.std() / math.sqrt(len(gain)))


def _site_is_bad(site: dict[str, Any]) -> bool:
    value, log_prob = site["value"], site.get("log_prob", torch.zeros(()))
    return not bool(value.isfinite().all() and torch.as_tensor(log_prob).isfinite().all())


def _gradient_is_bad(site: dict[str, Any], inputs: list[Tensor]) -> bool:
    log_prob = site.get("log_prob")
    if not isinstance(log_prob, Tensor) or not log_prob.requires_grad:
        return False
    gradients = torch.autograd.grad(log_prob.sum(), inputs, retain_graph=True, allow_unused=True)
    return any(g is not None and not bool(g.isfinite().all()) for g in gradients)
