"""The ELBO with its path gradient."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from torch import Tensor

from .._checks import check_positive_int
from .._program.batching import sum_apart
from .._types import Program
from ._leaf_draws import Draws, reaches_others

__all__ = ["TraceSTL_ELBO"]


@dataclass(frozen=True)
class _Run:
    """One run of all particles, or of one: R particles."""

    weights: Tensor
    """The integrand, shape ``(R,)``, no graph."""
    good: Tensor
    """Whether it and its gradients are finite, shape ``(R,)``."""
    moved: list[tuple[Tensor, Tensor]]
    """Draws, and the gradient of the integrand at each."""
    direct: Tensor | None
    """What of the integrand depends on parameters other than through the draws, shape ``(R,)``."""


class TraceSTL_ELBO(ELBO):
    """The ELBO with its path gradient, "sticking the landing".

    The gradient through the draws alone, without the score of the guide's parameters, whose mean is zero
    (Roeder, Wu and Duvenaud 2017, equation 6): unbiased, and without any variance where the guide is the
    posterior.  The loss that is reported is that of ``Trace_ELBO``.  Flow guides of this package carry the
    score of their density along the forward pass (Vaitl et al. 2024): autoregressive ones need no inverse.
    The guide runs twice a step, the second time at the draws of the first: it may have no noise of its own
    (dropout).  Where it is much narrower than the posterior the gradient is noisier than ``Trace_ELBO``'s.

    A particle whose density or gradient is not finite is left out of a vectorised step, and counted in
    ``num_dropped``, the number in all steps so far.

    :param num_particles: draws a step.
    :param max_plate_nesting: as in Pyro.
    :param vectorize_particles: draws them in one run of model and guide.
    :param retain_graph: as in Pyro.
    :raises ValueError: at the first step, naming the site, if the guide has a site that is not
        reparameterised, or a site is enumerated; if the guide is one of Pyro's messengers.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Normal(1.0, 2.0))
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> elbo = TraceSTL_ELBO(num_particles=16, vectorize_particles=True)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
        >>> losses = [svi.step() for _ in range(500)]
        >>> max(abs(loss) for loss in losses[-10:]) < 0.05
        True
    """

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        *,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            num_particles=check_positive_int("num_particles", num_particles),
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )
        self.num_dropped: Tensor = torch.zeros((), dtype=torch.long, device="cpu")

    def _state(self) -> dict[str, Tensor]:
        """What steps change, by reference."""
        return {"num_dropped": self.num_dropped}

    def state_dict(self) -> dict[str, Tensor]:
        """What steps have changed so far, copied: to resume with :meth:`load_state_dict`."""
        return {name: value.clone() for name, value in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a state.

        :param state: one that :meth:`state_dict` of such an objective gave.
        :raises ValueError: if it has other names.
        """
        own = self._state()
        if own.keys() != state.keys():
            raise ValueError(f"state: expected {sorted(own)}, got {sorted(state)}")
        for name, value in own.items():
            value.copy_(state[name])  # in place: a compiled step holds a reference

    # -- what subclasses change ---------------------------------------------------------------------

    _path = True
    """Whether the gradient leaves out the score of the guide's parameters."""

    def _combine(self, model: Tensor, guide: Tensor) -> Tensor:
        """The integrand from log densities of shape ``(R,)``."""
        return model - guide

    def _counts(self, weights: Tensor, good: Tensor) -> Tensor:
        """Which particles are not left out."""
        return good

    def _weigh(self, weights: Tensor, good: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and the coefficients of the path gradients and of the direct ones."""
        coefficient = good.to(weights) / good.sum().clamp(min=1)
        loss = -(coefficient * torch.where(good, weights, 0.0)).sum()
        return loss, coefficient, coefficient

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        # Pyro's abstract method; what it gives serves those who look for the site that failed.
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    # -- the estimator ------------------------------------------------------------------------------

    @property
    def _batched(self) -> bool:
        return bool(self.vectorize_particles) and self.num_particles > 1

    def _sum(self, terms: list[Tensor], device: torch.device | None) -> Tensor:
        """Terms summed over all dimensions but the particles', shape ``(R,)``; of none on a device."""
        total: Tensor | float = 0.0
        for term in terms:
            if self._batched:
                total = total + sum_apart(term, self.num_particles, int(self.max_plate_nesting) - 1)
            else:
                total = total + term.sum()
        total = total if isinstance(total, Tensor) else torch.tensor(total, device=device)
        return total.expand(self.num_particles if self._batched else 1)

    def _run(self, model: Program, guide: Program, args: Any, kwargs: Any) -> _Run:
        path = self._path and torch.is_grad_enabled()
        draws = Draws(model, guide, args, kwargs, path=path, nesting=self.max_plate_nesting)
        own = [log_prob for _, log_prob in draws.own.values()]
        device = next((t.device for t in (*draws.model, *draws.density, *draws.scored, *own)), None)
        log_p, density, scored, known = (
            self._sum(terms, device) for terms in (draws.model, draws.density, draws.scored, own)
        )
        direct = self._combine(log_p, density)
        total = self._combine(log_p, density + scored)
        weights = (total - known).detach()
        good = weights.isfinite()
        leaves = list(draws.leaves.values())
        gradients: Any = [None] * len(leaves)
        if leaves and total.requires_grad:
            gradients = torch.autograd.grad(total.sum(), leaves, retain_graph=True, allow_unused=True)
        moved = []
        for (name, value), gradient in zip(draws.values.items(), gradients, strict=True):
            gradient = torch.zeros_like(value) if gradient is None else gradient.detach()
            if name in draws.own:
                gradient = gradient - draws.own[name][0]
            rows = gradient.reshape(len(weights), gradient.numel() // len(weights))
            good = good & rows.isfinite().all(-1)
            if value.requires_grad:
                moved.append((value, gradient))
        # Most models have no parameters: their graph is not gone through again.
        return _Run(weights, good, moved, direct if reaches_others(direct, leaves) else None)

    def _runs(self, model: Program, guide: Program, args: Any, kwargs: Any) -> list[_Run]:
        if not self._batched:
            return [self._run(model, guide, args, kwargs) for _ in range(self.num_particles)]
        if self.max_plate_nesting == math.inf:
            self._guess_max_plate_nesting(model, guide, args, kwargs)
        model, guide = self._vectorized_num_particles(model), self._vectorized_num_particles(guide)
        return [self._run(model, guide, args, kwargs)]

    def tensor_loss(
        self, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, the surrogate whose gradient is the estimator, and how many particles were left out."""
        runs = self._runs(model, guide, args, kwargs)
        weights, good = torch.cat([run.weights for run in runs]), torch.cat([run.good for run in runs])
        loss, paths, own = self._weigh(weights, good)
        surrogate = torch.zeros_like(loss)
        size = len(weights) // len(runs)
        for run, path, share in zip(runs, paths.split(size), own.split(size), strict=True):
            if run.direct is not None:
                surrogate = surrogate - (share * torch.where(run.good, run.direct, 0.0)).sum()
            for value, gradient in run.moved:
                batch = (size,) if self._batched else ()
                shape = batch + (1,) * (value.dim() - len(batch))
                keep = run.good.reshape(shape)
                slope = torch.where(keep, path.reshape(shape) * gradient, 0.0)
                surrogate = surrogate - (slope * torch.where(keep, value, 0.0)).sum()
        loss = torch.where(good.any(), loss, torch.nan).detach()
        return loss, surrogate, (~self._counts(weights, good)).sum()

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a scalar whose gradient is the estimator."""
        loss, surrogate, _ = self.tensor_loss(model, guide, args, kwargs)
        return surrogate - surrogate.detach() + loss

    @torch.no_grad()
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss, without gradients of the parameters."""
        return self.tensor_loss(model, guide, args, kwargs)[0].item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss; gradients are left in the parameters."""
        loss, surrogate, dropped = self.tensor_loss(model, guide, args, kwargs)
        self.num_dropped += dropped.cpu()
        if surrogate.requires_grad:
            surrogate.backward(retain_graph=self.retain_graph)
        value = loss.item()
        if not math.isfinite(value):
            warnings.warn("Encountered NaN: loss", stacklevel=2)
        return value
