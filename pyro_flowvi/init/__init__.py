"""The model seen from its unconstrained latents: checks, log density, starting points.  Knows no guide."""

from .density import REFUSALS, UnconstrainedModel, enumerated_log_weights, sum_apart
from .gaussians import Effort, Gaussian, find_gaussian
from .prototype import SafeInit, is_enumerated, prototype

__all__ = [
    "REFUSALS",
    "Effort",
    "Gaussian",
    "SafeInit",
    "UnconstrainedModel",
    "enumerated_log_weights",
    "find_gaussian",
    "is_enumerated",
    "prototype",
    "sum_apart",
]
