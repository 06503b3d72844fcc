"""Where a fit starts: a Gaussian found by search, or one at each mode, in whose frame the flow begins."""

from .._program.log_density import UnconstrainedModel
from ..autoguide._protocol import FitGuide
from ..init import Effort
from ._run_state import Run, is_worse

__all__ = ["locate"]

LEAST_GAIN = 1e-3
"""Nats of the ELBO for which a guide is moved."""


def locate(run: Run, guide: FitGuide, density: UnconstrainedModel, effort: Effort) -> str | None:
    """Moves the guide to the best Gaussian that is found, if that raises its ELBO, and into its frame.

    A mixture moves to one at each mode.

    :param effort: how much to spend on the search.
    :return: the kind of candidate that the Gaussian came from; None if the guide stayed where it was.
    """
    if not guide.can_move():
        return None
    before = run.evaluate()
    kind, move_back = guide.move_to_start(density, effort)
    now = run.evaluate()
    # What was trained before is not given up for the last digits.
    gains = is_worse(before, now) and not bool(now.mean() - before.mean() < LEAST_GAIN)
    # A start that covers several modes is a good one in spite of its ELBO.
    if kind == "modes" or gains:
        return kind
    move_back()
    return None
