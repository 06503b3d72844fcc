"""Pareto-smoothed importance weights on plain arrays, through ``arviz_stats``."""

from typing import Any

import numpy as np
from arviz_stats.base.array import array_stats
from numpy.typing import ArrayLike, NDArray

__all__ = ["effective_sample_size", "psis"]

Array = NDArray[np.float64]


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
    smoothed: Any
    try:
        smoothed, khat = array_stats.psislw(-ratios)  # it takes negated log ratios
    except ValueError:  # the largest weights are equal: bounded, no tail to fit
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
