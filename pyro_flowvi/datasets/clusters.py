"""Points of the plane in curved clusters, with their exact densities; labels to hide."""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import i0e, logsumexp

from .._checks import check_positive, check_positive_int

__all__ = [
    "hide_labels",
    "pinwheel",
    "pinwheel_log_prob",
    "two_circles",
    "two_circles_log_prob",
    "two_moons",
]

Points = NDArray[np.float64]
Labels = NDArray[np.int64]

_RADIUS: Final = 0.5
"""Where the middle of a wing is, in units of the feature, whose mean is 1."""
_CELLS: Final = 128
"""Pieces of the circle in each of which at most one preimage of a point of the pinwheel is sought."""
_CHUNK: Final = 4096
"""Points at once: each takes some arrays of wings times cells."""


def _check_noise(noise: float) -> float:
    if not 0.0 <= noise < math.inf:
        raise ValueError(f"noise: expected a number that is not negative, got {noise!r}")
    return float(noise)


def _as_points(x: ArrayLike) -> Points:
    points = np.asarray(x, dtype=float)
    if points.ndim == 0 or points.shape[-1] != 2:
        raise ValueError(f"x: expected shape (*, 2), got {points.shape}")
    return points


def _marginal(per_class: Points) -> Points:
    """The log density of classes of equal weights."""
    total: Points = logsumexp(per_class, axis=-1) - math.log(per_class.shape[-1])
    return total


def two_moons(num_samples: int = 100, noise: float = 0.05, seed: int = 0) -> tuple[Points, Labels]:
    """Two interleaving half circles of radius 1, evenly spaced along them, with Gaussian noise.

    The curves of scikit-learn's ``make_moons``; it is not needed.

    :param num_samples: the number of points N, of which the upper moon has N // 2.
    :param noise: standard deviation of the noise in each coordinate.
    :param seed: of the noise.
    :return: points, shape ``(N, 2)``, and labels, 0 on the upper moon and 1 on the lower, shape ``(N,)``.
    :raises ValueError: if ``num_samples`` is not a positive integer, or ``noise`` is negative or not finite.

    Example::

        >>> points, labels = two_moons(100)
        >>> points.shape, labels.sum()
        ((100, 2), np.int64(50))
    """
    upper = check_positive_int("num_samples", num_samples) // 2
    first, second = np.linspace(0.0, math.pi, upper), np.linspace(0.0, math.pi, num_samples - upper)
    moons = np.concatenate(
        [
            np.stack([np.cos(first), np.sin(first)], -1),
            np.stack([1.0 - np.cos(second), 0.5 - np.sin(second)], -1),
        ]
    )
    labels = np.repeat([0, 1], [upper, num_samples - upper])
    return moons + _check_noise(noise) * np.random.default_rng(seed).standard_normal(moons.shape), labels


def _wing_angles(num_classes: int) -> Points:
    return np.linspace(0.0, 2.0 * math.pi, num_classes, endpoint=False)


def pinwheel(
    num_per_class: int = 512,
    num_classes: int = 5,
    radial_std: float = 0.3,
    tangential_std: float = 0.05,
    rate: float = 0.25,
    seed: int = 0,
) -> tuple[Points, Labels]:
    r"""Curved wings around the origin.

    With standard normal n, a point of wing c is :math:`f = (1 + s_r n_1, s_t n_2)`, turned clockwise by
    :math:`2\pi c / K + \rho e^{f_1}` and halved.

    Johnson, Duvenaud, Wiltschko, Datta and Adams, *Composing graphical models with neural networks for
    structured representations and fast inference*, 2016; scaled as Pires and Figueiredo, *Variational
    Mixture of Normalizing Flows*, 2020, have it.

    :param num_per_class: the number of points of each wing.
    :param num_classes: the number K of wings.
    :param radial_std: :math:`s_r`, along a wing.
    :param tangential_std: :math:`s_t`, across a wing.
    :param rate: :math:`\rho`, how much the wings are bent.
    :param seed: of the noise.
    :return: points, shape ``(N, 2)``, wing after wing, and the wings, shape ``(N,)``.
    :raises ValueError: if a number is not a positive integer, or a deviation not positive.

    Example::

        >>> points, labels = pinwheel(100, num_classes=3)
        >>> points.shape, labels.max()
        ((300, 2), np.int64(2))
    """
    number = check_positive_int("num_classes", num_classes)
    labels = np.repeat(np.arange(number), check_positive_int("num_per_class", num_per_class))
    scale = [check_positive("radial_std", radial_std), check_positive("tangential_std", tangential_std)]
    features = np.random.default_rng(seed).standard_normal((len(labels), 2)) * scale + [1.0, 0.0]
    angles = _wing_angles(number)[labels] + rate * np.exp(features[:, 0])
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = features.T
    return _RADIUS * np.stack([first * cos + second * sin, second * cos - first * sin], -1), labels


def _wing_log_prob(points: Points, wings: Points, scale: tuple[float, float], rate: float) -> Points:
    """The log density of every wing at twice a point, shape ``(N, K)``, points ``(N, 2)``."""
    radius = np.hypot(points[:, 0], points[:, 1])
    place = np.arctan2(points[:, 1], points[:, 0])[:, None] + wings
    # f = r (cos t, sin t) lies on x where t - rate exp(r cos t) is its angle, up to whole turns.
    edges = np.linspace(-math.pi, math.pi, _CELLS + 1)
    turns = (edges - rate * np.exp(radius[:, None] * np.cos(edges)))[:, None, :] - place[..., None]
    whole = np.floor(turns / (2.0 * math.pi))
    row, wing, cell = index = np.nonzero(whole[..., 1:] != whole[..., :-1])
    before, after = whole[index], whole[row, wing, cell + 1]
    goal, rising = 2.0 * math.pi * np.maximum(before, after) + place[row, wing], after > before
    r, low, high = radius[row], edges[cell], edges[cell + 1]
    for _ in range(60):
        t = 0.5 * (low + high)
        above = (t - rate * np.exp(r * np.cos(t)) > goal) == rising
        low, high = np.where(above, low, t), np.where(above, t, high)
    first, second = r * np.cos(t), r * np.sin(t)
    log_normal = -0.5 * (((first - 1.0) / scale[0]) ** 2 + (second / scale[1]) ** 2)
    slope = np.maximum(np.abs(1.0 + rate * np.exp(first) * second), np.finfo(float).tiny)
    density = np.full(place.shape, -np.inf)
    np.logaddexp.at(density, (row, wing), log_normal - np.log(2.0 * math.pi * scale[0] * scale[1] * slope))
    return density


def pinwheel_log_prob(
    x: ArrayLike,
    num_classes: int = 5,
    radial_std: float = 0.3,
    tangential_std: float = 0.05,
    rate: float = 0.25,
    *,
    per_class: bool = False,
) -> Points:
    r"""The exact log density of :func:`pinwheel`, wings of equal weights.

    The map from f to x has :math:`|\det| = |1 + \rho e^{f_1} f_2| / 4`.  Near the wings it is one to one;
    far off, where the wings have wound up, several f have the same x, and all of them count.

    :param x: points, shape ``(*, 2)``.
    :param num_classes: the number K of wings; the other parameters too are those of :func:`pinwheel`.
    :param per_class: whether to return the log density of each wing instead.
    :return: shape ``(*,)``, or ``(*, K)`` with ``per_class``.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> points, _ = pinwheel()
        >>> -1.2 < -pinwheel_log_prob(points).mean() < -1.1
        np.True_
        >>> pinwheel_log_prob(points, per_class=True).shape
        (2560, 5)
    """
    points = _as_points(x) / _RADIUS
    wings = _wing_angles(check_positive_int("num_classes", num_classes))
    scale = check_positive("radial_std", radial_std), check_positive("tangential_std", tangential_std)
    rows = points.reshape(-1, 2)
    parts = [
        _wing_log_prob(rows[i : i + _CHUNK], wings, scale, rate) for i in range(0, max(len(rows), 1), _CHUNK)
    ]
    density = np.concatenate(parts).reshape(points.shape[:-1] + wings.shape) - 2.0 * math.log(_RADIUS)
    return density if per_class else _marginal(density)


def two_circles(
    num_per_class: int = 512, radii: Sequence[float] = (0.4, 0.8), noise: float = 0.005, seed: int = 0
) -> tuple[Points, Labels]:
    """Circles around the origin with Gaussian noise: what no continuous image of one normal can be.

    Pires and Figueiredo, *Variational Mixture of Normalizing Flows*, 2020.  Their noise of .005 is taken
    as a standard deviation: with it, -E[log p(x)] = -1.918.

    :param num_per_class: the number of points of each circle, at independent uniform angles.
    :param radii: of the K circles.
    :param noise: standard deviation of the noise in each coordinate.
    :param seed: of angles and noise.
    :return: points, shape ``(N, 2)``, circle after circle, and the circles, shape ``(N,)``.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> points, labels = two_circles(100)
        >>> points.shape, labels.sum()
        ((200, 2), np.int64(100))
    """
    labels = np.repeat(np.arange(len(radii)), check_positive_int("num_per_class", num_per_class))
    generator = np.random.default_rng(seed)
    angles = generator.uniform(0.0, 2.0 * math.pi, len(labels))
    radius = np.array([check_positive("radii", value) for value in radii])[labels]
    circles = radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], -1)
    return circles + _check_noise(noise) * generator.standard_normal(circles.shape), labels


def two_circles_log_prob(
    x: ArrayLike, radii: Sequence[float] = (0.4, 0.8), noise: float = 0.005, *, per_class: bool = False
) -> Points:
    r"""The exact log density of :func:`two_circles`, circles of equal weights.

    At the distance r of the origin a circle of radius R has the density
    :math:`(2 \pi s^2)^{-1} e^{-(r^2 + R^2) / 2 s^2} I_0(r R / s^2)`, s the noise.

    :param x: points, shape ``(*, 2)``.
    :param radii: of the K circles.
    :param noise: standard deviation of the noise, above 0.
    :param per_class: whether to return the log density of each circle instead.
    :return: shape ``(*,)``, or ``(*, K)`` with ``per_class``.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> points, _ = two_circles()
        >>> -2.0 < -two_circles_log_prob(points).mean() < -1.85
        np.True_
    """
    points = _as_points(x)
    scale = check_positive("noise", noise)
    radius = np.array([check_positive("radii", value) for value in radii])
    r = np.hypot(points[..., 0], points[..., 1])[..., None]
    density: Points = np.log(i0e(r * radius / scale**2)) - 0.5 * ((r - radius) / scale) ** 2
    density = density - math.log(2.0 * math.pi * scale**2)
    return density if per_class else _marginal(density)


def hide_labels(y: ArrayLike, num_per_class: int, seed: int = 0) -> Labels:
    """Labels of which a few of each class are kept and all others are -1, unlabelled.

    :param y: integers of at least 0, shape ``(N,)``; -1 stays.
    :param num_per_class: how many labels of each class are kept.
    :param seed: of the choice.
    :return: shape ``(N,)``.
    :raises ValueError: if ``y`` is no vector of integers, or a class has fewer points.

    Example::

        >>> hide_labels([0, 0, 0, 1, 1, 1], 1).tolist()
        [-1, -1, 0, -1, 1, -1]
    """
    labels: NDArray[Any] = np.asarray(y)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"y: expected integers of shape (N,), got {labels.dtype} of shape {labels.shape}")
    kept = check_positive_int("num_per_class", num_per_class)
    generator = np.random.default_rng(seed)
    hidden = np.full(len(labels), -1)
    for label in np.unique(labels[labels != -1]):
        (rows,) = np.nonzero(labels == label)
        if len(rows) < kept:
            raise ValueError(
                f"num_per_class: expected at most {len(rows)}, the points of {label}, got {kept}"
            )
        hidden[generator.choice(rows, kept, replace=False)] = label
    return hidden
