"""Pyro's objectives with what they leave out: a score of auxiliary sites, a Jacobian of point masses."""

from typing import Any

import torch
from pyro.distributions import Delta
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from .._program.sites import innermost
from .._types import Trace

__all__ = ["TraceAuxiliary_ELBO", "TraceMeanFieldJacobian_ELBO"]

Program = Any


class TraceAuxiliary_ELBO(Trace_ELBO):
    """``Trace_ELBO``, unbiased where the guide has auxiliary sites that are sampled without a path.

    A score function's cost is log p - log q of all that it can influence.  ``Trace_ELBO`` takes q from the
    sites of the model alone, so that log q of an auxiliary site (``infer={"is_auxiliary": True}``) and the
    factors of a guide are missing, and the gradient of a discrete auxiliary variable lacks its entropy.
    Here each has its place in the cost (Ranganath, Gerrish and Blei 2014, equation 3, with the auxiliary
    variables among those of q).  Loss and value are those of ``Trace_ELBO``.

    :param options: those of ``pyro.infer.Trace_ELBO``.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     logits = pyro.param("logits", torch.tensor([1.0, 0.0]))
        ...     k = pyro.sample("k", dist.Categorical(logits=logits), infer={"is_auxiliary": True})
        ...     pyro.sample("x", dist.Normal(2.0 * k - 1.0, 1.0))
        >>> elbo = TraceAuxiliary_ELBO(num_particles=10, vectorize_particles=True)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
        >>> isinstance(svi.step(), float)
        True
    """

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        for name, site in guide_trace.nodes.items():
            in_cost = site["type"] == "sample" and getattr(innermost(site["fn"]), "in_cost", False)
            if site["type"] == "sample" and name not in model_trace.nodes and not in_cost:
                # A density of one: nothing is added to the ELBO, and log q of the site to the cost.
                model_trace.add_node(
                    name,
                    **{
                        **site,
                        "is_observed": False,
                        "log_prob": torch.zeros_like(site["log_prob"]),
                        "log_prob_sum": torch.zeros_like(site["log_prob_sum"]),
                    },
                )
        return model_trace, guide_trace


class _Plain:
    """Stands in for a distribution of which no closed divergence is to be taken."""

    has_rsample = True


class TraceMeanFieldJacobian_ELBO(TraceMeanField_ELBO):
    """``TraceMeanField_ELBO`` with the density of its point masses.

    Pyro's autoguides give a constrained site a point mass ``Delta(value, log_density=...)`` at the image of
    an unconstrained draw, whose log density is minus the log-Jacobian of the map.  The divergence that Pyro
    has for ``Delta`` forgets it: the ELBO of a positive site is off by ``E[log |dx/du|]``, which the guide
    then inflates.  Here such a site counts with log p - log q at its value (Kucukelbir et al. 2017,
    equation 5); all others keep their closed divergences.

    :param options: those of ``pyro.infer.TraceMeanField_ELBO``.

    Example::

        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> guide = pyro.infer.autoguide.AutoNormal(model, init_scale=1.0)
        >>> elbo = TraceMeanFieldJacobian_ELBO(num_particles=10, vectorize_particles=True)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> isinstance(svi.step(), float)
        True
    """

    def _differentiable_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[Any, Tensor]:
        guide_trace = guide_trace.copy()
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and isinstance(innermost(site["fn"]), Delta):
                guide_trace.nodes[name] = {**site, "fn": _Plain()}
        return super()._differentiable_loss_particle(model_trace, guide_trace)  # type: ignore[no-any-return]
