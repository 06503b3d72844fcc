"""Bijections with tractable log-determinants: pure functions, thin modules, and the registry ``FLOWS``."""

from .base import (
    Compose,
    Conditional,
    ConditionalCompose,
    FlowTransform,
    ParametricTransform,
    forward_and_log_det,
    inverse_and_log_det,
)
from .coupling import (
    AdditiveCoupling,
    AffineCoupling,
    Coupling,
    MultiplicativeCoupling,
    SplineCoupling,
    coupling_mask,
)
from .linear import ElementwiseAffine, LowerAffine, LowRankAffine, Permute
from .planar import ConditionalPlanar, Planar
from .radial import ConditionalRadial, Radial
from .recipes import FLOWS

__all__ = [
    "FLOWS",
    "AdditiveCoupling",
    "AffineCoupling",
    "Compose",
    "Conditional",
    "ConditionalCompose",
    "ConditionalPlanar",
    "ConditionalRadial",
    "Coupling",
    "ElementwiseAffine",
    "FlowTransform",
    "LowRankAffine",
    "LowerAffine",
    "MultiplicativeCoupling",
    "ParametricTransform",
    "Permute",
    "Planar",
    "Radial",
    "SplineCoupling",
    "coupling_mask",
    "forward_and_log_det",
    "inverse_and_log_det",
]
