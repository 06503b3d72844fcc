"""Objectives of variational inference: Pyro's with path gradients, and with what Pyro leaves out."""

from .annealed import TraceAnnealed_ELBO
from .enumerated import TraceEnumSTL_ELBO
from .importance_weighted import TraceIW_ELBO
from .path_gradient import TraceSTL_ELBO
from .pyro_corrected import TraceAuxiliary_ELBO, TraceMeanFieldJacobian_ELBO

__all__ = [
    "TraceAnnealed_ELBO",
    "TraceAuxiliary_ELBO",
    "TraceEnumSTL_ELBO",
    "TraceIW_ELBO",
    "TraceMeanFieldJacobian_ELBO",
    "TraceSTL_ELBO",
]
