"""Draws of a guide with their log weights, as points of the model's unconstrained latent space."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from .._compile.log_density import log_densities
from .._program.batching import even_sizes
from .._program.log_density import UnconstrainedModel
from .._program.log_weights import LogWeights
from .._types import Program
from ..autoguide._groups import GroupedDraws, find_groups
from ..autoguide._protocol import FitGuide, as_fit_guide
from ..autoguide._row_weights import RootWeights, weigh_roots

__all__ = ["WeightedDraws", "as_array", "weighted_draws"]

MAX_BATCH = 4096
"""Draws that the model scores in one run."""
MOST_NUMBERS = 20_000_000
"""Numbers of them at once, where a site is large."""
MOST_AT_ONCE = 3_000
"""Latents of a subsampled plate up to which the model is run with all rows."""
WIDTH = 64
"""Draws that it scores at once in a pass over pages of rows."""


@dataclass(frozen=True)
class WeightedDraws:
    """Independent draws of a guide.

    :param log_weights: log p(x, z) - log q(z), shape ``(S,)``, float64.
    :param sites: name -> values of a latent, ``(S,) + site shape``; None where only weights could be had.
    :param z: the packed unconstrained latents, ``(S, D)``; None as ``sites``.
    :param log_p: their unnormalised log density, ``(S,)``, in the unconstrained coordinates.
    :param density: the model over ``z``.
    :param particles: the pair of model and guide.
    :param why: why ``z`` is None, in words.
    :param exact: whether the weights are of all data although the model shows a part of them.
    :param labels: names of the coordinates of ``z`` where these are some of the latents.
    :param flow: the map from standard normal noise to ``z``, if the guide has one with an inverse.
    :param grouped: the same draws, where the weights are those of the roots, with the groups integrated.
    :param num_groups: how many groups that are.
    :param roots: the coordinates that these depend on.
    :param by_row: the same of rows, whose latents were weighed in passes.
    """

    log_weights: NDArray[np.float64]
    particles: LogWeights
    sites: dict[str, Tensor] | None = None
    z: Tensor | None = None
    log_p: Tensor | None = None
    density: UnconstrainedModel | None = None
    why: str = ""
    exact: bool = False
    labels: tuple[str, ...] = ()
    flow: Any = None
    grouped: GroupedDraws | None = None
    num_groups: int = 0
    roots: Tensor | None = None
    by_row: RootWeights | None = None

    def names(self) -> list[str]:
        """A name for each of the D coordinates of ``z``, such as ``theta[2]``."""
        return list(self.labels) if self.density is None else self.density.packing.names()


def _score_draws(particles: LogWeights, size: int) -> tuple[dict[str, Tensor], Tensor]:
    """Values by site and log q of ``size`` runs of the guide."""
    args, kwargs, shapes = particles.args, particles.kwargs, particles.structure.latents
    with poutine.block(), torch.no_grad():
        if particles.vectorized:
            guide = particles.batched(particles.program, size)
            trace: Any = poutine.trace(guide).get_trace(*args, **kwargs)
            values = {k: trace.nodes[k]["value"].reshape((size,) + shape) for k, shape in shapes.items()}
            return values, particles.score(trace, size)
        traces: list[Any] = [poutine.trace(particles.program).get_trace(*args, **kwargs) for _ in range(size)]
        values = {k: torch.stack([trace.nodes[k]["value"] for trace in traces]) for k in shapes}
        return values, torch.stack([torch.as_tensor(trace.log_prob_sum()) for trace in traces])


def weighted_draws(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    num_samples: int,
    in_passes: bool = True,
    by_group: bool = True,
) -> WeightedDraws:
    """Draws from any guide with their log weights, located in the unconstrained space where that exists.

    :param in_passes: whether many latents under a subsampled plate may be weighed by passes over its rows,
        which keep the others alone.
    :param by_group: whether the weights are those of the roots alone, where all other latents fall into
        groups that are independent given these.

    Example::

        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> draws = weighted_draws(model, model, (), None, 100)
        >>> draws.z.shape, round(float(abs(draws.log_weights).max()), 3)
        (torch.Size([100, 1]), 0.0)
    """
    answers = as_fit_guide(model, guide)
    answers.set_up(args, kwargs or {})
    of_rows: FitGuide | None = None
    sweep = answers.sweep(lambda _: [(args, kwargs or {})])
    whole = answers.whole(args, kwargs or {})
    if whole is not None:
        if in_passes and sweep is not None and sweep.num_latents > MOST_AT_ONCE:
            why = f"{sweep.num_latents} latents under a subsampled plate are weighed by passes over its rows"
            pair = LogWeights(model, guide, args, kwargs)
            labels = tuple(sweep.names_of_roots())
            weighed = weigh_roots(sweep, num_samples, WIDTH)
            if weighed is None:
                roots, found = sweep.log_weights(num_samples, WIDTH)
            else:
                roots, found = weighed.roots, weighed.log_weights
            return WeightedDraws(
                as_array(found), pair, z=roots if labels else None, why=why, exact=True, labels=labels,
                by_row=weighed, num_groups=0 if weighed is None else sweep.size,
            )  # fmt: skip
        model, guide, (args, kwargs) = whole
        of_rows, answers = answers, as_fit_guide(model, guide)
    particles = LogWeights(model, guide, args, kwargs)
    most = max(1, min(MAX_BATCH, MOST_NUMBERS // particles.structure.largest))
    try:
        density = answers.density_of(model, particles.args, particles.kwargs)
        missing = sorted(set(density.packing.latents) ^ set(particles.structure.latents))
        why = f"model and guide differ in the sites {missing}" if missing else ""
    except (ValueError, NotImplementedError) as error:  # the latents are no vector of fixed support
        why = str(error).partition(";")[0]
    if particles.structure.summed_by_guide:
        why = "the guide has discrete sites that are summed out"
    if why:
        return WeightedDraws(as_array(particles.log_weights(num_samples)), particles, why=why)
    if of_rows is not None:
        density, flow = of_rows.whole_map(args, kwargs or {})
    else:
        flow = answers.pushforward(model)
    flow = flow if getattr(flow, "exact_inverse", False) else None
    groups = find_groups(flow, density) if by_group else None
    if groups is not None:
        drawn = groups.draw(num_samples, density.start)
        sites = density.packing.constrain(drawn.z)
        return WeightedDraws(
            as_array(drawn.log_weights), particles, sites, drawn.z, density=density, flow=flow,
            grouped=drawn, num_groups=groups.num, roots=groups.roots,
        )  # fmt: skip
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    values: list[dict[str, Tensor]] = []
    with torch.no_grad(), pyro.validation_enabled(False):
        for size in even_sizes(num_samples, most):
            latent = answers.draw_latent(size)
            if latent is None:
                sites, log_q = _score_draws(particles, size)
                z, log_det = density.packing.unconstrain(sites)
                log_q = log_q + log_det
            else:
                z, log_q = latent
                sites = density.packing.constrain(z)
            parts.append((z, log_densities(density, z), log_q))
            values.append(sites)
        z, log_p, log_q = (torch.cat([part[i] for part in parts]) for i in range(3))
        sites = {name: torch.cat([part[name] for part in values]) for name in density.packing.latents}
    return WeightedDraws(as_array(log_p - log_q), particles, sites, z, log_p, density, flow=flow)


def as_array(value: Tensor) -> NDArray[np.float64]:
    """A tensor's numbers in float64."""
    array: NDArray[np.float64] = value.detach().double().cpu().numpy()
    return array
