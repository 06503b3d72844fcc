"""Radon in the houses of Minnesota."""

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RadonSurvey", "minnesota_radon"]


@dataclass(frozen=True)
class RadonSurvey:
    """Measurements of radon in N houses of J counties.

    :param log_radon: log of the activity in pCi/L plus .1, so that a reading of 0 has one, shape ``(N,)``.
    :param floor: where it was measured, shape ``(N,)``: 0 in the basement, 1 on the first floor.
    :param county: of each house, from 0 to J - 1, shape ``(N,)``.
    :param log_uranium: of each county, log of the uranium in its soil in ppm plus .1, shape ``(J,)``.
    :param names: of the J counties.

    Example::

        >>> houses = np.zeros(3), np.zeros(3, np.int64), np.zeros(3, np.int64)
        >>> RadonSurvey(*houses, np.zeros(1), ("Cook",)).log_radon.shape
        (3,)
    """

    log_radon: NDArray[np.float64]
    floor: NDArray[np.int64]
    county: NDArray[np.int64]
    log_uranium: NDArray[np.float64]
    names: tuple[str, ...]


def minnesota_radon() -> RadonSurvey:
    """The 919 houses in 85 counties of Minnesota that hierarchical regression is often shown with.

    From the State Residential Radon Survey of the United States' Environmental Protection Agency, winter of
    1987 to 1988; Gelman and Hill, *Data Analysis Using Regression and Multilevel/Hierarchical Models*, 2007,
    chapter 12.  The numbers are those of ``radon_mn`` in posteriordb (github.com/stan-dev/posteriordb), under
    the BSD 3-clause licence that lies beside them, ``radon_mn.LICENSE.txt``.

    There counties have numbers alone.  The names are the state's 87 in alphabetical order, without Grant and
    Red Lake, where no house was measured.

    Example::

        >>> survey = minnesota_radon()
        >>> survey.log_radon.shape, len(survey.names)
        ((919,), 85)
        >>> hennepin = survey.county == survey.names.index("Hennepin")
        >>> print(f"{hennepin.sum()} houses, mean log radon {survey.log_radon[hennepin].mean():.2f}")
        105 houses, mean log radon 1.32
    """
    with files("pyro_flowvi.datasets").joinpath("radon_mn.npz").open("rb") as file:
        stored: Any = np.load(file)
        return RadonSurvey(
            log_radon=stored["log_radon"],
            floor=stored["floor"],
            county=stored["county"],
            log_uranium=stored["log_uranium"],
            names=tuple(map(str, stored["names"])),
        )
