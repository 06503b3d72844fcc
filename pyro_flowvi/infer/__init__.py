"""Fitting a guide."""

from .fit import FitDiverged, FitResult, fit

__all__ = ["FitDiverged", "FitResult", "fit"]
