"""Where a guide starts: modes of the model's density and the Gaussians there."""

from .effort import Effort
from .gaussians import Gaussian, find_gaussian
from .modes import PRIOR_DRAWS, Modes, find_modes

__all__ = [
    "PRIOR_DRAWS",
    "Effort",
    "Gaussian",
    "Modes",
    "find_gaussian",
    "find_modes",
]
