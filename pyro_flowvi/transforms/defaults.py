"""The one table of default choices by dimension."""

from dataclasses import dataclass
from typing import Final

__all__ = ["DEFAULTS", "Defaults", "defaults_for"]


@dataclass(frozen=True)
class Defaults:
    """What is chosen for targets of up to ``max_dim`` dimensions.

    :param max_dim: the largest dimension D of the row.
    :param num_layers: by flow: layers, for couplings half-layers.
    :param hidden: widths of every network.
    :param num_particles: draws a step.
    :param lr: by flow: Adam's learning rate to start from.

    Example::

        >>> defaults_for(10).hidden
        (32, 32)
    """

    max_dim: float
    num_layers: dict[str, int]
    hidden: tuple[int, ...]
    num_particles: int
    lr: dict[str, float]


def _layers(coupling: int, spline: int, autoregressive: int, sylvester: int) -> dict[str, int]:
    return {
        **dict.fromkeys(("planar", "radial", "planar_radial"), 16),
        **dict.fromkeys(("nice", "realnvp"), coupling),
        **dict.fromkeys(("neural_spline", "neural_spline_ar"), spline),
        **dict.fromkeys(("iaf", "maf"), autoregressive),
        "sylvester": sylvester,
    }


def _rates(networks: float) -> dict[str, float]:
    return {
        **dict.fromkeys(("planar", "radial", "planar_radial", "sylvester"), 1e-2),
        **dict.fromkeys(("nice", "realnvp", "neural_spline", "neural_spline_ar", "iaf", "maf"), networks),
    }


DEFAULTS: Final = (
    Defaults(4, _layers(8, 4, 4, 8), (32, 32), 16, _rates(3e-3)),
    Defaults(32, _layers(8, 4, 4, 8), (32, 32), 16, _rates(3e-3)),
    Defaults(200, _layers(8, 4, 4, 8), (64, 64), 16, _rates(3e-3)),
    Defaults(float("inf"), _layers(8, 4, 4, 8), (100, 100), 16, _rates(1e-3)),
)
"""Rows by increasing dimension."""


def defaults_for(dim: int) -> Defaults:
    """The row of :data:`DEFAULTS` for targets of ``dim`` dimensions.

    Example::

        >>> defaults_for(2).num_layers["planar"]
        16
    """
    return next(row for row in DEFAULTS if dim <= row.max_dim)
