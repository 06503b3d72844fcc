"""Discrete sites summed out."""

from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO
from pyro.ops.contract import contract_to_tensor
from torch import Tensor

from .._types import Program
from .pyro_private import compute_model_factors, get_traces

__all__ = ["enumerated_log_weights"]


def enumerated_log_weights(
    model: Program, guide: Program, args: Any, kwargs: Any, size: int, nesting: int
) -> Tensor:
    """log p - log q of ``size`` particles, discrete sites summed out, shape ``(size,)``.

    As Pyro's ``TraceEnum_ELBO`` sums discrete sites out, but keeping the particles apart.
    """
    if size == 1:  # Pyro has no plate for one particle
        return enumerated_log_weights(model, guide, args, kwargs, 2, nesting)[:1]
    elbo = TraceEnum_ELBO(
        num_particles=size,
        vectorize_particles=True,
        max_plate_nesting=nesting,
        strict_enumeration_warning=False,
    )
    ((model_trace, guide_trace),) = get_traces(elbo, model, guide, args, kwargs)
    costs, factors, _, sum_dims, scale = compute_model_factors(model_trace, guide_trace)
    particle = model_trace.plate_to_symbol["num_particles_vectorized"]

    def apart(packed: Any) -> Tensor:
        """Sums a packed tensor over all its dimensions but the particles'."""
        dims = packed._pyro_dims
        others = [i for i, dim in enumerate(dims) if dim != particle]
        total: Tensor = packed.sum(others) if others else packed
        return total if particle in dims else total.expand(size)

    terms = [apart(cost) for group in costs.values() for cost in group]
    if factors:
        terms.append(scale * contract_to_tensor(factors, sum_dims, frozenset(particle)))
    terms += [
        -apart(site["packed"]["log_prob"]) for site in guide_trace.nodes.values() if site["type"] == "sample"
    ]
    return torch.stack(terms).sum(0)
