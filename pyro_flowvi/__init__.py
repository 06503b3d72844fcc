"""Normalizing-flow guides for Pyro: swap an autoguide in one line, fit, and get a verdict."""

from .autoguide import (
    AutoFlow,
    AutoIAF,
    AutoNeuralSpline,
    AutoNICE,
    AutoPlanar,
    AutoRadial,
    AutoRealNVP,
    AutoSylvester,
)
from .diagnostics import Diagnosis, diagnose
from .infer import CompiledSVI, FitDiverged, FitResult, fit
from .transforms import FLOWS

__version__ = "0.1.0"

__all__ = [
    "FLOWS",
    "AutoFlow",
    "AutoIAF",
    "AutoNICE",
    "AutoNeuralSpline",
    "AutoPlanar",
    "AutoRadial",
    "AutoRealNVP",
    "AutoSylvester",
    "CompiledSVI",
    "Diagnosis",
    "FitDiverged",
    "FitResult",
    "diagnose",
    "fit",
]
