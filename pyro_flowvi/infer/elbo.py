"""Objectives with path gradients: Pyro's ``Trace_ELBO`` without the noise that stays when q = p."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from .._checks import check_positive_int
from ..distributions.flow import scoring
from ..init import sum_apart

__all__ = ["TraceAnnealed_ELBO", "TraceIW_ELBO", "TraceSTL_ELBO"]

Program = Callable[..., Any]
Trace = Any


def _is_delta(site: Any) -> bool:
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, pyro.distributions.Delta)


def _sites(trace: Trace) -> Iterator[tuple[str, Any]]:
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield name, site


class _Draws:
    """One run of a guide, and the run again at its draws as leaves of a graph.

    :param values: the draws of every reparameterised site, with their graph.
    :param leaves: the same values without.
    """

    def __init__(self, model: Program, guide: Program, args: Any, kwargs: Any) -> None:
        with scoring():
            drawn: Trace = poutine.trace(guide).get_trace(*args, **kwargs)
        self.values: dict[str, Tensor] = {}
        self.event_dims: dict[str, int] = {}
        self.own: dict[str, Any] = {}
        leaves: Trace = poutine.Trace()
        for name, site in _sites(drawn):
            if site["is_observed"] or _is_delta(site):
                continue
            if not site["fn"].has_rsample:
                raise ValueError(
                    f"site {name!r}: expected a reparameterised distribution in the guide, got "
                    f"{type(site['fn']).__name__}; use Trace_ELBO or TraceGraph_ELBO"
                )
            if site["infer"].get("enumerate"):
                raise ValueError(f"site {name!r}: expected no enumeration in the guide; use TraceEnum_ELBO")
            self.values[name] = site["value"]
            self.event_dims[name] = site["fn"].event_dim
            leaf = site["value"].detach().requires_grad_()
            leaves.add_node(name, **{**site, "value": leaf})
            score = getattr(site["fn"], "drawn_score", lambda value: None)(site["value"])
            if score is not None and site["mask"] is None and site["scale"] == 1.0:
                self.own[name] = score, site["fn"].log_prob(site["value"])
        self.leaves: dict[str, Tensor] = {name: leaves.nodes[name]["value"] for name in self.values}
        for name, site in drawn.nodes.items():
            if site["type"] == "sample" and site_is_subsample(site):
                leaves.add_node(name, **site)
        again: Trace = poutine.trace(poutine.replay(guide, trace=leaves)).get_trace(*args, **kwargs)
        self.drawn, self.guide_trace = drawn, prune_subsample_sites(again)
        model_trace: Trace = poutine.trace(poutine.replay(model, trace=again)).get_trace(*args, **kwargs)
        self.model_trace = prune_subsample_sites(model_trace)
        for name, site in _sites(self.model_trace):
            if site["infer"].get("enumerate") and name not in self.guide_trace.nodes:
                raise ValueError(f"site {name!r}: expected no enumeration in the model; use TraceEnum_ELBO")
        self.model_trace.compute_log_prob()
        # The density of a site that knows its own score is not computed again: that would be an inverse pass.
        self.guide_trace.compute_log_prob(site_filter=lambda name, site: name not in self.own)

    def terms(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Log densities of the model's sites, of the guide's at the leaves, and those known already."""
        model = [site["log_prob"] for _, site in _sites(self.model_trace)]
        guide = [site["log_prob"] for name, site in _sites(self.guide_trace) if name not in self.own]
        return model, guide, [log_prob.detach() for _, log_prob in self.own.values()]


class TraceSTL_ELBO(ELBO):
    """The ELBO with its path gradient, "sticking the landing".

    The gradient through the draws alone, without the score of the guide's parameters, whose mean is zero
    (Roeder, Wu and Duvenaud 2017, equation 6): unbiased, and without any variance where the guide is the
    posterior.  The loss that is reported is that of ``Trace_ELBO``.  Flow guides of this package carry the
    score of their density along the forward pass (Vaitl et al. 2024): autoregressive ones need no inverse.

    A particle whose density or gradient is not finite is left out of a vectorised step, and counted in
    ``num_dropped``, the number in all steps so far.

    :param num_particles: draws a step.
    :param max_plate_nesting: as in Pyro.
    :param vectorize_particles: draws them in one run of model and guide.
    :param options: the other options of ``pyro.infer.ELBO``.
    :raises ValueError: at the first step, naming the site, if the guide has a site that is not
        reparameterised, or a site is enumerated.

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
        **options: Any,
    ) -> None:
        super().__init__(
            num_particles=check_positive_int("num_particles", num_particles),
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            **options,
        )
        self.num_dropped: Tensor = torch.zeros((), dtype=torch.long, device="cpu")

    # -- what subclasses change ---------------------------------------------------------------------

    def _combine(self, model: Tensor, guide: Tensor) -> Tensor:
        """The integrand from log densities of shape ``(P,)``."""
        return model - guide

    def _weigh(self, weights: Tensor, good: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and the coefficients of the path gradients and of the model's own parameters."""
        count = good.sum().clamp(min=1).to(weights)
        loss = -torch.where(good, weights, 0.0).sum() / count
        coefficient = torch.where(good, 1.0, 0.0).to(weights) / count
        return torch.where(good.any(), loss, torch.nan), coefficient, coefficient

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        # Pyro's abstract method; what it gives serves those who look for the site that failed.
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    # -- the estimator ------------------------------------------------------------------------------

    def _batched(self) -> bool:
        return bool(self.vectorize_particles) and self.num_particles > 1

    def _sum(self, terms: list[Tensor]) -> Tensor | float:
        """Terms summed over all dimensions but the particles'."""
        total: Tensor | float = 0.0
        size, nesting = self.num_particles, int(self.max_plate_nesting) - 1
        for term in terms:
            total = total + (sum_apart(term, size, nesting) if self._batched() else term.sum())
        return total

    def _one(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """Integrand, gradients at the draws, and what is finite, of one run: of all particles or of one."""
        draws = _Draws(model, guide, args, kwargs)
        model_terms, guide_terms, known = draws.terms()
        log_p = self._sum(model_terms)
        path = self._combine(log_p, self._sum(guide_terms))  # type: ignore[arg-type]
        gradients = torch.autograd.grad(
            path.sum(), list(draws.leaves.values()), retain_graph=True, allow_unused=True
        )
        rows = self.num_particles if self._batched() else 1
        moved = []
        for name, gradient in zip(draws.leaves, gradients, strict=True):
            value = draws.values[name]
            gradient = torch.zeros_like(value) if gradient is None else gradient
            if name in draws.own:
                gradient = gradient - draws.own[name][0]
            moved.append((value, gradient.detach()))
        weights = (path - self._sum(known)).detach().reshape(rows)
        good = weights.isfinite()
        for _, gradient in moved:
            good = good & gradient.isfinite().reshape(rows, -1).all(-1)
        return weights, good, moved, torch.as_tensor(log_p).reshape(rows)

    def _runs(self, model: Program, guide: Program, args: Any, kwargs: Any) -> list[tuple[Any, ...]]:
        if self.max_plate_nesting == math.inf:
            self._guess_max_plate_nesting(model, guide, args, kwargs)
        if self._batched():
            model, guide = self._vectorized_num_particles(model), self._vectorized_num_particles(guide)
            return [self._one(model, guide, args, kwargs)]
        return [self._one(model, guide, args, kwargs) for _ in range(self.num_particles)]

    def tensor_loss(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
        """Loss, the surrogate whose gradient is the estimator, and how many particles were dropped."""
        runs = self._runs(model, guide, args, kwargs)
        weights, good = torch.cat([run[0] for run in runs]), torch.cat([run[1] for run in runs])
        loss, paths, own = self._weigh(weights, good)
        surrogate = -torch.where(good, own * torch.cat([run[3] for run in runs]), 0.0).sum()
        size = len(weights) // len(runs)
        for run, coefficient in zip(runs, paths.split(size), strict=True):
            for value, gradient in run[2]:
                ones = (1,) * (value.dim() - 1) if self._batched() else (1,) * value.dim()
                factor = coefficient.reshape((size, *ones) if self._batched() else ones)
                gradient = torch.where(factor == 0.0, 0.0, factor * gradient)
                surrogate = surrogate - (gradient * value).sum()
        return loss.detach(), surrogate, (~good).sum()

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a scalar whose gradient is the estimator."""
        loss, surrogate, _ = self.tensor_loss(model, guide, args, kwargs)
        return surrogate - surrogate.detach() + loss

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss, without gradients of the parameters."""
        return self.tensor_loss(model, guide, args, kwargs)[0].item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss; gradients are left in the parameters."""
        loss, surrogate, dropped = self.tensor_loss(model, guide, args, kwargs)
        self.num_dropped += dropped.cpu()
        if surrogate.requires_grad:
            surrogate.backward()
        value = loss.item()
        if not math.isfinite(value):
            warnings.warn("Encountered NaN: loss", stacklevel=2)
        return value


class TraceAnnealed_ELBO(TraceSTL_ELBO):
    """The ELBO of a target that is tempered at first: E[β log p(x, z) - log q(z)].

    Rezende and Mohamed 2015, equation 20, with the path gradient of :class:`TraceSTL_ELBO`.  A guide that
    starts with small β meets all modes before any of them is deep.

    :param schedule: β as a function of the step, from 0: a number above 0, as a rule rising to 1.
    :param options: those of :class:`TraceSTL_ELBO`.
    :raises ValueError: if ``schedule`` is not callable; at a step, if it gives no positive number.

    Example::

        >>> elbo = TraceAnnealed_ELBO(lambda step: min(1.0, 0.1 + step / 1000), num_particles=16)
        >>> round(elbo.beta.item(), 2)
        0.1
    """

    def __init__(self, schedule: Callable[[int], float], **options: Any) -> None:
        if not callable(schedule):
            raise ValueError(f"schedule: expected a callable of the step, got {schedule!r}")
        super().__init__(**options)
        self.schedule = schedule
        self.steps: Tensor = torch.zeros((), dtype=torch.long, device="cpu")
        """How many steps have been taken; set it to resume."""
        self.beta: Tensor = torch.ones((), device="cpu")
        """β of the present step."""
        self._set_beta()

    def _set_beta(self) -> None:
        beta = float(self.schedule(int(self.steps)))
        if not (beta > 0.0 and math.isfinite(beta)):
            raise ValueError(f"schedule: expected a positive number, got {beta} at step {int(self.steps)}")
        self.beta.fill_(beta)

    def advance(self) -> None:
        """Goes on to the next step; whoever steps without :meth:`loss_and_grads` calls it."""
        self.steps += 1
        self._set_beta()

    def _combine(self, model: Tensor, guide: Tensor) -> Tensor:
        return self.beta.to(model) * model - guide

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        value = super().loss_and_grads(model, guide, *args, **kwargs)
        self.advance()
        return value


class TraceIW_ELBO(TraceSTL_ELBO):
    """The importance-weighted ELBO, log of the mean of ``num_particles`` weights p / q.

    Burda, Grosse and Salakhutdinov 2016, equation 8.  With ``dreg`` its doubly reparameterised gradient
    (Tucker, Lawson, Gu and Maddison 2019, equation 8): path gradients weighted by the squares of the
    normalised weights, whose signal does not vanish with more particles.  Otherwise path gradients weighted
    by the normalised weights themselves, as Roeder, Wu and Duvenaud 2017 propose, which is biased.

    :param num_particles: importance samples of the bound, at least 2.
    :param dreg: whether to take the unbiased, doubly reparameterised gradient.
    :param options: those of :class:`TraceSTL_ELBO`.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> elbo = TraceIW_ELBO(num_particles=64, vectorize_particles=True)
        >>> abs(elbo.loss(model, guide)) < 5.0
        True
    """

    def __init__(self, num_particles: int = 2, dreg: bool = True, **options: Any) -> None:
        if check_positive_int("num_particles", num_particles) < 2:
            raise ValueError(f"num_particles: expected at least 2, got {num_particles}")
        super().__init__(num_particles=num_particles, **options)
        self.dreg = bool(dreg)

    def _weigh(self, weights: Tensor, good: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = torch.where(good, weights, -torch.inf)
        total = weights.logsumexp(0)
        shares = (weights - total).exp()
        count = good.sum().clamp(min=1).to(weights)
        return count.log() - total, shares.square() if self.dreg else shares, shares
