"""From figures to a verdict, with reasons and advice."""

import math
from dataclasses import dataclass, field
from typing import Final

from ._regions import MAX_SPREAD_DIM
from ._symmetries import Symmetry, share_in_words
from .probes import Probes

__all__ = ["SUPPORT", "VERDICTS", "Figures", "Judgement", "judge", "sound_moments"]

VERDICTS: Final = ("good", "usable", "poor")
"""The best first."""
GOOD_KHAT: Final = 0.5
"""Up to this k-hat the weights have a finite variance."""
GOOD_SHIFT: Final = 0.08
"""Largest difference, in sd and in the log of the sd, between raw and resampled draws for "good".

A tenth less what the estimate itself is off by: a mean .116 sd from the truth had a shift of .09."""
SURE_SHARE: Final = 0.95
"""From this effective fraction of the draws on, a heavy tail of the weights is too rare to matter."""
SMALL_DRIFT: Final = 0.25
"""Largest error of a mean, in sd, that such weights leave room for, by Cauchy and Schwarz."""
USABLE_SHARE: Final = 0.5
"""Least effective fraction of the draws for "usable" where k-hat is above its threshold."""
USABLE_ESS: Final = 100.0
"""Least effective sample size for "usable"."""
MISSED_SHARES: Final = (0.005, 0.03)
"""Share of missed mass from which a fit is not "good", and from which it is "poor"."""
RESAMPLED_SHARE: Final = 0.2
"""Significant difference between chains and resampled draws, in sd, from which these are of no use."""
WEAK_SHARE: Final = 0.1
"""Effective fraction of the draws below which resampled draws are of use only if chains confirm them."""
LARGE_SCALE: Final = math.log(1.2)
"""Change of a scale by resampling, in its logarithm, from which the same holds."""
VAST_SCALE: Final = math.log(1.5)
"""The same from which resampling cannot be trusted whatever chains say."""
MISSED_SHARE_HIGH_DIM: Final = 0.3
"""The latter with more than 20 latents, where short chains measure a mass but roughly."""
LEFT_SHARES: Final = (0.02, 0.1)
"""Share of time outside the region of the guide's draws from which a fit is not "good", and is "poor"."""
SETTLED_RHAT: Final = 1.1
"""Potential scale reduction up to which chains from different starts agree."""
HEAVY_TAIL_INDEX: Final = 0.25
"""Excess of the chains' tail index over the guide's that is worth a word."""
HIGH_DIM: Final = 100
"""From this many latents on, weights of a fit with sound moments are often useless."""
MIXED_RHAT: Final = 1.5
"""Potential scale reduction above which chains from different starts do not agree."""
MIRRORED_SHARE: Final = 0.9
"""Share of the missed mass in mirror images from which these are all that is said of it."""
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
    has_tails: bool = False
    """Whether it was given ``tails=True``."""
    has_rows: bool = False
    """Whether it serves rows of a plate, of which it does not know all data: it resamples none itself."""
    shift_kind: str = ""
    """What kind of latent that is, if the weights are those of the roots."""
    scale_name: str = ""
    scale_noise: float = 0.0
    """Standard error of the change of that scale."""
    num_groups: int = 0
    """Groups of latents that are integrated, so that the weights are those of the roots; 0 without any."""
    num_each: int = 0
    """Draws of each group."""
    local_gap: float = math.nan
    """Nats that all groups together are from their posterior given the roots."""

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
        """Adds a reason; the verdict is then ``rank`` at most (0 poor, 1 usable, 2 good).

        :param advice: what to do about it; there is some wherever the reason lowers the verdict.
        """
        self.rank = min(self.rank, rank)
        self.reasons.append(reason)
        if advice and advice not in self.advice:
            self.advice.append(advice)

    @property
    def verdict(self) -> str:
        return VERDICTS[len(VERDICTS) - 1 - self.rank]

    @property
    def told(self) -> tuple[str, ...]:
        """The advice that goes with the verdict: none with "good", and with "poor" no resampled draws.

        Whatever makes a fit poor makes these unreliable too: few of the draws are effective, chains find mass
        elsewhere or do not confirm them, or their spread is another one altogether.
        """
        if self.rank == 2:
            return ()
        return tuple(line for line in self.advice if self.rank or not line.startswith(RESAMPLE))


RESAMPLE = "use resampled draws"
LONGER = "train longer, with a larger num_steps"
LONGER_FIRST = (
    "train longer, unless the ELBO had stopped rising, which diagnose(..., fit_result=) reads off the result "
    "of fit"
)
RICH_GUIDES = ("AutoRealNVP", "AutoNeuralSpline")
SUPPORT = (
    "give sites the support that the model has, as HalfNormal in place of a factor that forbids values below "
    "zero, or look for overflow in the model"
)


def _resample(f: Figures) -> str:
    own = "guide.sample_posterior(n, resample=True) or " if f.resamples and not f.has_rows else ""
    return f"{RESAMPLE}: {own}to_arviz(..., resample=True)"


def _richer(f: Figures) -> str:
    if f.guide == "AutoFlowMixture":
        return "give AutoFlowMixture more components, or a richer flow"
    if f.dim == 1 and f.guide != RICH_GUIDES[1]:
        return "take AutoNeuralSpline: affine couplings of a single latent are no more than a Gaussian"
    if f.guide in RICH_GUIDES:
        other = next(name for name in RICH_GUIDES if name != f.guide)
        return f"give {f.guide} more layers, or take {other}"
    return f"take a richer guide, AutoRealNVP{' or AutoNeuralSpline' if f.resamples else ''}"


def _slow(f: Figures) -> str:
    if f.guide == "AutoFlowMixture":  # chains between modes are slow, whatever the model is written like
        return _resample(f)
    if f.resamples:
        return "reparameterise the model (LocScaleReparam for a funnel)"
    return (
        "take AutoRealNVP, over whose noise the chains run, or reparameterise (LocScaleReparam for a funnel)"
    )


def _tails(f: Figures) -> str:
    """What helps where tails are too light."""
    if f.has_tails or not _heavier(f):
        return _richer(f)
    name = f.guide if f.resamples and f.guide else "AutoRealNVP"
    return f"{name}(..., tails=True) for tails heavier than a normal's"


def _heavier(f: Figures) -> bool:
    """Whether chains that mixed have heavier tails than the guide's draws."""
    p = f.probes
    return (
        p is not None
        and p.tail_index - f.guide_tail_index > HEAVY_TAIL_INDEX
        and p.rhat < SETTLED_RHAT
        and p.missed < MISSED_SHARES[0]
    )


def _modes(f: Figures, symmetry: Symmetry | None) -> str:
    several = "take AutoFlowMixture, which holds several modes"
    if f.guide == "AutoFlowMixture":
        several = "give AutoFlowMixture more components"
    if symmetry is None or symmetry.explained < MIRRORED_SHARE:
        return several
    order = "order what is exchanged, in one site with dist.transforms.OrderedTransform()"
    positive = "give one of what changes its sign, such as a loading of each factor, a positive support"
    return f"{several}; or {' and '.join([order] * symmetry.exchanges + [positive] * symmetry.signs)}"


def _missed(p: Probes) -> str:
    """What is missed, as the mirror image of what is not where it is one."""
    told = (
        f"chains from far starts settled where the guide does not draw, about {p.missed_at:.0f} sd from "
        f"its mean, with {100 * p.missed:.1f} % of the mass"
    )
    if p.symmetry is None:
        return f"{told}: a missed mode or part of the posterior"
    one = p.symmetry.images == 2
    images = f"mirror image{'' if one else 's'} under {p.symmetry.under}"
    if p.symmetry.explained < MIRRORED_SHARE:
        return f"{told}: missed modes or parts of the posterior, among them this mode's {images}"
    share = share_in_words(1.0 - p.missed)
    return f"this mode has {share} of the mass; its {images} {'is' if one else 'are'} missing"


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
        cleared = judgement.rank and (_sound_weights(figures) or resampling_holds(figures))
        judgement.add("the training had not converged", 1 if cleared else 0, LONGER)
    if figures.num_nonfinite:
        judgement.add(
            f"{figures.num_nonfinite} of {figures.num_samples} draws have a density that is not finite",
            0,
            SUPPORT,
        )
    _longer_first(judgement, figures)
    return judgement


def _longer_first(judgement: Judgement, f: Figures) -> None:
    """Steps before another shape: a flow that has had too few fails like one that is too simple."""
    shape = {_richer(f), _tails(f)}
    if judgement.rank or f.converged or not f.resamples or shape.isdisjoint(judgement.advice):
        return
    if f.converged is None and f.share >= USABLE_SHARE:  # it has the shape of what it covers
        return
    longer = LONGER_FIRST if f.converged is None else LONGER
    judgement.advice = [longer, *(line for line in judgement.advice if line != longer)]


def sound_moments(figures: Figures) -> bool:
    """Whether chains from the guide's draws confirm its moments, whatever its weights are."""
    p = figures.probes
    return _covers(p) and p is not None and not p.differs


def resampling_holds(figures: Figures) -> bool:
    """Whether chains from the guide's draws confirm the moments of the resampled ones."""
    p = figures.probes
    return _covers(p) and p is not None and p.resampled < RESAMPLED_SHARE and p.left < LEFT_SHARES[0]


def _within_chance(f: Figures, p: Probes) -> bool:
    """Whether nearly equal weights rule out a drift of so little, as the chance that it is."""
    return f.share >= SURE_SHARE and max(abs(p.location), abs(p.scale)) < SMALL_DRIFT


def _covers(p: Probes | None) -> bool:
    """Whether chains that moved enough found nothing outside of the guide's draws."""
    return p is not None and p.conclusive and p.missed < MISSED_SHARES[0] and p.left < LEFT_SHARES[1]


def _sound_weights(f: Figures) -> bool:
    return f.share >= SURE_SHARE or (f.khat <= f.khat_threshold and f.share >= USABLE_SHARE)


def _weights(judgement: Judgement, f: Figures) -> None:
    """k-hat, effective share and the shift from raw to resampled draws."""
    within, sure = f.khat <= f.khat_threshold, f.share >= SURE_SHARE
    told = f"k-hat {f.khat:.3f} is {'within' if within else 'above'} {f.khat_threshold:.3f}"
    effective = f"{100 * f.share:.1f} % of the draws are effective"
    if f.num_groups:
        effective += (
            f", by weights of the roots with {f.num_groups:,} groups of latents integrated by "
            f"{f.num_each} draws each"
        )
    confirmed = resampling_holds(f) or sound_moments(f)
    if within or f.share >= USABLE_SHARE:
        light = "" if within else ": rare draws carry much weight"
        if math.isfinite(f.khat):
            good = f.khat <= GOOD_KHAT or sure
            judgement.add(
                told + (light and light + ", which matters little here" * sure),
                2 if good else 1,
                "" if good else _resample(f),
            )
        enough = f.ess >= USABLE_ESS and (f.share >= WEAK_SHARE or confirmed)
        judgement.add(effective, 2 if enough else 0, "" if enough else _richer(f))
        _shifts(judgement, f, confirmed)
    elif sound_moments(f):
        where = f", as often with {f.dim} latents" if f.dim >= HIGH_DIM else ""
        judgement.add(
            f"the moments are sound, the weights are not{where}: {told} and {effective}, but chains confirm "
            "means and spreads",
            1,
            "use the draws as they are, without resampling, for means and intervals, not for rare events",
        )
    else:
        judgement.add(f"{told}: rare draws carry much weight, the guide's tails are too light", 0, _tails(f))
        judgement.add(effective)
        judgement.add(
            f"resampling would move {f.shift_name} by {f.shift:.2f} sd, as far as the weights can tell"
        )
    if f.elbo_se > LARGE_SE:
        judgement.add(f"the ELBO itself is uncertain, ± {f.elbo_se:.2f}")
    if f.num_groups and f.local_gap >= LARGE_SE:
        judgement.add(
            f"apart from the roots, the groups given these are {f.local_gap:.2f} nats from their posterior, "
            f"{f.local_gap / f.num_groups:.2g} each: their latents are not quite of the guide's shape"
        )


def _shifts(judgement: Judgement, f: Figures, confirmed: bool) -> None:
    if math.isnan(f.shift):
        return
    small = f.shift < GOOD_SHIFT
    judgement.add(
        f"resampling moves no mean by more than {f.shift:.2f} sd"
        if small
        else f"resampling moves the mean of {f.shift_name}{f.shift_kind} by {f.shift:.2f} sd",
        2 if small else 1,
        "" if small else _resample(f),
    )
    # Where all weights are nearly equal a single draw far out may still carry a scale.
    chance = f.share >= SURE_SHARE and f.scale_shift < 2.0 * f.scale_noise
    if f.scale_shift >= GOOD_SHIFT and not chance:
        large = f.scale_shift >= VAST_SCALE or (f.scale_shift >= LARGE_SCALE and not confirmed)
        change = 100.0 * math.expm1(min(f.scale_shift, 9.0))
        judgement.add(
            f"resampling changes the sd of {f.scale_name} by {change:.0f} %",
            0 if large else 1,
            _richer(f) if large else _resample(f),
        )


def _probes(judgement: Judgement, f: Figures, p: Probes) -> None:
    holds = p.resampled < RESAMPLED_SHARE and p.left < LEFT_SHARES[0]
    if p.missed >= MISSED_SHARES[0]:
        enough = MISSED_SHARES[1] if f.dim <= MAX_SPREAD_DIM else MISSED_SHARE_HIGH_DIM
        judgement.add(_missed(p), 0 if p.missed >= enough else 1, _modes(f, p.symmetry))
    if p.left >= LEFT_SHARES[0]:
        judgement.add(
            f"chains from the guide's draws spend {100 * p.left:.0f} % of the time where it does not draw",
            0 if p.left >= LEFT_SHARES[1] else 1,
            _richer(f),
        )
    if p.differs and not _within_chance(f, p):
        judgement.add(
            f"chains from the guide's draws drift: centre {p.location:+.2f} ± {p.location_se:.2f} sd at "
            f"{p.location_name}, spread × {math.exp(min(p.scale, 9.0)):.2f} at {p.scale_name}",
            1 if holds else 0,
            _resample(f) if judgement.rank and holds else _richer(f),
        )
    elif not p.conclusive:
        judgement.add(
            f"chains mix too slowly to confirm the moments (± {max(p.location_se, p.scale_se):.2f} sd)",
            1,
            _slow(f),
        )
    elif p.rhat > MIXED_RHAT:
        judgement.add(f"chains from different starts do not agree yet, R-hat {p.rhat:.2f}", 1, _slow(f))
    elif p.missed < MISSED_SHARES[0] and p.left < LEFT_SHARES[0]:
        judgement.add("chains from the guide's draws and from far around them agree with it")
    if _heavier(f):
        judgement.add(
            f"the posterior has heavier tails (index {p.tail_index:.2f}) than the guide "
            f"({f.guide_tail_index:.2f})",
            advice=_tails(f),
        )
