"""Gradients averaged over the ranks, whichever way a step of Pyro is taken."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .._compile.optimizers import flatten
from .._ranks import Ranks
from ._guarded_optim import GuardedOptim

__all__ = ["GradientAverage"]


class GradientAverage:
    """The mean over ranks of the gradients of all parameters, in one message of one order.

    A rank that cannot compute its gradient sends one that is not a number, since the others wait for it.

    :param ranks: the processes.
    :param optim: knows the parameters by name.
    """

    def __init__(self, ranks: Ranks, optim: GuardedOptim) -> None:
        self._ranks, self._optim = ranks, optim
        self.share = 1.0
        """How much this rank's next gradients count: its rows beside those of others."""

    def __call__(
        self, params: Iterable[Tensor], grads: Iterable[Tensor] | None, loss: float, dropped: int = 0
    ) -> tuple[list[Tensor], float, int]:
        """The means of gradients, in the order of the parameters, and of the loss; the sum of dropped draws.

        :param grads: None where there are none.
        """
        params = list(params)
        self._optim.meet(params)
        known = [param for _, param in sorted(self._optim.params.items())]
        own = {} if grads is None else {id(p): grad for p, grad in zip(params, grads, strict=True)}
        empty = math.nan if grads is None else 0.0
        flat = flatten(own.get(id(p), torch.full_like(p.detach(), empty)) for p in known)
        flat, loss, dropped = self._ranks.average(flat, loss, dropped, self.share)
        parts = flat.split([p.numel() for p in known])
        found = {id(p): part.view(p.shape).to(p.dtype) for p, part in zip(known, parts, strict=True)}
        return [found[id(p)] for p in params], loss, dropped

    def of_losses(self, loss_and_grads: Callable[..., Any]) -> Callable[..., float]:
        """Pyro's ``loss_and_grads``, which leaves the means as gradients, and returns that of the loss."""

        def averaged(model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
            error: Exception | None = None
            with poutine.trace(param_only=True) as capture:
                try:
                    loss = float(loss_and_grads(model, guide, *args, **kwargs))
                except Exception as raised:
                    error = raised
            if error is not None:
                self(self._optim.params.values(), None, math.nan)
                raise error
            sites: Iterable[Any] = capture.trace.nodes.values()
            met = (site["value"].unconstrained() for site in sites)
            params = list({id(param): param for param in met if param.requires_grad}.values())
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            means, loss, _ = self(params, grads, loss)
            for param, mean in zip(params, means, strict=True):
                if param.grad is not None or bool(mean.any()):
                    param.grad = mean
            return loss

        return averaged
