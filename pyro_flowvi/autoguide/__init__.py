"""Guides that replace a Pyro autoguide on an unmodified model."""

from .base import AutoFlow
from .flows import (
    AutoIAF,
    AutoNeuralSpline,
    AutoNICE,
    AutoPlanar,
    AutoRadial,
    AutoRealNVP,
    AutoSylvester,
)
from .indexed import AutoCIF
from .mixture import AutoFlowMixture

__all__ = [
    "AutoCIF",
    "AutoFlow",
    "AutoFlowMixture",
    "AutoIAF",
    "AutoNICE",
    "AutoNeuralSpline",
    "AutoPlanar",
    "AutoRadial",
    "AutoRealNVP",
    "AutoSylvester",
]
