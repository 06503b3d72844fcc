"""Whether a guide's predictions can be trusted, whatever its latents: by weights and by chains.

Networks and other models whose parameters are not identified have many modes with the same predictions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._chains import ChainStates
from ._outputs import Evaluated, Outputs
from ._ranks import gap_of
from ._settled import elsewhere, settled
from ._verdict import (
    LONGER,
    USABLE_ESS,
    USABLE_SHARE,
    Figures,
    Judgement,
    _longer_first,
    _resample,
    _richer,
    _slow,
)
from ._weights import WeightFigures

__all__ = ["Agreement", "Predictions", "compare_outputs", "judge_predictions"]

Array = NDArray[np.float64]
MEAN_LIMIT: Final = 0.1
"""Largest difference of a predictive mean, in predictive sd."""
COVERAGE: Final = 0.9
COVERAGE_LIMIT: Final = 0.03
"""Largest difference of an interval's coverage."""
LEVEL: Final = 0.05
"""Chance that an exact guide shows a significant difference in any output."""
NOISY: Final = 2.0 / 3.0
"""Standard error, in units of the limit, from which on a comparison decides nothing."""
WINSORISED: Final = (0.005, 0.995)
"""Quantiles of the guide's draws at which an output without a mean is cut off."""


@dataclass(frozen=True)
class Agreement:
    """How the predictions of a guide's draws differ from others.

    :param gap: of a predictive mean, in predictive sd, at the output where it is worst, less its noise.
    :param gap_se: its standard error.
    :param name: that output.
    :param low: least coverage of a 90 % interval of the guide.
    :param high: largest one.
    :param coverage_se: the larger of their standard errors.
    :param differs: whether a gap or a coverage is beyond its limit, significantly among all of them.
    :param close: whether one is significant, and beyond its limit by twice its standard error.
    :param noisy: whether the standard errors leave open what is within the limits.
    """

    gap: float
    gap_se: float
    name: str
    low: float
    high: float
    coverage_se: float
    differs: bool
    close: bool
    noisy: bool

    @property
    def coverage(self) -> float:
        """The coverage that is farther from 90 %."""
        return max(self.low, self.high, key=lambda value: abs(value - COVERAGE))

    def __str__(self) -> str:
        return (
            f"means are off by {self.gap:.2f} ± {self.gap_se:.2f} sd (at {self.name}), 90 % intervals hold "
            f"{100 * self.low:.0f} to {100 * self.high:.0f} % (± {100 * self.coverage_se:.1f})"
        )


@dataclass(frozen=True)
class Predictions:
    """A guide's predictions against those of resampled draws and of chains.

    :param sites: the outputs' sites.
    :param num_outputs: outputs that were compared.
    :param total: outputs that there are.
    :param by_weights: resampled draws; as far as the weights can tell.
    :param by_chains: chains from the guide's draws; then these with those from far starts that settled in
        other modes, if any did; empty without chains.
    :param resampled: these against the resampled draws.
    :param elsewhere: chains that settled in other modes.
    :param share: of the posterior mass there.
    """

    sites: list[str]
    num_outputs: int
    total: int
    by_weights: Agreement
    by_chains: Sequence[Agreement] = ()
    resampled: Sequence[Agreement] = ()
    elsewhere: int = 0
    share: float = 0.0

    @property
    def of_chains(self) -> Agreement | None:
        """What the chains say: that of other modes where it is a clear no."""
        clear = [found for found in self.by_chains if found.differs]
        return next(iter([*clear, *self.by_chains]), None)

    def figures(self) -> dict[str, float]:
        """Those of :class:`Diagnosis`."""
        found = {
            "predictive_shift": self.by_weights.gap,
            "predictive_coverage": self.by_weights.coverage,
        }
        if self.of_chains is not None:
            found |= {"chains_shift": self.of_chains.gap, "chains_coverage": self.of_chains.coverage}
        return found


class _Reference:
    """The guide's own predictions, on which all comparisons are made."""

    def __init__(self, guide: Evaluated, names: list[str]) -> None:
        self.names = names
        self.low, self.high = np.quantile(
            guide.drawn.reshape(-1, guide.drawn.shape[-1]), [0.5 - COVERAGE / 2, 0.5 + COVERAGE / 2], axis=0
        )
        self.first = guide.first
        self.inside = self.covered(guide)
        self.mean = guide.first.mean(0)
        self.sd = _sd(self.mean, guide.second.mean(0))

    def covered(self, found: Evaluated) -> Array:
        """Share of the draws at each point that fall into the guide's intervals, ``(S, N)``."""
        inside: Array = ((found.drawn >= self.low) & (found.drawn <= self.high)).mean(0)
        return inside

    def agreement(self, found: "_Found") -> Agreement:
        """What differences say, all outputs together."""
        from scipy.special import stdtrit

        scale = np.maximum(found.sd, 1e-9 * (np.abs(self.mean) + self.sd + 1e-300))
        gap, se = np.abs(found.gap) / scale, found.se / scale
        covered, covered_se = found.covered, found.covered_se
        bar = float(stdtrit(max(found.df, 3.0), 1.0 - LEVEL / (4 * len(gap))))
        sides = np.abs(covered)
        differs = (gap - bar * se > MEAN_LIMIT) | (sides - bar * covered_se > COVERAGE_LIMIT)
        close = (gap > bar * se) & (gap - 2.0 * se > MEAN_LIMIT)
        close |= (sides > bar * covered_se) & (sides - 2.0 * covered_se > COVERAGE_LIMIT)
        noisy = (se > NOISY * MEAN_LIMIT) | (covered_se > NOISY * COVERAGE_LIMIT)
        worst = int(np.argmax(gap - 2.0 * se))
        low, high = int(np.argmin(covered + 2.0 * covered_se)), int(np.argmax(covered - 2.0 * covered_se))
        return Agreement(
            float(gap[worst]),
            float(se[worst]),
            self.names[worst],
            max(COVERAGE + float(covered[low]), 0.0),
            min(COVERAGE + float(covered[high]), 1.0),
            float(max(covered_se[low], covered_se[high])),
            bool(differs.any()),
            bool(close.any()),
            bool(noisy.any()),
        )


def compare_outputs(outputs: Outputs, found: WeightFigures, chains: ChainStates | None = None) -> Predictions:
    """Compares the guide's predictions with the resampled draws' and the chains'.

    :param outputs: what is predicted.
    :param found: draws of the guide and their weights.
    :param chains: those of the probes.
    """
    most, z = outputs.most_draws, found.z
    assert z is not None
    weights = found.weights[:most] / found.weights[:most].sum()
    parts = [outputs.at(z[:most])]
    parts.append(parts[0] if found.corrected is None else outputs.at(found.corrected[:most]))
    if chains is not None:
        chains = settled(chains, z)
        every = max(1, chains.states.shape[0] * chains.states.shape[1] // most)
        states = chains.states[every - 1 :: every]
        parts.append(outputs.at(chains.start[chains.from_guide]))
        parts.append(outputs.at(states.reshape(-1, z.shape[-1])))
    guide, weighted, *others = _with_moments(parts)
    reference = _Reference(guide, outputs.names)
    moved = _moved(reference, weighted, weights)
    known = (outputs.sites, len(outputs.names), outputs.total, reference.agreement(moved))
    if chains is None:
        return Predictions(*known)
    start, there = others
    shape = (len(states), len(chains.start), -1)
    first, second = (part.reshape(shape).mean(0) for part in (there.first, there.second))
    inside = reference.covered(there).reshape(shape).mean(0)
    near = chains.from_guide.cpu().numpy()
    gap, se = _drift(start.first, first[near], reference.first)
    covered, covered_se = _drift(reference.covered(start), inside[near], reference.inside)
    sd = _sd(first[near].mean(0), second[near].mean(0))
    differences = [_Found(gap, se, covered, covered_se, sd, near.sum() - 1.0)]
    other = elsewhere(chains, z, first / np.maximum(reference.sd, 1e-300))
    if other.num:
        weights = other.share * other.weights + np.where(near, (1.0 - other.share) / near.sum(), 0.0)
        whole = _Found(
            *_mixed(gap, se, *_pooled(first, other.weights, near, reference.first), other.share),
            *_mixed(
                covered, covered_se, *_pooled(inside, other.weights, near, reference.inside), other.share
            ),
            _sd(weights @ first, weights @ second),
            min(near.sum(), other.effective) - 1.0,
        )
        differences.append(whole)
    by_chains = [reference.agreement(part) for part in differences]
    resampled = [reference.agreement(part.less(moved)) for part in differences]
    return Predictions(*known, by_chains, resampled, other.num, other.share)


class _Found(NamedTuple):
    """Differences from the guide in every output: of means and of coverages, with their standard errors."""

    gap: Array
    se: Array
    covered: Array
    covered_se: Array
    sd: Array
    """The others' predictive sd."""
    df: float
    """Degrees of freedom of the standard errors."""

    def less(self, other: "_Found") -> "_Found":
        """From what the other has found."""
        return self._replace(
            gap=self.gap - other.gap,
            se=np.hypot(self.se, other.se),
            covered=self.covered - other.covered,
            covered_se=np.hypot(self.covered_se, other.covered_se),
        )


def _moved(reference: _Reference, weighted: Evaluated, weights: Array) -> _Found:
    """By how much resampling changes the predictions.

    :param weighted: outputs of the draws that the weights hold for; as a rule the guide's own.
    """
    same = weighted.first is reference.first
    inside = reference.inside if same else reference.covered(weighted)
    sd = _sd(weights @ weighted.first, weights @ weighted.second)
    moved = _change(weights, weighted.first, reference.first, same)
    covered = _change(weights, inside, reference.inside, same)
    return _Found(*moved, *covered, sd, 1.0 / float(weights @ weights) - 1.0)


def _change(weights: Array, values: Array, raw: Array, same: bool) -> tuple[Array, Array]:
    """Weighted mean of values less the mean of raw ones, and its standard error.

    :param same: whether these are the same, so that noise that both have is none of the difference.
    """
    mean = weights @ values
    squares = ((weights - 1.0 / len(weights)) if same else weights) ** 2
    variance = squares @ (values - mean) ** 2
    return mean - raw.mean(0), np.sqrt(variance if same else variance + raw.var(0) / len(raw))


def _pooled(values: Array, weights: Array, near: NDArray[np.bool_], guide: Array) -> tuple[Array, Array]:
    """Weighted mean of chains' values ``(P, N)`` less the guide's, and its standard error.

    A few chains may agree by chance: each is at least as noisy as one from the guide's draws.
    """
    mean, squares = weights @ values, float(weights @ weights)
    among = weights**2 @ (values - mean) ** 2 / max(1.0 - squares, 1e-9)
    variance = np.maximum(among, squares * values[near].var(0, ddof=1)) + guide.var(0) / len(guide)
    return mean - guide.mean(0), np.sqrt(variance)


def _mixed(gap: Array, se: Array, other: Array, other_se: Array, share: float) -> tuple[Array, Array]:
    """Differences of the whole posterior, of those of two parts."""
    return (1.0 - share) * gap + share * other, np.hypot((1.0 - share) * se, share * other_se)


def _sd(mean: Array, second: Array) -> Array:
    """The predictive sd, of the mean of the first and second moments."""
    sd: Array = np.sqrt(np.maximum(second - mean**2, 0.0))
    return sd


def _with_moments(parts: list[Evaluated]) -> list[Evaluated]:
    """The same, with outputs that have no mean cut off at quantiles of the first part's draws."""
    bad = ~np.all([np.isfinite(part.first).all(0) & np.isfinite(part.second).all(0) for part in parts], 0)
    if not bad.any():
        return parts
    drawn = parts[0].drawn[..., bad]
    low, high = np.quantile(drawn.reshape(-1, drawn.shape[-1]), WINSORISED, axis=0)
    for part in parts:
        cut = np.clip(part.drawn[..., bad], low, high)
        part.first[:, bad], part.second[:, bad] = cut.mean(0), (cut**2).mean(0)
    return parts


def _drift(start: Array, mean: Array, guide: Array) -> tuple[Array, Array]:
    """E_p f - E_q f of each column and its standard error, by chains that start at draws of q.

    :param start: f at the starts, ``(P, N)``.
    :param mean: f averaged over each chain, ``(P, N)``.
    :param guide: f at all draws of q, ``(S, N)``.
    """
    gap, se = gap_of(start, mean, guide.mean(0))
    return gap, np.sqrt(se**2 + guide.var(0) / len(guide))


def judge_predictions(f: Figures, p: Predictions) -> Judgement:
    """The verdict on a fit by its predictions alone."""
    judgement = Judgement()
    part = f"{p.num_outputs} of {p.total}" if p.num_outputs < p.total else f"{p.total}"
    judgement.add(f"judged by {part} outputs of {', '.join(p.sites)} alone, whatever the latents")
    informative = (f.khat <= f.khat_threshold and f.ess >= USABLE_ESS) or f.share >= USABLE_SHARE
    if not informative:
        told = f"the weights say nothing of them: k-hat {f.khat:.2f}, {f.ess:.0f} effective draws"
        judgement.add(told, 2 if p.by_chains else 0, "" if p.by_chains else LONGER)
    elif p.by_weights.differs or p.by_weights.close:
        judgement.add(f"predictions differ from the resampled draws': {p.by_weights}", 1, _resample(f))
    else:
        told = f"predictions agree with the resampled draws': {p.by_weights}"
        judgement.add(told, 1 if p.by_weights.noisy and not p.by_chains else 2)
    found = p.of_chains
    if found is None:
        return _others(judgement, f)
    chains = "chains from the guide's draws"
    if p.share >= 0.005 and (found is p.by_chains[-1] or not p.by_chains[-1].noisy):
        chains += f" and of {p.elsewhere} that settled in other modes, with {100 * p.share:.0f} % of the mass"
    if found.differs:
        mended = informative and not any(other.differs for other in p.resampled)
        told = f"predictions differ from those of {chains}: {found}"
        judgement.add(told, 1 if mended else 0, _resample(f) if mended else _richer(f))
    elif found.close:
        told = f"predictions are close to those of {chains}, hardly within the limits: {found}"
        judgement.add(told, 1, LONGER)
    elif found.noisy:
        told = f"predictions are not confirmed by {chains}, which are too noisy: {found}"
        judgement.add(told, 1 if informative else 0, _slow(f))
    else:
        judgement.add(f"predictions agree with those of {chains}: {found}")
    return _others(judgement, f)


def _others(judgement: Judgement, f: Figures) -> Judgement:
    if f.converged is False:
        judgement.add("the training had not converged", 1, LONGER)
    if f.num_nonfinite:
        judgement.add(f"{f.num_nonfinite} of {f.num_samples} draws have a density that is not finite", 0)
    _longer_first(judgement, f)
    return judgement
