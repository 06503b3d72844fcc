"""The objective for a pair of model and guide, and its state."""

import inspect
from typing import Any

from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

from .._program.log_weights import LogWeights
from .enumerated import TraceEnumSTL_ELBO
from .path_gradient import TraceSTL_ELBO

__all__ = ["as_objective", "objective_for", "state_of"]


def objective_for(weights: LogWeights, num_particles: int, path: bool = False) -> Any:
    """The ELBO for a pair, vectorised where the model allows.

    :param weights: of the pair.
    :param num_particles: draws a step.
    :param path: with path gradients, where they exist.
    """
    kind: Any = TraceSTL_ELBO if path else Trace_ELBO
    if weights.structure.enumerated:
        kind = TraceEnumSTL_ELBO if weights.structure.marginal else TraceEnum_ELBO
    return kind(
        num_particles=num_particles,
        vectorize_particles=weights.vectorized and num_particles > 1,
        max_plate_nesting=weights.structure.max_plate_nesting,
    )


def state_of(loss: Any) -> dict[str, Tensor]:
    """What steps have changed of an objective, copied; empty without a ``state_dict``, as Pyro's are."""
    return loss.state_dict() if hasattr(loss, "state_dict") else {}


def as_objective(loss: Any) -> Any:
    """An objective, also from its class; anything else as it is.

    :raises ValueError: for a class that needs arguments.
    """
    if not inspect.isclass(loss):
        return loss
    try:
        return loss()
    except TypeError as error:
        raise ValueError(
            f"loss: expected an instance, got the class {loss.__name__}, which needs arguments: {error}"
        ) from None
