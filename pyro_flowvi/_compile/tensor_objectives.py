"""Pyro's objectives as pure tensor functions, without ``.item()`` or branches on data: what can be traced."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pyro.infer.util
import torch
from pyro.distributions.util import is_identically_zero
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.util import get_dependent_plate_dims, torch_sum
from torch import Tensor
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode

from .._program.pyro_private import compute_dice_elbo, get_traces
from ..objectives.enumerated import TraceEnumSTL_ELBO
from ..objectives.pyro_corrected import TraceAuxiliary_ELBO, TraceMeanFieldJacobian_ELBO

__all__ = ["tensor_loss"]

Losses = tuple[Tensor, Tensor]
"""The loss that Pyro reports, and the surrogate whose gradient is the estimator."""
Objective = Callable[..., Losses]
_REPLACED = {
    Tensor.item: "torch_item",
    Tensor.all: "compute_expectation",
    Tensor.masked_select: "compute_expectation",
}
"""Methods that need values, and the function of ``pyro.infer.util`` that calls them."""


def _one_hot(index: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:
        num_classes = int(index.max()) + 1
    return (index.unsqueeze(-1) == torch.arange(num_classes, device=index.device)).long()


class _TensorsOnly(TorchFunctionMode):
    """Keeps Pyro's arithmetic on log densities in tensors.

    ``torch_item`` reads the value of a tensor, and DiCE selects the entries of nonzero probability if there
    are others; here the first stays a tensor and the second writes zeros instead, which has the same sum.
    Calls from anywhere else are left alone, but for ``one_hot``, which reads its argument to check it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is one_hot:
            return _one_hot(*args, **(kwargs or {}))
        if func in _REPLACED:
            caller = sys._getframe(1).f_code
            if caller.co_filename == pyro.infer.util.__file__ and caller.co_name == _REPLACED[func]:
                if func is Tensor.item:
                    return args[0].detach()
                if func is Tensor.all:
                    return False
                value, mask = args
                return torch.where(mask, value, 0.0).reshape(-1)
        return func(*args, **(kwargs or {}))


def _trace_loss(elbo: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> Losses:
    loss: Any = 0.0
    surrogate: Any = 0.0
    for traces in get_traces(elbo, model, guide, args, kwargs):
        loss_particle, surrogate_particle = elbo._differentiable_loss_particle(*traces)
        loss = loss + loss_particle / elbo.num_particles
        surrogate = surrogate + surrogate_particle / elbo.num_particles
    return loss, surrogate


def _enum_loss(elbo: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> Losses:
    loss: Any = 0.0
    for traces in get_traces(elbo, model, guide, args, kwargs):
        loss = loss - compute_dice_elbo(*traces) / elbo.num_particles
    return loss, loss


def _renyi_loss(elbo: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> Losses:
    """Li and Turner (2016, eq. 8): the log mean of weights to the power 1 - alpha.

    Each particle's surrogate is weighted by its share of that mean.  A site that is not reparameterised
    enters with its score, times alpha / (1 - alpha), as in Pyro.
    """
    values, surrogates = [], []
    for model_trace, guide_trace in get_traces(elbo, model, guide, args, kwargs):
        sum_dims = get_dependent_plate_dims(model_trace.nodes.values())
        value: Any = 0.0
        surrogate: Any = 0.0
        for site in model_trace.nodes.values():
            if site["type"] == "sample":
                term = torch_sum(site["log_prob"], sum_dims)
                value, surrogate = value + term.detach(), surrogate + term
        for site in guide_trace.nodes.values():
            if site["type"] == "sample":
                _, score, entropy = site["score_parts"]
                term = torch_sum(site["log_prob"], sum_dims)
                value = value - term.detach()
                if not is_identically_zero(entropy):
                    if not is_identically_zero(score):
                        raise NotImplementedError("RenyiELBO: a site with both a score and an entropy term")
                    surrogate = surrogate - term
                if not is_identically_zero(score):
                    surrogate = surrogate + elbo.alpha / (1.0 - elbo.alpha) * term
        values.append(value)
        surrogates.append(surrogate)
    together = elbo.vectorize_particles and elbo.num_particles > 1
    log_weights = (1.0 - elbo.alpha) * (values[0] if together else torch.stack(values))
    surrogate = surrogates[0] if together else torch.stack(surrogates)
    log_mean = log_weights.logsumexp(0, keepdim=True) - math.log(elbo.num_particles)
    shares = (log_weights - log_mean).exp()
    loss = -log_mean.sum() / (1.0 - elbo.alpha)
    return loss, -(shares * surrogate).sum() / elbo.num_particles


def _users_loss(loss: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> Losses:
    value = loss(model, guide, *args, **kwargs)
    return value.detach(), value


_FORMS: dict[type, Callable[..., Losses]] = {
    Trace_ELBO: _trace_loss,
    TraceAuxiliary_ELBO: _trace_loss,
    TraceMeanField_ELBO: _trace_loss,
    TraceMeanFieldJacobian_ELBO: _trace_loss,
    TraceEnum_ELBO: _enum_loss,
    TraceEnumSTL_ELBO: _enum_loss,
    RenyiELBO: _renyi_loss,
}


def tensor_loss(loss: Any) -> Objective | None:
    """The objective ``(model, guide, args, kwargs) -> (loss, surrogate)``, two scalars of which the second
    is differentiated; None for an objective of which no such form is known.

    :param loss: one of Pyro's objectives (exactly: a subclass may mean something else), an ELBO with a method
        ``tensor_loss`` of that signature, or a function that returns a differentiable loss, as
        ``pyro.infer.SVI`` takes them.
    """
    if isinstance(loss, ELBO):
        form = _FORMS.get(type(loss))
        if form is None:
            return getattr(loss, "tensor_loss", None)
    elif callable(loss):
        form = _users_loss
    else:
        return None

    def objective(*inputs: Any) -> Losses:
        with _TensorsOnly():
            return form(loss, *inputs)

    return objective
