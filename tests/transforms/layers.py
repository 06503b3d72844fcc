"""Every layer by name, as a function of the dimension: what the tests of all layers go through."""

import torch

from pyro_flowvi.transforms import (
    ActNorm,
    AdditiveCoupling,
    AffineAutoregressive,
    AffineCoupling,
    Compose,
    Coupling,
    ElementwiseAffine,
    HeavyTails,
    Householder,
    Inverse,
    LowerAffine,
    LowRankAffine,
    LULinear,
    MultiplicativeCoupling,
    Permute,
    Planar,
    Radial,
    RadialPower,
    SplineAutoregressive,
    SplineCoupling,
    Sylvester,
)
from pyro_flowvi.transforms.univariate import Affine

LAYERS = {
    "planar": lambda dim: Planar(dim),
    "radial": lambda dim: Radial(dim),
    "radial_power": lambda dim: RadialPower(dim),
    "elementwise": lambda dim: ElementwiseAffine(dim, scale=0.3),
    "lower": lambda dim: LowerAffine(dim, scale=0.3),
    "low_rank": lambda dim: LowRankAffine(dim, scale=0.3),
    "lu": lambda dim: LULinear(dim),
    "act_norm": lambda dim: ActNorm(dim),
    "householder": lambda dim: Householder(dim),
    "sylvester": lambda dim: Sylvester(dim),
    "heavy_tails": lambda dim: HeavyTails(dim),
    "additive": lambda dim: AdditiveCoupling(dim, hidden=(4,)),
    "multiplicative": lambda dim: MultiplicativeCoupling(dim, mask="odd", hidden=(4,)),
    "affine_coupling": lambda dim: AffineCoupling(dim, mask="even", hidden=(4, 3)),
    "spline_coupling": lambda dim: SplineCoupling(dim, mask="second", hidden=(4,), num_bins=4),
    "coupling": lambda dim: Coupling(dim, Affine(1.0), mask=[i % 3 == 0 for i in range(dim)]),
    "affine_ar": lambda dim: AffineAutoregressive(dim, hidden=(7, 3)),
    "spline_ar": lambda dim: SplineAutoregressive(dim, hidden=(4,), num_bins=4, reverse=True),
    "inverse_ar": lambda dim: Inverse(AffineAutoregressive(dim, hidden=(4,))),
    "permute": lambda dim: Permute(torch.randperm(dim)),
    "compose": lambda dim: Compose([Planar(dim), Permute(torch.randperm(dim)), LowerAffine(dim)]),
}


def randomized(transform, scale=0.3):
    with torch.no_grad():
        for param in transform.parameters():
            param.add_(scale * torch.randn_like(param))
    return transform
