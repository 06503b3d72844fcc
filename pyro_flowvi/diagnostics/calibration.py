"""What simulation-based calibration found: ranks, whether they are uniform, and what their shape says."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import NormalDist
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _html
from .._shapes import scalar_name
from ._ranks import LOCATION_UNIT, SCALE_UNIT
from ._uniformity import uniform_p_value
from ._verdict import VERDICTS

__all__ = ["Calibration"]

Array = NDArray[Any]
LOG_DENSITY: Final = "log density"
"""In place of a site: the joint log density of data and latents; its ranks see what each latent's cannot."""
LEVELS: Final = (0.01, 0.05)
"""Adjusted p values below which ranks are not uniform, or doubtful."""
FEWEST_FITS: Final = 20
"""Fewer show nothing but what is grossly wrong."""
MOST_LISTED: Final = 5
TWO_SIDED: Final = 1.96
NINE_OF_TEN: Final = 1.28
"""Quantiles of the standard normal: of a level of 5 %, and of 90 %."""
SMALLEST_SHAPE: Final = 2.0
"""Standard errors by which the mean or the spread of ranks is off, for it to name their shape."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranks of a model's own draws among those of guides that were fitted to their data.

    Where the guides are the posteriors all ranks between 0 and S are equally likely.

    :param ranks: name -> of each fit the rank of every scalar of a site, ``(N,) + site shape``; -1 where a
        scalar has no rank, being masked out or constant.  "log density" is the joint log density of data and
        latents.
    :param num_samples: number S of draws of each guide.
    :param num: fits that were wanted; N and the failures are fewer where the run was interrupted.
    :param verdicts: what :func:`pyro_flowvi.diagnose` said of each of the N, if it was asked.
    :param failures: of each fit that failed its number, from 0, and why.
    :param notes: what the fits warned of, and how many of them.

    Example::

        >>> ranks = np.random.default_rng(0).integers(0, 101, (200, 2))
        >>> found = Calibration({"x": ranks, "narrow": np.where(ranks[:, 0] < 50, 5, 95)}, 100, 200)
        >>> print(found)
        not calibrated: of 3 scalars in 200 fits the ranks of narrow are not uniform
          narrow: p < 0.0001, U-shaped: the guide is too narrow, its sd about 0.3 of the posterior's
          x[1]: p 0.12
          x[:]: p 0.21
          x[0]: p 0.94
        >>> found.p_values["x"].shape
        (2,)
    """

    ranks: dict[str, Array]
    num_samples: int
    num: int
    verdicts: tuple[str, ...] | None = None
    failures: tuple[tuple[int, str], ...] = ()
    notes: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number N of fits with ranks."""
        return len(next(iter(self.ranks.values()), ()))

    @cached_property
    def p_values(self) -> dict[str, Array]:
        """name -> the chance that uniform ranks deviate as much, of every scalar; NaN where it has none."""
        found = {name: np.full(ranks.shape[1:], math.nan) for name, ranks in self.ranks.items()}
        for name, p_values in found.items():
            for index in np.ndindex(p_values.shape):
                ranks = self._ranks_of(name, index)
                if len(ranks):
                    p_values[index] = uniform_p_value(ranks, self.num_samples + 1)
        return found

    def _ranks_of(self, name: str, index: tuple[int, ...]) -> Array:
        ranks: Array = np.moveaxis(self.ranks[name], 0, -1)[index]
        return ranks[ranks >= 0]

    @cached_property
    def scalars(self) -> dict[str, tuple[float, Array]]:
        """p value and ranks of each scalar that has some, by a name such as ``theta[2]``; the worst first."""
        found = {}
        for name, p_values in self.p_values.items():
            for index in np.ndindex(p_values.shape):
                if not math.isnan(p_values[index]):
                    found[scalar_name(name, index)] = (float(p_values[index]), self._ranks_of(name, index))
        return dict(sorted(found.items(), key=lambda item: item[1][0]))

    @cached_property
    def _shapes(self) -> "dict[str, _Shape]":
        """What is tested: each scalar, and all those of a site together, as ``theta[:]``."""
        found = {
            label: _Shape.of(p, (ranks + 0.5) / (self.num_samples + 1))
            for label, (p, ranks) in self.scalars.items()
        }
        for name, ranks in self.ranks.items():
            known = ranks.reshape(len(ranks), -1)
            known = known[:, (known >= 0).all(0)]
            if known.shape[-1] > 1 and len(known) >= FEWEST_FITS:
                found[f"{name}[:]"] = _Shape.together((known + 0.5) / (self.num_samples + 1))
        return dict(sorted(found.items(), key=lambda item: item[1].p))

    def adjusted(self) -> dict[str, float]:
        """p values by scalar, adjusted by Holm's method for how many there are; the smallest first.

        With them are, by a name such as ``theta[:]``, those of all scalars of a site together, which show
        what is slightly wrong in each of them: t tests over the fits of the mean rank, and of its mean
        distance from the middle.  The chance that any is below a level, where all ranks are uniform, is at
        most that level, however the scalars depend on one another.

        Example::

            >>> found = Calibration({"x": np.arange(20), "y": np.full(20, 10)}, 19, 20)
            >>> {label: round(p, 4) for label, p in found.adjusted().items()}
            {'y': 0.0, 'x': 1.0}
        """
        adjusted, largest = {}, 0.0
        for i, (label, shape) in enumerate(self._shapes.items()):
            largest = max(largest, min(1.0, (len(self._shapes) - i) * shape.p))
            adjusted[label] = largest
        return adjusted

    @property
    def p_value(self) -> float:
        """The smallest adjusted p value: below 0.05 in at most 5 % of runs where the guides are exact."""
        return min(self.adjusted().values(), default=1.0)

    @property
    def verdict(self) -> str:
        """What the p value says: "not calibrated" below 0.01, "doubtful" below 0.05, else "calibrated".

        "undecided" where fewer than 20 fits show nothing.
        """
        if self.p_value < LEVELS[1]:
            return "not calibrated" if self.p_value < LEVELS[0] else "doubtful"
        return "calibrated" if len(self) >= FEWEST_FITS else "undecided"

    def shape(self, label: str) -> str:
        """What the ranks of a scalar look like, and what follows for the guide, in words.

        :param label: its name, such as ``theta[2]``, or ``theta[:]`` for all of the site together.
        :raises KeyError: for another name.

        Example::

            >>> Calibration({"x": np.full(100, 90)}, 100, 100).shape("x")
            'high: the guide lies too low, by about 1.4 sd'
        """
        found = self._shapes[label]
        if max(abs(found.slope), abs(found.width)) < SMALLEST_SHAPE:
            return "of no common shape"
        if abs(found.slope) >= abs(found.width):
            which, where, how = ("high", "low", "less") if found.slope > 0 else ("low", "high", "more")
            if label == LOG_DENSITY:
                return f"{which}: the guide's draws are {how} likely than the latents of the data"
            return f"{which}: the guide lies too {where}, by about {abs(found.off) / LOCATION_UNIT:.1f} sd"
        which, what = ("U-shaped", "narrow") if found.width > 0 else ("humped", "wide")
        ratio = math.exp(-found.spread / SCALE_UNIT)
        return f"{which}: the guide is too {what}, its sd about {ratio:.1f} of the posterior's"

    def among(self, verdict: str) -> "Calibration":
        """The fits of one verdict alone: whether what is called good is calibrated.

        A verdict depends on the data and not on the latents that they were drawn from, so that the ranks of
        exact guides are uniform among those of a verdict, too.

        :param verdict: "good", "usable" or "poor".
        :raises ValueError: without verdicts.

        Example::

            >>> found = Calibration({"x": np.arange(4)}, 3, 4, ("good", "poor", "good", "good"))
            >>> found.among("good").ranks["x"]
            array([0, 2, 3])
        """
        if self.verdicts is None:
            raise ValueError("verdicts: expected those of a run with verdicts=True, got none")
        chosen = np.array([found == verdict for found in self.verdicts], dtype=bool)
        return replace(
            self,
            ranks={name: ranks[chosen] for name, ranks in self.ranks.items()},
            num=int(chosen.sum()),
            verdicts=(verdict,) * int(chosen.sum()),
            failures=(),
            notes={},
        )

    def plot(self, names: list[str] | None = None, *, ax: Any = None) -> Any:
        """Draws distribution functions and histograms of ranks; as
        :func:`~pyro_flowvi.plotting.plot_calibration`.

        :param names: the scalars to show; by default the worst ones.
        :param ax: 2 × K matplotlib Axes, or a Figure or SubFigure to make them in; None for a new figure.
        :return: an array of the Axes, ``(2, K)``.
        :raises ImportError: without matplotlib.
        """
        from ..plotting import plot_calibration

        return plot_calibration(self, names=names, ax=ax)

    def __str__(self) -> str:
        lines = [self._head()]
        for label, p, words in self._lines():
            lines.append(f"  {label}: p {p}{f', {words}' if words else ''}")
        return "\n".join(lines + [f"  {note}" for note in self._remarks()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        verdict, _, rest = self._head().partition(": ")
        return _html.block(
            _html.paragraph(rest, strong=f"{verdict}:"),
            _html.table(("scalar", "p", "its ranks"), self._lines()),
            _html.bullets(self._remarks()),
        )

    def _wrong(self) -> list[str]:
        """What has ranks that are not uniform."""
        return [label for label, p in self.adjusted().items() if p < LEVELS[1]]

    def _head(self) -> str:
        wrong = self._wrong()
        head = f"{self.verdict}: of {len(self.scalars)} scalars in {len(self)} fits "
        return head + (_told(wrong) if wrong else f"none has ranks that are not uniform{self._seen()}")

    def _lines(self) -> list[tuple[str, str, str]]:
        """The smallest p values, with a word on the ranks where they are not uniform."""
        wrong = self._wrong()
        return [
            (label, _number(shape.p), self.shape(label) if label in wrong else "")
            for label, shape in [*self._shapes.items()][:MOST_LISTED]
        ]

    def _remarks(self) -> list[str]:
        """What there is to say beside the p values."""
        remarks = []
        if len(self._shapes) > MOST_LISTED:
            remarks.append(f"and {len(self._shapes) - MOST_LISTED} with larger p")
        if self.verdicts is not None:
            counts = Counter(self.verdicts)
            remarks.append("fits: " + ", ".join(f"{counts[v]} {v}" for v in VERDICTS))
        if self.failures:
            number, why = self.failures[0]
            remarks.append(f"{len(self.failures)} of {self.num} fits failed, the first at {number}: {why}")
        left = self.num - len(self) - len(self.failures)
        if left:
            remarks.append(f"interrupted with {left} fits to go")
        return remarks + [f"{count} fits warned: {note}" for note, count in self.notes.items()]

    def _seen(self) -> str:
        if len(self) < FEWEST_FITS:
            return f"; fewer than {FEWEST_FITS} fits show what is grossly wrong and nothing else"
        # What it finds nine times of ten, as runs with normal posteriors show for a single scalar.
        each = NormalDist().inv_cdf(1.0 - 0.5 * LEVELS[1] / max(1, len(self._shapes)))
        unit = (each + NINE_OF_TEN) / (TWO_SIDED + NINE_OF_TEN) / math.sqrt(len(self))
        return (
            f"; so many would mostly show a mean that is off by {4 * unit:.1g} sd, or an sd by a factor of "
            f"{math.exp(3.6 * unit):.2g}"
        )


class _Shape(NamedTuple):
    """A p value, how far ranks between 0 and 1 are from the middle, and that in standard errors."""

    p: float
    off: float
    """Their mean, less 1/2."""
    slope: float
    spread: float
    """Their mean distance from 1/2, less 1/4."""
    width: float

    @classmethod
    def of(cls, p: float, u: Array) -> "_Shape":
        off, spread = float(u.mean()) - 0.5, float(np.abs(u - 0.5).mean()) - 0.25
        return cls(p, off, off * math.sqrt(12 * len(u)), spread, spread * math.sqrt(48 * len(u)))

    @classmethod
    def together(cls, u: Array) -> "_Shape":
        """Of all columns, which may depend on one another: fits do not."""
        from scipy.special import stdtr

        means = np.stack([u.mean(1) - 0.5, np.abs(u - 0.5).mean(1) - 0.25])
        off, spread = means.mean(1)
        t = means.mean(1) / np.maximum(means.std(1, ddof=1) / math.sqrt(len(u)), 1e-12)
        p = 2.0 * 2.0 * float(stdtr(len(u) - 1, -np.abs(t).max()))
        return cls(min(1.0, p), float(off), float(t[0]), float(spread), float(t[1]))


def _told(wrong: list[str]) -> str:
    shown = ", ".join(wrong[:MOST_LISTED])
    more = f" and {len(wrong) - MOST_LISTED} others" if len(wrong) > MOST_LISTED else ""
    return f"the ranks of {shown}{more} are not uniform"


def _number(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"
