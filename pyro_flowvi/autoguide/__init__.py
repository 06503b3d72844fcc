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

__all__ = [
    "AutoCIF",
    "AutoFlow",
    "AutoIAF",
    "AutoNICE",
    "AutoNeuralSpline",
    "AutoPlanar",
    "AutoRadial",
    "AutoRealNVP",
    "AutoSylvester",
]
