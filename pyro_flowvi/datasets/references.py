"""The eight schools, with a trusted posterior."""

from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["EIGHT_SCHOOLS", "Reference", "eight_schools_reference"]

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

    ``benchmarks/fits/eight_schools_reference.py`` regenerates it.  Sampled in the non-centred form,
    since NUTS on the centred funnel is biased.

    Example::

        >>> reference = eight_schools_reference()
        >>> reference.names[:3], reference.draws.shape
        (('mu', 'tau', 'theta[0]'), (2000, 10))
    """
    with files("pyro_flowvi.datasets").joinpath("eight_schools_reference.npz").open("rb") as file:
        stored: Any = np.load(file)
        return Reference(tuple(map(str, stored["names"])), stored["mean"], stored["sd"], stored["draws"])
