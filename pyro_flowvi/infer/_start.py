"""Where a fit starts: a Gaussian found by search, in whose frame the flow begins, or an earlier guide."""

from typing import Any

from .._compile.log_density import traced
from .._program.flat_directions import flat_sites
from .._program.log_density import UnconstrainedModel
from ..autoguide._protocol import FitGuide, Taken
from ..init import Effort
from ._result import FitResult
from ._run_state import Run, is_worse
from ._training_loop import TrainingLoop

__all__ = ["locate", "move", "take_over"]

LEAST_GAIN = 1e-3
"""Nats of the ELBO for which a guide is moved."""
THOROUGH_FROM = 2000
"""Draws in a whole run from which a thorough search for the start is worth its own."""


def take_over(init: Any, guide: FitGuide, density: UnconstrainedModel | None, all_data: bool) -> Taken:
    """Moves a guide to where an earlier one is.

    :param init: the earlier guide, or what its fit has returned.
    :param all_data: whether the density has all data, or a part.
    :raises ValueError: if nothing can be taken over.
    """
    return guide.take_over(init.guide if isinstance(init, FitResult) else init, density, all_data)


def move(loop: TrainingLoop, guide: FitGuide, density: UnconstrainedModel | None, near: bool = False) -> None:
    """Moves the guide of a run to where it starts.

    :param near: whether it is there already, but for its frame.
    :raises ValueError: if the posterior is flat along a direction.
    """
    if density is None or not guide.can_move():
        return
    if flat := flat_sites(density):
        raise ValueError(
            "model: expected a proper posterior, got one that is flat along a direction of the sites "
            f"{flat}, whose priors are improper: the data say nothing there; give one a proper prior"
        )
    if near:
        loop.start = guide.move_to_start(density, Effort.small())[0]
        return
    draws, largest = loop.num_steps * loop.run.loss.num_particles, loop.run.judge.structure.largest
    effort = Effort.within(largest, density.dim) if draws >= THOROUGH_FROM else Effort.small()
    if not traced(density, effort.starts).batched:
        effort = Effort.small()
    loop.bar.tell(f"search for a start: {effort.starts} runs of L-BFGS")
    loop.start = locate(loop.run, guide, density, effort)


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
