"""Guides that replace a Pyro autoguide on an unmodified model."""

from .continuously_indexed import AutoCIF
from .flow import AutoFlow
from .flow_mixture import AutoFlowMixture
from .named import (
    AutoIAF,
    AutoNeuralSpline,
    AutoNICE,
    AutoPlanar,
    AutoRadial,
    AutoRealNVP,
    AutoSylvester,
)

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
