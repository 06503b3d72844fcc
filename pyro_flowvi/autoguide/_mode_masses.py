"""What a trained mixture says of the modes that it has: which components belong to each, and its mass."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._compile.log_density import traced
from .._program.log_density import UnconstrainedModel
from ..distributions.mixture_of_flows import pick_component
from ..init._all_modes import MOST_OVERLAP, shared_mass
from ..init._bent_paths import connected
from ..init.gaussians import MAX_DENSE_DIM, Gaussian

__all__ = ["ModeMasses", "masses_of"]

DRAWS, FEW = 4096, 64
MOST_ELEMENTS = 2**21
"""Draws of a mixture, and numbers in them with the data, by which masses are found."""
SPREAD = 256
"""Draws of a component that tell its covariance."""
LEAST_MASS = 1e-3
"""Mass below which a component is at no mode."""


@dataclass(frozen=True)
class ModeMasses:
    """The masses of the modes that a mixture of flows has, the heaviest first; prints as a line.

    Estimated by importance sampling: of draws of the mixture, weighted to the posterior, each counts for its
    components as they are responsible for it.

    :param masses: shape ``(M,)``; they sum to one.
    :param se: their standard errors, the draws' own; NaN where the model scores no draws.
    :param components: of each mode the components that describe it: those that share its mass, and those
        between which a path leads on which the density of the posterior hardly falls.

    Example::

        >>> ModeMasses(torch.tensor([0.7, 0.3]), torch.tensor([0.01, 0.01]), ((1,), (0, 2)))
        2 modes, masses 0.70, 0.30 (± 0.010), by 3 components
    """

    masses: Tensor
    se: Tensor
    components: tuple[tuple[int, ...], ...]

    def __repr__(self) -> str:
        count, parts = len(self.masses), sum(map(len, self.components))
        if count == 1:
            text = "1 mode"
        else:
            error = float(self.se.max())
            known = "" if math.isnan(error) else f" (± {error:.3f})"
            text = f"{count} modes, masses {', '.join(f'{mass:.2f}' for mass in self.masses.tolist())}{known}"
        return text if parts == count else f"{text}, by {parts} components"


def _groups(overlap: Tensor, alive: list[int]) -> list[list[int]]:
    """Components that belong together, directly or by others."""
    groups: list[list[int]] = []
    for i in alive:
        near = [group for group in groups if any(bool(overlap[i, j] > MOST_OVERLAP) for j in group)]
        joined = [j for group in near for j in group]
        groups = [*(group for group in groups if group not in near), [*joined, i]]
    return groups


def _places(mixture: Any) -> Gaussian:
    """Where components are densest, with their covariances."""
    drawn = mixture.rsample_components((SPREAD,))
    own = mixture.component_log_prob(drawn).diagonal(dim1=-2, dim2=-1)
    densest = pick_component(drawn.movedim(0, 1), own.argmax(0))
    gap = (drawn - drawn.mean(0)).movedim(1, 0)
    sizes, vectors = torch.linalg.eigh(gap.mT @ gap / SPREAD)
    scale = vectors * sizes.clamp(min=1e-12 * float(sizes.max())).sqrt().unsqueeze(-2)
    return Gaussian(densest, scale, ("modes",) * len(densest))


@torch.no_grad()
def masses_of(guide: Any, density: UnconstrainedModel | None) -> ModeMasses:
    """The masses of the modes of a mixture guide.

    :param guide: the guide.
    :param density: the model with all its data; None if what is known of it is a part.
    """
    mixture = guide.get_posterior()
    graph = None if density is None else traced(density)
    largest = guide.latent_dim if density is None else max(guide.latent_dim, density.largest)
    size = max(FEW, min(DRAWS, MOST_ELEMENTS // max(1, largest)))
    if graph is not None and not graph.batched:
        size = FEW
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z = mixture.sample((size,))
        places = _places(mixture) if guide.latent_dim <= MAX_DENSE_DIM else None
    joint = mixture.joint_log_prob(z)
    shares = z.new_full((size,), 1.0 / size)
    if graph is not None:
        ratios = graph(z)[0] - joint.logsumexp(-1)
        if bool(ratios.isfinite().any()):
            shares = torch.where(ratios.isfinite(), ratios, -torch.inf).softmax(0).to(joint)
        else:
            graph = None
    responsibilities = joint.softmax(-1)
    each = shares @ responsibilities
    alive = [i for i, mass in enumerate(each.tolist()) if mass > LEAST_MASS]
    overlap = shared_mass(shares, responsibilities)
    if graph is not None and graph.batched and places is not None:
        for group in connected(graph, places.select(alive)):
            for i in group:
                overlap[alive[group[0]], alive[i]] = overlap[alive[i], alive[group[0]]] = 1.0
    groups = sorted(_groups(overlap, alive), key=lambda group: -float(each[group].sum()))
    parts = torch.stack([responsibilities[:, group].sum(-1) for group in groups], -1)
    masses = shares @ parts
    se = (shares.square() @ (parts - masses).square()).sqrt()
    if graph is None:
        se = torch.full_like(se, math.nan)
    return ModeMasses((masses / masses.sum()).cpu(), se.cpu(), tuple(tuple(group) for group in groups))
