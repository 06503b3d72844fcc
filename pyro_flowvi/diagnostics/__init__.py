"""Whether a fit can be trusted: a verdict, a comparison of guides, calibration, an export to ArviZ."""

from .arviz_export import to_arviz
from .calibration import Calibration
from .comparison import Comparison, compare
from .diagnosis import Diagnosis, diagnose
from .probes import Probes
from .simulated_fits import sbc

__all__ = ["Calibration", "Comparison", "Diagnosis", "Probes", "compare", "diagnose", "sbc", "to_arviz"]
