"""Fitting a guide."""

from .cause import CannotCompile, CompileWarning
from .compiled import CompiledSVI
from .corrected import TraceAuxiliary_ELBO, TraceMeanFieldJacobian_ELBO
from .elbo import TraceAnnealed_ELBO, TraceEnumSTL_ELBO, TraceIW_ELBO, TraceSTL_ELBO
from .fit import FitDiverged, FitResult, fit

__all__ = [
    "CannotCompile",
    "CompileWarning",
    "CompiledSVI",
    "FitDiverged",
    "FitResult",
    "TraceAnnealed_ELBO",
    "TraceAuxiliary_ELBO",
    "TraceEnumSTL_ELBO",
    "TraceIW_ELBO",
    "TraceMeanFieldJacobian_ELBO",
    "TraceSTL_ELBO",
    "fit",
]
