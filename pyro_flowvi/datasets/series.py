"""A time series."""

from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["mauna_loa_co2"]


def mauna_loa_co2() -> tuple[NDArray[np.datetime64], NDArray[np.float64]]:
    """Carbon dioxide in the air at Mauna Loa, Hawaii, by months from 1958-03 to 2001-12.

    Means of the weekly averages dated in each month, parts per million by volume.  Keeling and Whorf,
    *Atmospheric CO2 concentrations derived from flask air samples at sites in the SIO network*, 2004 (Carbon
    Dioxide Information Analysis Center, U.S. Department of Energy): public domain.  The weekly averages are
    those of the package statsmodels, ``statsmodels.datasets.co2``.

    :return: the months, shape ``(526,)``, and the means, ``(526,)``: NaN in the five months without data,
        1958-06, 1958-10 and 1964-02 to 1964-04.

    Example::

        >>> month, ppm = mauna_loa_co2()
        >>> print(month[0], ppm[0], month[-1], ppm[-1])
        1958-03 316.1 2001-12 371.02
    """
    with files("pyro_flowvi.datasets").joinpath("mauna_loa_co2.npz").open("rb") as file:
        stored: Any = np.load(file)
        start, ppm = np.datetime64(str(stored["start"])), stored["ppm"]
    return start + np.arange(len(ppm)), ppm
