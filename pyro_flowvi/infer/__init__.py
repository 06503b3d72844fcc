"""Fitting a guide, the compiled SVI, and the objectives."""

from .._compile.errors import CannotCompile, CompileWarning
from .._compile.svi import CompiledSVI
from .._ranks import LostRank
from ..objectives import (
    TraceAnnealed_ELBO,
    TraceAuxiliary_ELBO,
    TraceEnumSTL_ELBO,
    TraceIW_ELBO,
    TraceMeanFieldJacobian_ELBO,
    TraceSTL_ELBO,
)
from ._fit import fit
from ._result import FitDiverged, FitResult

__all__ = [
    "CannotCompile",
    "CompileWarning",
    "CompiledSVI",
    "FitDiverged",
    "FitResult",
    "LostRank",
    "TraceAnnealed_ELBO",
    "TraceAuxiliary_ELBO",
    "TraceEnumSTL_ELBO",
    "TraceIW_ELBO",
    "TraceMeanFieldJacobian_ELBO",
    "TraceSTL_ELBO",
    "fit",
]
