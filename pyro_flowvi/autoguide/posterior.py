"""What a guide is made of: its affine map, the latent of one call, fixed points for summaries."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Size, Tensor
from torch.distributions import biject_to

from ..distributions.flow import FlowDistribution, Shape, is_scoring
from ..init.gaussians import MAX_DENSE_DIM
from ..transforms import ElementwiseAffine, FlowTransform, LowerAffine, LowRankAffine
from ..transforms.compose import Chain

__all__ = [
    "AFFINES",
    "CallPosterior",
    "affine_layer",
    "marginal_quantiles",
    "pack",
    "reference_normal",
    "sample_quantiles",
]

AFFINES: Final[dict[str, Callable[..., FlowTransform]]] = {
    "lower": LowerAffine,
    "low_rank": LowRankAffine,
    "elementwise": ElementwiseAffine,
}

QUANTILE_DRAWS = 8192
QUANTILE_ELEMENTS = 2**20

_MAX_SOBOL_DIM = 21201
"""The largest dimension of torch's Sobol sequence."""


class CallPosterior(FlowDistribution):
    """The latent of one guide call: answers from memory for the very tensor that it drew.

    That saves the inverse pass, and serves transforms that have none.
    """

    _drawn: tuple[Tensor, ...] | None = None

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        draw = self.rsample_with_score if is_scoring() else self.rsample_and_log_prob
        self._drawn = draw(sample_shape)
        return self._drawn[0]

    def drawn_score(self, value: Tensor) -> Tensor | None:
        """∇ log q at the very tensor that was drawn within :func:`scoring`; None for any other."""
        if self._drawn is None or value is not self._drawn[0] or len(self._drawn) < 3:
            return None
        return self._drawn[2]

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is not None and value is self._drawn[0]:
            return self._drawn[1]
        return super().log_prob(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "CallPosterior":
        return super().expand(batch_shape, self._get_checked_instance(CallPosterior, _instance))


def affine_layer(kind: str, dim: int, scale: float) -> FlowTransform:
    """The affine map of a guide: of a kind, or with "auto" of the kind for the dimension."""
    if kind == "auto":
        kind = "lower" if dim <= MAX_DENSE_DIM else "low_rank"
    return AFFINES[kind](dim, scale=scale)


def reference_normal(num_points: int, dim: int) -> Tensor:
    """Standard normal quasi-Monte Carlo points, float64, shape ``(num_points, dim)``.

    The same at every call: summaries are repeatable and leave Pyro's generator alone.
    """
    engine = torch.quasirandom.SobolEngine(min(dim, _MAX_SOBOL_DIM), scramble=True, seed=0)
    uniform = engine.draw(num_points, dtype=torch.float64)
    if dim > _MAX_SOBOL_DIM:
        generator = torch.Generator().manual_seed(0)
        rest = torch.rand((num_points, dim - _MAX_SOBOL_DIM), generator=generator, dtype=torch.float64)
        uniform = torch.cat([uniform, rest], -1)
    points: Tensor = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
    return points


def marginal_quantiles(
    flow: Chain,
    probs: Tensor,
    split: Callable[[Tensor], dict[str, Tensor]],
    bijection_of: Callable[[str], Any],
) -> dict[str, Tensor]:
    """Marginal quantiles of each site, ``probs.shape + site shape``, by quasi-Monte Carlo.

    :param flow: the transform of a standard normal vector.
    :param split: from packed latents to unconstrained values by site.
    :param bijection_of: from the name of a site to the map onto its support.
    """
    like = next(flow.parameters(), torch.zeros(()))
    # In parts: a spline has 23 parameters for each latent of each point.
    parts = reference_normal(QUANTILE_DRAWS, flow.dim).to(like).split(max(1, QUANTILE_ELEMENTS // flow.dim))
    return sample_quantiles(split(torch.cat([flow(part) for part in parts])), probs.to(like), bijection_of)


def sample_quantiles(
    points: Mapping[str, Tensor], probs: Tensor, bijection_of: Callable[[str], Any]
) -> dict[str, Tensor]:
    """Quantiles of each site, ``probs.shape + site shape``, over points of the unconstrained space.

    :param points: unconstrained values by site, the points first.
    """
    result = {}
    for name, free in points.items():
        bijection = bijection_of(name)
        if free.numel() == 0:
            result[name] = bijection(free[0].expand(probs.shape + free.shape[1:]))
        elif bijection.domain.event_dim == 0:  # elementwise: exact for decreasing maps as well
            result[name] = torch.quantile(bijection(free), probs, dim=0)
        else:
            result[name] = bijection(torch.quantile(free, probs, dim=0))
    return result


def pack(
    samples: Mapping[str, Tensor], sites: Mapping[str, Any], like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of all latent sites as unconstrained vectors.

    :param samples: site name -> ``S + site shape``.
    :param sites: site name -> the site of a trace, in the order of the vector.
    :param like: of the wanted dtype and device.
    :return: vectors ``S + (D,)``, log |dx/dz| of shape ``S``, and whether all values are in their supports.
    :raises ValueError: if a site is missing, unknown, of another shape, or NaN.
    """
    if set(samples) != set(sites):
        raise ValueError(f"samples: expected the sites {sorted(sites)}, got {sorted(samples)}")
    free_values, log_det = [], torch.zeros(()).to(like)
    inside = torch.ones((), dtype=torch.bool, device=like.device)
    for name, site in sites.items():
        value, shape = samples[name], site["value"].shape
        batch = value.shape[: value.dim() - len(shape)]
        if value.shape != batch + shape or bool(value.isnan().any()):
            raise ValueError(
                f"samples[{name!r}]: expected shape (*, {', '.join(map(str, shape))}) without "
                f"NaN, got {tuple(value.shape)}"
            )
        support = site["fn"].support
        valid = _rows(support.check(value), batch).all(-1)
        # An invalid value would put NaN into the gradient of the valid ones.
        mask = valid.reshape(batch + (1,) * len(shape))
        value = torch.where(mask, value, site["value"].to(value))
        bijection = biject_to(support)
        free = bijection.inv(value)
        log_det = log_det + _rows(bijection.log_abs_det_jacobian(free, value), batch).sum(-1)
        inside = inside & valid
        free_values.append(_rows(free, batch))
    batch = torch.broadcast_shapes(*(free.shape[:-1] for free in free_values))
    latent = torch.cat([free.expand(batch + free.shape[-1:]) for free in free_values], -1)
    return latent.to(like), log_det, inside


def _rows(value: Tensor, batch: tuple[int, ...]) -> Tensor:
    """``value`` of shape ``batch + rest`` as ``batch + (n,)``, also where it has no elements."""
    return value.reshape(batch + (Size(value.shape[len(batch) :]).numel(),))
