"""Pictures.  matplotlib, the extra ``plot``, is imported when one is drawn.

Every function takes ``ax=`` and returns what it has drawn on.

- ``ax=None``: a new figure, on white whatever the style, so that a saved picture is legible on a dark page
  too.
- ``ax=`` an Axes where there is one panel, or as many Axes as there are panels, row by row, as of
  ``pyplot.subplots``: these are drawn on, in the caller's style.
- ``ax=`` a Figure or SubFigure: the panels are made in it; its layout is the caller's
  (``layout="constrained"``).

:func:`plot_images`, :func:`plot_mixture` and :func:`plot_ppc` have one panel and return an Axes, the others
an array of Axes.  The figure is ``axis.figure``, or ``axes.flat[0].figure``; its ``savefig`` writes a file.
"""

from ._panels import COLOURS
from .calibration import plot_calibration
from .images import plot_images
from .marginals import plot_marginals
from .mixtures import animate_mixture, plot_mixture
from .pairs import pair_panels, plot_pairs
from .predictive import plot_ppc
from .traces import plot_trace
from .weights import plot_khat

__all__ = [
    "COLOURS",
    "animate_mixture",
    "pair_panels",
    "plot_calibration",
    "plot_images",
    "plot_khat",
    "plot_marginals",
    "plot_mixture",
    "plot_pairs",
    "plot_ppc",
    "plot_trace",
]
