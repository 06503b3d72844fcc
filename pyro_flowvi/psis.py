"""Pareto-smoothed importance weights on plain arrays, through ``arviz_stats``."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["effective_sample_size", "generalized_pareto_shape", "khat_threshold", "psis", "resample"]

Array = NDArray[np.float64]


def _array_stats() -> Any:
    """ArviZ's functions of arrays, with whose import a start would take twice as long."""
    from arviz_stats.base.array import array_stats

    return array_stats


def _logsumexp(x: Array) -> float:
    top = float(np.max(x))
    return top + float(np.log(np.exp(x - top).sum()))


def _vector(name: str, value: ArrayLike) -> Array:
    array: Array = np.asarray(value, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name}: expected a vector of finite numbers, got shape {array.shape}")
    return array


def psis(log_ratios: ArrayLike) -> tuple[Array, float]:
    """Smoothed, normalised log weights and the Pareto shape k-hat of log p - log q.

    Vehtari, Simpson, Gelman, Yao and Gabry, *Pareto Smoothed Importance Sampling*, 2024.  With k-hat
    below about 0.7 the weights' mean converges at a practical rate.

    :param log_ratios: log p - log q of S draws from q, up to a constant; finite, shape ``(S,)``.
    :return: log weights that sum to one on the natural scale, shape ``(S,)``, and k-hat (NaN below 5
        tail draws, that is S < 25).
    :raises ValueError: if ``log_ratios`` is not a vector of finite numbers.

    Example::

        >>> log_weights, khat = psis(np.random.default_rng(0).standard_normal(1000))
        >>> round(float(np.exp(log_weights).sum()), 6), khat < 0.7
        (1.0, True)
    """
    ratios = _vector("log_ratios", log_ratios)
    ratios = ratios - ratios.max()
    if np.ptp(ratios) < 1e-12:  # equal weights have no tail to fit
        return np.full_like(ratios, -np.log(len(ratios))), -np.inf
    if len(ratios) < 25:
        return ratios - _logsumexp(ratios), math.nan
    smoothed: Any
    try:
        with np.errstate(all="ignore"):  # many equal values
            smoothed, khat = _array_stats().psislw(-ratios)  # it takes negated log ratios
    except ValueError:  # the largest weights are equal: bounded, no tail to fit
        smoothed, khat = ratios, -np.inf
    if np.isnan(smoothed).any():  # so are most of these, as of an exact guide in float32
        smoothed, khat = ratios, -np.inf
    weights: Array = np.asarray(smoothed, dtype=np.float64)
    return weights - _logsumexp(weights), float(khat)


def effective_sample_size(log_weights: ArrayLike) -> float:
    """Kish's effective sample size, (Σw)² / Σw², between 1 and S.

    :param log_weights: of S draws, up to a constant; finite, shape ``(S,)``.
    :raises ValueError: if ``log_weights`` is not a vector of finite numbers.

    Example::

        >>> effective_sample_size([0.0, 0.0, -1000.0])
        2.0
    """
    weights = _vector("log_weights", log_weights)
    return float(np.exp(2 * _logsumexp(weights) - _logsumexp(2 * weights)))


def khat_threshold(num_samples: int) -> float:
    """The largest k-hat with which S draws give a reliable estimate, min(1 - 1 / log10 S, 0.7).

    Vehtari et al. 2024, section 3.2.4.

    Example::

        >>> round(khat_threshold(200), 3), khat_threshold(4000)
        (0.565, 0.7)
    """
    return min(1.0 - 1.0 / math.log10(max(num_samples, 2)), 0.7)


def generalized_pareto_shape(values: ArrayLike) -> float:
    """The shape of the generalised Pareto law of a sample's upper tail, by PSIS' own estimator.

    1/nu for the distance of a Student t from its centre, about 0 for a normal, below 0 for a bounded
    value.  The tail is the largest min(S/5, 3 sqrt S) values; estimator of Zhang and Stephens, *A new and
    efficient estimation method for the generalized Pareto distribution*, 2009.

    :param values: a sample, ``(S,)``, finite.
    :return: the shape; -inf for equal values, NaN below 25 values.
    :raises ValueError: if ``values`` is not a vector of finite numbers.

    Example::

        >>> uniform = np.random.default_rng(0).random(100_000)
        >>> abs(generalized_pareto_shape(uniform ** -0.5) - 0.5) < 0.1
        True
    """
    sample = _vector("values", values)
    if len(sample) < 25:
        return math.nan
    if np.ptp(sample) < 1e-12 * np.abs(sample).max():
        return -math.inf
    shape: Any
    try:
        with np.errstate(all="ignore"):  # many equal values
            shape = _array_stats().pareto_khat(sample[None], r_eff=1.0, tail="right")
    except ValueError:  # the largest are all equal
        return -math.inf
    return float(shape) if np.isfinite(shape) else -math.inf


def resample(log_weights: ArrayLike, num_samples: int, seed: int | None = None) -> NDArray[np.int64]:
    """Indices of draws resampled by their weights, by systematic resampling.

    Douc, Cappe and Moulines, *Comparison of resampling schemes for particle filtering*, 2005: each draw
    appears S times its weight, rounded up or down: no more noise than rounding needs.

    :param log_weights: of S draws, up to a constant, ``(S,)``.
    :param num_samples: number of indices.
    :param seed: of the one random number that is needed, and of the order of the indices.
    :raises ValueError: if ``log_weights`` is not a vector of finite numbers.

    Example::

        >>> np.bincount(resample(np.log([0.5, 0.25, 0.25]), 400, seed=0)).tolist()
        [200, 100, 100]
    """
    log_w = _vector("log_weights", log_weights)
    cumulative = np.cumsum(np.exp(log_w - _logsumexp(log_w)))
    rng = np.random.default_rng(seed)
    positions = (rng.random() + np.arange(num_samples)) / num_samples
    indices = np.searchsorted(cumulative / cumulative[-1], positions, side="right")
    return rng.permutation(np.minimum(indices, len(log_w) - 1))
