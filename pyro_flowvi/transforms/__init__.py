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
from .linear import ElementwiseAffine, LowerAffine, LowRankAffine, Permute
from .planar import ConditionalPlanar, Planar
from .radial import ConditionalRadial, Radial
from .recipes import FLOWS

__all__ = [
    "FLOWS",
    "Compose",
    "Conditional",
    "ConditionalCompose",
    "ConditionalPlanar",
    "ConditionalRadial",
    "ElementwiseAffine",
    "FlowTransform",
    "LowRankAffine",
    "LowerAffine",
    "ParametricTransform",
    "Permute",
    "Planar",
    "Radial",
    "forward_and_log_det",
    "inverse_and_log_det",
]
