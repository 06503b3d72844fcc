"""What a guide's importance weights say: bounds, evidence, and how far resampling moves the draws."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..psis import effective_sample_size, khat_threshold, psis
from ._weighted_draws import WeightedDraws, as_array

__all__ = ["Shifts", "WeightFigures", "read_weights", "shifts"]

Array = NDArray[np.float64]
EVEN: float = 0.1
"""Standard deviation of log weights, nats, below which k-hat is noise: there is no tail to speak of."""


@dataclass(frozen=True)
class Shifts:
    """How far resampled draws are from raw ones, in unconstrained coordinates; NaN where draws have none.

    :param location: worst difference of the means, in sd of the resampled draws.
    :param place: of which coordinate.
    :param scale: worst \\|log(sd of the resampled draws / sd of the draws)\\|.
    :param scale_place: of which coordinate.
    :param scale_noise: standard error of that one, as far as the draws tell.
    """

    location: float = math.nan
    place: int = 0
    scale: float = math.nan
    scale_place: int = 0
    scale_noise: float = 0.0


@dataclass(frozen=True)
class WeightFigures:
    """Figures as in :class:`Diagnosis`, and what they are computed from.

    :param log_weights: the finite ones, ``(S,)``.
    :param weights: smoothed, summing to one, ``(S,)``.
    :param z: the draws, ``(S, D)``; None where they have no place.
    :param corrected: the same as far as weights of groups have moved them; None without groups.
    """

    elbo: float
    elbo_se: float
    iw_elbo: float
    ess: float
    khat: float
    log_evidence: float
    log_evidence_se: float
    moved: Shifts
    log_weights: Array
    weights: Array
    z: Tensor | None
    corrected: Tensor | None


def read_weights(draws: WeightedDraws) -> WeightFigures:
    """The figures of draws of which at least some have a finite density."""
    finite = np.isfinite(draws.log_weights)
    kept, total = draws.log_weights[finite], len(finite)
    smoothed, khat = psis(kept)
    if kept.std() < EVEN:
        khat = -math.inf
    grouped = draws.grouped
    inner = draws.by_row if grouped is None else grouped
    ratios = kept if inner is None else as_array(inner.log_ratios)[finite]
    elbo, elbo_se = float(ratios.mean()), float(ratios.std(ddof=1) / math.sqrt(len(ratios)))
    if len(kept) < total:
        elbo, elbo_se = -math.inf, math.nan
    weights = np.exp(smoothed)
    lightest = int(np.argmin(kept))  # no tail reaches it, so that smoothing has only scaled it
    log_evidence = float(kept[lightest] - smoothed[lightest]) - math.log(total)
    spread = max(float((weights**2).sum()) - 1.0 / total, 0.0)
    reliable = khat <= khat_threshold(total)
    moved, z, corrected = Shifts(), None, None
    if draws.z is not None:
        rows = torch.from_numpy(finite).to(draws.z.device)
        z = draws.z.detach()[rows]
        if grouped is None:
            moved = shifts(as_array(z), weights)
        else:
            corrected = grouped.corrected[rows]
            mean = weights @ as_array(grouped.mean[rows])
            square = weights @ as_array(grouped.square[rows])
            sd = np.sqrt(np.maximum(square - mean**2, 0.0))
            raw_mean, raw_sd = (as_array(value) for value in grouped.raw)
            noise = _scale_noise(as_array(grouped.mean[rows]) - mean, sd, weights)
            moved = _between(raw_mean, raw_sd, mean, sd, noise)
    return WeightFigures(
        elbo=elbo,
        elbo_se=elbo_se,
        iw_elbo=float(np.logaddexp.reduce(kept)) - math.log(total),
        ess=effective_sample_size(kept),
        khat=khat,
        log_evidence=log_evidence,
        log_evidence_se=math.sqrt(spread) if reliable else math.inf,
        moved=moved,
        log_weights=kept,
        weights=weights,
        z=z,
        corrected=corrected,
    )


def shifts(z: Array, weights: Array) -> Shifts:
    """How far weights move draws.

    :param z: draws, ``(S, D)``.
    :param weights: smoothed, summing to one, ``(S,)``.
    """
    centre = z.mean(0)
    centred = z - centre
    moved = weights @ centred
    variance = np.maximum(weights @ (centred - moved) ** 2, 0.0)
    sd = np.sqrt(variance)
    return _between(
        np.zeros_like(moved), centred.std(0), moved, sd, _scale_noise(centred - moved, sd, weights)
    )


def _scale_noise(centred: Array, sd: Array, weights: Array) -> Array:
    """Standard errors of the logarithms of how sds change from raw to weighted draws."""
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = (centred / sd) ** 2 - 1.0
        noise: Array = 0.5 * np.sqrt(((weights - 1.0 / len(weights))[:, None] ** 2 * excess**2).sum(0))
    return np.nan_to_num(noise)


def _between(raw_mean: Array, raw_sd: Array, mean: Array, sd: Array, noise: Array) -> Shifts:
    with np.errstate(divide="ignore", invalid="ignore"):
        location = np.nan_to_num(np.abs(mean - raw_mean) / sd, nan=0.0, posinf=np.inf)
        scale = np.nan_to_num(np.abs(np.log(sd / raw_sd)), nan=0.0, posinf=np.inf)
    place, scale_place = int(np.argmax(location)), int(np.argmax(scale - 2.0 * noise))
    return Shifts(
        float(location[place]), place, float(scale[scale_place]), scale_place, float(noise[scale_place])
    )
