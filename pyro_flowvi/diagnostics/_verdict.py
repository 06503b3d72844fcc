"""From figures to a verdict, with reasons and advice."""

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ._regions import MAX_SPREAD_DIM
from .probes import Probes

__all__ = ["Figures", "Judgement", "judge", "shifts", "sound_moments"]

GOOD_KHAT: Final = 0.5
"""Up to this k-hat the weights have a finite variance."""
GOOD_SHIFT: Final = 0.08
"""Largest difference, in sd and in the log of the sd, between raw and resampled draws for "good".

A tenth less what the estimate itself is off by: a mean .116 sd from the truth had a shift of .09."""
SURE_SHARE: Final = 0.95
"""From this effective fraction of the draws on, a heavy tail of the weights is too rare to matter."""
USABLE_SHARE: Final = 0.5
"""Least effective fraction of the draws for "usable" where k-hat is above its threshold."""
USABLE_ESS: Final = 100.0
"""Least effective sample size for "usable"."""
MISSED_SHARES: Final = (0.005, 0.03)
"""Share of missed mass from which a fit is not "good", and from which it is "poor"."""
RESAMPLED_SHARE: Final = 0.3
"""Significant difference between chains and resampled draws, in sd, from which these are of no use."""
MISSED_SHARE_HIGH_DIM: Final = 0.3
"""The latter with more than 20 latents, where short chains measure a mass but roughly."""
LEFT_SHARE: Final = 0.1
"""Share of time outside the region of the guide's draws from which chains are said to leave it."""
HEAVY_TAIL_INDEX: Final = 0.25
"""Excess of the chains' tail index over the guide's that is worth a word."""
HIGH_DIM: Final = 100
"""From this many latents on, weights of a fit with sound moments are often useless."""
MIXED_RHAT: Final = 1.5
"""Potential scale reduction above which chains from different starts do not agree."""
MIXED_SHARE: Final = 0.8
"""Effective fraction of the draws from which that is the chains' fault: between two modes, say."""
LARGE_SE: Final = 0.1
"""Standard error of the ELBO, nats, above which it is a reason of its own."""


@dataclass(frozen=True)
class Figures:
    """What the verdict rests on; names as in :class:`Diagnosis`."""

    khat: float
    khat_threshold: float
    ess: float
    elbo_se: float
    num_samples: int
    num_nonfinite: int
    dim: int
    shift: float
    scale_shift: float
    shift_name: str
    guide_tail_index: float
    probes: Probes | None
    converged: bool | None
    guide: str = ""
    """The name of the guide's class."""
    resamples: bool = True
    """Whether the guide is one of this package, with ``sample_posterior`` and ``tails``."""

    @property
    def share(self) -> float:
        return self.ess / self.num_samples


@dataclass
class Judgement:
    """A verdict that findings can only lower."""

    rank: int = 2
    reasons: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def add(self, reason: str, rank: int = 2, advice: str = "") -> None:
        """Adds a reason; the verdict is then ``rank`` at most (0 poor, 1 usable, 2 good)."""
        self.rank = min(self.rank, rank)
        self.reasons.append(reason)
        if advice and advice not in self.advice:
            self.advice.append(advice)

    @property
    def verdict(self) -> str:
        return ("poor", "usable", "good")[self.rank]


LONGER = "train longer, or with more particles"
EASIER = "reparameterise the model (LocScaleReparam for a funnel)"
RICH_GUIDES = ("AutoRealNVP", "AutoNeuralSpline")


def _resample(f: Figures) -> str:
    own = "guide.sample_posterior(n, resample=True) or " if f.resamples else ""
    return f"use resampled draws: {own}to_arviz(..., resample=True)"


def _richer(f: Figures) -> str:
    if f.guide == "AutoFlowMixture":
        return "give AutoFlowMixture more components, or a richer flow"
    others = " or ".join(name for name in RICH_GUIDES if name != f.guide)
    if f.guide in RICH_GUIDES:
        return f"give {f.guide} more layers, or take another guide: {others}, AutoFlowMixture"
    return f"take a richer guide: {others}{', or more layers' if f.resamples else ''}"


def _tails(f: Figures) -> str:
    name = f.guide if f.resamples and f.guide else "AutoFlow"
    return f"{name}(..., tails=True) for tails heavier than a normal's"


def _modes(f: Figures) -> str:
    several = (
        "give it more components" if f.guide == "AutoFlowMixture" else "AutoFlowMixture holds several modes"
    )
    return f"fit from other starts (init_loc_fn, seed) and compare the ELBOs; {several}"


def judge(figures: Figures) -> Judgement:
    """The verdict on a fit.

    Example::

        >>> exact = Figures(0.1, 0.7, 3990.0, 0.001, 4000, 0, 2, 0.01, 0.01, "x", 0.0, None, None)
        >>> judge(exact).verdict
        'good'
    """
    judgement = Judgement()
    _weights(judgement, figures)
    if figures.probes is not None:
        _probes(judgement, figures, figures.probes)
    if figures.converged is False:
        judgement.add("the training had not converged", 1, LONGER)
    if figures.num_nonfinite:
        judgement.add(
            f"{figures.num_nonfinite} of {figures.num_samples} draws have a density that is not finite",
            0,
            "look for draws outside the model's support, or for overflow in the model",
        )
    return judgement


def sound_moments(figures: Figures) -> bool:
    """Whether chains from the guide's draws confirm its moments, whatever its weights are."""
    p = figures.probes
    if p is None:
        return False
    return not p.differs and p.conclusive and p.missed < MISSED_SHARES[0] and p.left < LEFT_SHARE


def _weights(judgement: Judgement, f: Figures) -> None:
    """k-hat, effective share and the shift from raw to resampled draws."""
    within, sure = f.khat <= f.khat_threshold, f.share >= SURE_SHARE
    told = f"k-hat {f.khat:.3f} is {'within' if within else 'above'} {f.khat_threshold:.3f}"
    effective = f"{100 * f.share:.1f} % of the draws are effective"
    if within or sure:
        rare = "" if within else ": rare draws carry much weight, which matters little here"
        judgement.add(told + rare, 2 if f.khat <= GOOD_KHAT or sure else 1, "" if sure else _resample(f))
        judgement.add(effective, 2 if f.ess >= USABLE_ESS else 0, "" if f.ess >= USABLE_ESS else _richer(f))
        _shifts(judgement, f)
    elif f.share >= USABLE_SHARE:
        judgement.add(
            f"{told}: rare draws carry much weight, the guide's tails are too light", 1, _resample(f)
        )
        judgement.add(effective)
        _shifts(judgement, f)
    elif sound_moments(f):
        where = f", as often with {f.dim} latents" if f.dim >= HIGH_DIM else ""
        judgement.add(
            f"the moments are sound, the weights are not{where}: k-hat {f.khat:.3f} is above "
            f"{f.khat_threshold:.3f} and {effective}, but chains confirm means and spreads",
            1,
            "use the draws as they are, without resampling, for means and intervals, not for rare events",
        )
    else:
        judgement.add(f"{told}: rare draws carry much weight, the guide's tails are too light", 0, _richer(f))
        judgement.add(effective, advice=LONGER)
        judgement.add(
            f"resampling would move {f.shift_name} by {f.shift:.2f} sd, as far as the weights can tell",
            advice=EASIER,
        )
    if f.elbo_se > LARGE_SE:
        judgement.add(f"the ELBO itself is uncertain, ± {f.elbo_se:.2f}")


def _shifts(judgement: Judgement, f: Figures) -> None:
    if math.isnan(f.shift):
        return
    small = f.shift < GOOD_SHIFT
    judgement.add(
        f"resampling moves no mean by more than {f.shift:.2f} sd"
        if small
        else f"resampling moves the mean of {f.shift_name} by {f.shift:.2f} sd",
        2 if small else 1,
        "" if small else _resample(f),
    )
    if f.scale_shift >= GOOD_SHIFT:
        judgement.add(
            f"resampling changes an sd by {100 * math.expm1(min(f.scale_shift, 9.0)):.0f} %", 1, _resample(f)
        )


def _probes(judgement: Judgement, f: Figures, p: Probes) -> None:
    if p.missed >= MISSED_SHARES[0]:
        enough = MISSED_SHARES[1] if f.dim <= MAX_SPREAD_DIM else MISSED_SHARE_HIGH_DIM
        judgement.add(
            f"chains from far starts settled where the guide does not draw, about {p.missed_at:.0f} sd from "
            f"its mean, with {100 * p.missed:.1f} % of the mass: a missed mode or part of the posterior",
            0 if p.missed >= enough else 1,
            _modes(f),
        )
    if p.left >= LEFT_SHARE:
        judgement.add(
            f"chains from the guide's draws spend {100 * p.left:.0f} % of the time where it does not draw",
            1 if judgement.rank > 0 and p.resampled < RESAMPLED_SHARE else 0,
            LONGER,
        )
    if p.differs:
        judgement.add(
            f"chains from the guide's draws drift: centre {p.location:+.2f} ± {p.location_se:.2f} sd at "
            f"{p.location_name}, spread × {math.exp(min(p.scale, 9.0)):.2f} at {p.scale_name}",
            0 if p.resampled >= RESAMPLED_SHARE else 1,
            _resample(f) if judgement.rank and p.resampled < RESAMPLED_SHARE else LONGER,
        )
    elif not p.conclusive:
        judgement.add(
            f"chains mix too slowly to confirm the moments (± {max(p.location_se, p.scale_se):.2f} sd)",
            1,
            EASIER,
        )
    elif p.rhat > MIXED_RHAT and f.share < MIXED_SHARE:
        judgement.add(f"chains from different starts do not agree yet, R-hat {p.rhat:.2f}", 1, EASIER)
    elif p.missed < MISSED_SHARES[0] and p.left < LEFT_SHARE:
        judgement.add("chains from the guide's draws and from far around them agree with it")
    if p.tail_index - f.guide_tail_index > HEAVY_TAIL_INDEX and p.missed < MISSED_SHARES[0]:
        judgement.add(
            f"the posterior has heavier tails (index {p.tail_index:.2f}) than the guide "
            f"({f.guide_tail_index:.2f})",
            advice=_tails(f),
        )


def shifts(z: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float, int]:
    """Worst |raw mean - weighted mean| / weighted sd and where; worst |log(weighted sd / raw sd)|.

    :param z: draws, ``(S, D)``.
    :param weights: smoothed, summing to one, ``(S,)``.
    """
    centre = z.mean(0)
    centred = z - centre
    moved = weights @ centred
    variance = np.maximum(weights @ (centred - moved) ** 2, 0.0)
    sd, raw = np.sqrt(variance), centred.std(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_shift = np.nan_to_num(np.abs(moved) / sd, nan=0.0, posinf=np.inf)
        log_ratio = np.nan_to_num(np.abs(np.log(sd / raw)), nan=0.0, posinf=np.inf)
    worst = int(np.argmax(mean_shift))
    return float(mean_shift[worst]), float(log_ratio.max()), worst
