"""Pictures.  matplotlib, the extra ``plot``, is imported when one is drawn."""

from .calibration import plot_calibration
from .fits import COLOURS, pair_panels, plot_images, plot_khat, plot_pairs, plot_trace
from .mixtures import animate_mixture, plot_mixture

__all__ = [
    "COLOURS",
    "animate_mixture",
    "pair_panels",
    "plot_calibration",
    "plot_images",
    "plot_khat",
    "plot_mixture",
    "plot_pairs",
    "plot_trace",
]
