"""Normalizing-flow guides for Pyro: swap an autoguide in one line, fit, and get a verdict."""

from .autoguide import AutoFlow, AutoPlanar, AutoRadial
from .diagnostics import Diagnosis, diagnose
from .infer import CompiledSVI, FitDiverged, FitResult, fit
from .transforms import FLOWS

__version__ = "0.1.0"

__all__ = [
    "FLOWS",
    "AutoFlow",
    "AutoPlanar",
    "AutoRadial",
    "CompiledSVI",
    "Diagnosis",
    "FitDiverged",
    "FitResult",
    "diagnose",
    "fit",
]
