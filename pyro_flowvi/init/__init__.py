"""The model seen from its unconstrained latents: checks, log density, starting points.  Knows no guide."""

from .density import REFUSALS, UnconstrainedModel, enumerated_log_weights, sum_apart
from .effort import Effort
from .gaussians import Gaussian, find_gaussian
from .modes import PRIOR_DRAWS, Modes, find_modes
from .prototype import SafeInit, is_enumerated, prototype

__all__ = [
    "PRIOR_DRAWS",
    "REFUSALS",
    "Effort",
    "Gaussian",
    "Modes",
    "SafeInit",
    "UnconstrainedModel",
    "enumerated_log_weights",
    "find_gaussian",
    "find_modes",
    "is_enumerated",
    "prototype",
    "sum_apart",
]
