"""How much a search for a start may cost."""

from dataclasses import dataclass

__all__ = ["Effort"]

SMALL_BATCH, LARGE_BATCH = 50_000, 1_000_000
"""Elements that a batch of 64 or 16 points and their data may have before a search is cut."""
FEW = 20
"""Latents up to which a cut search takes the fewest draws and steps."""


@dataclass(frozen=True)
class Effort:
    """How much a search for a Gaussian may cost.

    :param starts: L-BFGS runs.
    :param evaluations: batches of evaluations for all of them.
    :param ends: distinct ends of runs that become candidates.
    :param points_on_path: points on the way that do, for each of a few runs.
    :param draws: draws, the same for all, on which candidates are compared; a quarter sorts most of them out.
    :param finalists: candidates that are refined.
    :param refinements: natural-gradient steps on all of them, then on the best.

    Example::

        >>> Effort().starts > Effort.small().starts
        True
    """

    starts: int = 64
    evaluations: int = 400
    ends: int = 4
    points_on_path: int = 12
    draws: int = 128
    finalists: int = 4
    refinements: tuple[int, int] = (50, 80)

    @classmethod
    def small(cls) -> "Effort":
        """For a model that scores one point at a time, or for a short run."""
        return cls(4, 60, 2, 0, 16, 1, (0, 30))

    @classmethod
    def within(cls, elements: int, dim: int) -> "Effort":
        """What a model of so many data at each point allows: smaller batches of fewer candidates.

        :param elements: of the largest tensor at one point.
        :param dim: the number of latents: of many, a covariance takes more draws and steps.
        """
        if 64 * elements <= SMALL_BATCH:
            return cls()
        if 16 * elements > LARGE_BATCH:
            return cls.small()
        return cls(16, 200, 3, 3, 32, 2, (20, 40)) if dim <= FEW else cls(16, 200, 3, 6, 64, 3, (60, 120))
