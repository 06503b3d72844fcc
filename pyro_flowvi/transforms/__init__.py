"""Bijections with tractable log-determinants: pure functions, thin modules, and the registry ``FLOWS``."""

from .autoregressive import AffineAutoregressive, Autoregressive, SplineAutoregressive
from .base import (
    Conditional,
    FlowTransform,
    ParametricTransform,
    forward_and_log_det,
    inverse_and_log_det,
)
from .compose import Compose, ConditionalCompose
from .coupling import (
    AdditiveCoupling,
    AffineCoupling,
    Coupling,
    MultiplicativeCoupling,
    SplineCoupling,
    coupling_mask,
)
from .defaults import DEFAULTS, Defaults, FlowDefaults, defaults_for
from .dequantize import Logit, bits_per_dim, dequantize
from .image import Conv1x1, Partial, Squeeze2d, channel_mask, checkerboard_mask, multiscale_realnvp
from .indexed import IndexedCompose, IndexedLayer
from .inverse import Inverse
from .linear import (
    ActNorm,
    ElementwiseAffine,
    Householder,
    LowerAffine,
    LowRankAffine,
    LULinear,
    Permute,
)
from .planar import ConditionalPlanar, Planar
from .radial import ConditionalRadial, Radial, RadialPower
from .recipes import FLOWS, Recipe, indexed_layers, recipe_name
from .stacked import Stacked
from .sylvester import Sylvester
from .tails import HeavyTails

__all__ = [
    "DEFAULTS",
    "FLOWS",
    "ActNorm",
    "AdditiveCoupling",
    "AffineAutoregressive",
    "AffineCoupling",
    "Autoregressive",
    "Compose",
    "Conditional",
    "ConditionalCompose",
    "ConditionalPlanar",
    "ConditionalRadial",
    "Conv1x1",
    "Coupling",
    "Defaults",
    "ElementwiseAffine",
    "FlowDefaults",
    "FlowTransform",
    "HeavyTails",
    "Householder",
    "IndexedCompose",
    "IndexedLayer",
    "Inverse",
    "LULinear",
    "Logit",
    "LowRankAffine",
    "LowerAffine",
    "MultiplicativeCoupling",
    "ParametricTransform",
    "Partial",
    "Permute",
    "Planar",
    "Radial",
    "RadialPower",
    "Recipe",
    "SplineAutoregressive",
    "SplineCoupling",
    "Squeeze2d",
    "Stacked",
    "Sylvester",
    "bits_per_dim",
    "channel_mask",
    "checkerboard_mask",
    "coupling_mask",
    "defaults_for",
    "dequantize",
    "forward_and_log_det",
    "indexed_layers",
    "inverse_and_log_det",
    "multiscale_realnvp",
    "recipe_name",
]
