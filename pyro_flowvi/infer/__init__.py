"""Fitting a guide."""

from .cause import CannotCompile
from .compiled import CompiledSVI, CompileWarning
from .fit import FitDiverged, FitResult, fit

__all__ = ["CannotCompile", "CompileWarning", "CompiledSVI", "FitDiverged", "FitResult", "fit"]
