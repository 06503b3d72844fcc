"""Where a guide starts: modes of the model's density and the Gaussians there."""

from ._all_modes import find_all_modes
from .effort import Effort
from .gaussians import Gaussian, find_gaussian
from .modes import PRIOR_DRAWS, Modes, find_modes

__all__ = [
    "PRIOR_DRAWS",
    "Effort",
    "Gaussian",
    "Modes",
    "find_all_modes",
    "find_gaussian",
    "find_modes",
]
