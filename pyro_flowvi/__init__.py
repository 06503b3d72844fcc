"""Normalizing-flow guides for Pyro: swap an autoguide in one line, fit, and get a verdict."""

from .autoguide import AutoCIF, AutoFlow, AutoFlowMixture, ExportedPosterior, load_posterior
from .autoguide import named as _named
from .autoguide.named import *  # noqa: F403  what named.__all__ lists
from .diagnostics import Calibration, Comparison, Diagnosis, compare, diagnose, sbc, to_arviz
from .flows import FLOWS
from .infer import CompiledSVI, FitDiverged, FitResult, fit
from .models import FlowVAE, VMoNF

__version__ = "0.1.0"

__all__ = [
    "FLOWS",
    "AutoCIF",
    "AutoFlow",
    "AutoFlowMixture",
    "Calibration",
    "Comparison",
    "CompiledSVI",
    "Diagnosis",
    "ExportedPosterior",
    "FitDiverged",
    "FitResult",
    "FlowVAE",
    "VMoNF",
    "compare",
    "diagnose",
    "fit",
    "load_posterior",
    "sbc",
    "to_arviz",
]
__all__ += _named.__all__
