"""Data sets of the source papers, embedded so that nothing is downloaded."""

from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["EIGHT_SCHOOLS", "LabelledImages", "Reference", "digits", "eight_schools_reference"]

EIGHT_SCHOOLS: Final[dict[str, list[float]]] = {
    "y": [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0],
    "sigma": [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0],
}
"""Coaching effects on SAT scores in eight schools, points (Rubin 1981; Gelman et al., *Bayesian
Data Analysis*, section 5.5): estimated effects ``y`` and their standard errors ``sigma``."""


@dataclass(frozen=True)
class Reference:
    """A trusted posterior to compare with.

    :param names: of the D scalar quantities.
    :param mean: posterior means of the whole run, shape ``(D,)``.
    :param sd: posterior standard deviations of the whole run, shape ``(D,)``.
    :param draws: a thinned subset, shape ``(S, D)``.

    Example::

        >>> reference = Reference(("x",), np.zeros(1), np.ones(1), np.zeros((5, 1), np.float32))
        >>> reference.draws.shape
        (5, 1)
    """

    names: tuple[str, ...]
    mean: NDArray[np.float64]
    sd: NDArray[np.float64]
    draws: NDArray[np.float32]


def eight_schools_reference() -> Reference:
    """The stored long NUTS run on the eight schools.

    ``benchmarks/eight_schools_reference.py`` regenerates it.  Sampled in the non-centred form,
    since NUTS on the centred funnel is biased.

    Example::

        >>> reference = eight_schools_reference()
        >>> reference.names[:3], reference.draws.shape
        (('mu', 'tau', 'theta[0]'), (2000, 10))
    """
    with files("pyro_flowvi").joinpath("data/eight_schools_reference.npz").open("rb") as file:
        stored: Any = np.load(file)
        return Reference(tuple(map(str, stored["names"])), stored["mean"], stored["sd"], stored["draws"])


@dataclass(frozen=True)
class LabelledImages:
    """Images of integers, and what they show.

    :param images: integers from 0 to ``num_levels`` - 1, shape ``(N, C, H, W)``.
    :param labels: integers, shape ``(N,)``.
    :param num_levels: the number of levels.

    Example::

        >>> LabelledImages(np.zeros((5, 1, 8, 8), np.int64), np.arange(5), 17).images.shape
        (5, 1, 8, 8)
    """

    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    num_levels: int


def digits(seed: int = 0) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """The 1797 handwritten digits of 8 x 8 pixels and 17 levels that come with scikit-learn.

    Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998:
    its test part.

    :param seed: of the order from which the parts are cut.
    :return: 1297 images to train with, 100 to validate and 400 to test, in random order.
    :raises ImportError: without scikit-learn, the extra ``sklearn``.

    Example::

        >>> train, validation, test = digits()  # doctest: +SKIP
        >>> train.images.shape, test.labels.shape  # doctest: +SKIP
        ((1297, 1, 8, 8), (400,))
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = "digits needs scikit-learn: install pyro-flowvi with the extra 'sklearn'"
        raise ImportError(message) from error
    whole = load_digits()
    images = whole.images.astype(np.int64)[:, None]
    labels = whole.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    train, validation, test = (
        LabelledImages(images[rows], labels[rows], num_levels=17) for rows in np.split(order, [1297, 1397])
    )
    return train, validation, test
