"""Whether a fit can be trusted: a verdict with reasons, a comparison of guides, an export to ArviZ."""

from .arviz_export import to_arviz
from .comparison import Comparison, compare
from .diagnosis import Diagnosis, diagnose
from .probes import Probes

__all__ = ["Comparison", "Diagnosis", "Probes", "compare", "diagnose", "to_arviz"]
