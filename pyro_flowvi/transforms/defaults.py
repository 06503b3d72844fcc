"""The one table of default choices, by dimension and flow.

Measured with ``fit`` at 3,000 steps on targets whose normaliser is known (divergence in nats; the scripts are
``benchmarks/dimensions.py`` and ``benchmarks/energies.py``; without the present search for a start):

- *Learning rate.*  RealNVP at 1e-3 / 3e-3 / 1e-2: funnel in 2 dimensions .027 / .011 / .067, five curved
valleys in 10
  dimensions 2.1 / .95 / 4.3.  In 1,000 dimensions 1e-2 diverges from the start, and 3e-3 is worse than 1e-3.
- *Particles.*  RealNVP, the five valleys: 16 / 64 / 256 give .95 / .39 / .10, at a cost a step that grows
less
  than in proportion.
- *Layers.*  The same with 4 / 8 / 16 couplings and 64 particles: .53 / .39 / .23.  On eight real posteriors
  of 4 to 13 dimensions (``benchmarks/posteriordb.py``) 8 couplings are as good as 12, for two thirds of the
  cost.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["DEFAULTS", "Defaults", "FlowDefaults", "defaults_for"]


@dataclass(frozen=True)
class FlowDefaults:
    """What is chosen for one flow.

    :param num_layers: layers, for couplings half-layers.
    :param num_particles: draws a step.
    :param lr: Adam's learning rate to start from.

    Example::

        >>> defaults_for(10).flows["planar"]
        FlowDefaults(num_layers=16, num_particles=16, lr=0.01)
    """

    num_layers: int
    num_particles: int
    lr: float


@dataclass(frozen=True)
class Defaults:
    """What is chosen for targets of up to ``max_dim`` dimensions.

    :param max_dim: the largest dimension D of the row.
    :param hidden: widths of every network.
    :param flows: by the flow's key in the registry.

    Example::

        >>> defaults_for(10).hidden
        (32, 32)
    """

    max_dim: float
    hidden: tuple[int, ...]
    flows: Mapping[str, FlowDefaults]


def _flows(
    coupling: int, spline: int, autoregressive: int, particles: int, lr: float
) -> dict[str, FlowDefaults]:
    return {
        **dict.fromkeys(("planar", "radial", "planar_radial"), FlowDefaults(16, 16, 1e-2)),
        "sylvester": FlowDefaults(8, 16, 1e-2),
        **dict.fromkeys(("nice", "realnvp"), FlowDefaults(coupling, particles, lr)),
        **dict.fromkeys(("neural_spline", "neural_spline_ar"), FlowDefaults(spline, particles, lr)),
        **dict.fromkeys(("iaf", "maf"), FlowDefaults(autoregressive, particles, lr)),
    }


DEFAULTS: Final = (
    Defaults(4, (32, 32), _flows(8, 4, 4, 64, 3e-3)),
    Defaults(32, (32, 32), _flows(8, 4, 4, 64, 3e-3)),
    Defaults(200, (64, 64), _flows(12, 4, 4, 64, 3e-3)),
    Defaults(float("inf"), (100, 100), _flows(8, 4, 4, 32, 1e-3)),
)
"""Rows by increasing dimension."""


def defaults_for(dim: int) -> Defaults:
    """The row of :data:`DEFAULTS` for targets of ``dim`` dimensions.

    Example::

        >>> defaults_for(2).flows["realnvp"].num_layers
        8
    """
    return next(row for row in DEFAULTS if dim <= row.max_dim)
