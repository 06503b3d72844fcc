"""Bijections with tractable log-determinants, one family a file: pure functions and thin modules."""

from .autoregressive import AffineAutoregressive, Autoregressive, SplineAutoregressive
from .base import (
    FlowTransform,
    ParametricTransform,
    forward_and_log_det,
    inverse_and_log_det,
)
from .compose import Compose, ConditionalCompose, Inverse
from .conditional import Conditional
from .coupling import (
    AdditiveCoupling,
    AffineCoupling,
    Coupling,
    MultiplicativeCoupling,
    SplineCoupling,
    coupling_mask,
)
from .heavy_tails import HeavyTails
from .image import Conv1x1, Partial, Squeeze2d, channel_mask, checkerboard_mask, multiscale_realnvp
from .indexed import IndexedCompose, IndexedLayer
from .linear import (
    ActNorm,
    ElementwiseAffine,
    Householder,
    LowerAffine,
    LowRankAffine,
    LULinear,
    Permute,
)
from .pixels import Logit, bits_per_dim, dequantize
from .planar import ConditionalPlanar, Planar
from .radial import ConditionalRadial, Radial, RadialPower
from .stacked import Stacked
from .sylvester import Sylvester

__all__ = [
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
    "ElementwiseAffine",
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
    "SplineAutoregressive",
    "SplineCoupling",
    "Squeeze2d",
    "Stacked",
    "Sylvester",
    "bits_per_dim",
    "channel_mask",
    "checkerboard_mask",
    "coupling_mask",
    "dequantize",
    "forward_and_log_det",
    "inverse_and_log_det",
    "multiscale_realnvp",
]
