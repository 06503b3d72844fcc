"""What a guide takes over from one that was fitted before, to another version of its model or of its data."""

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._compile.log_density import TracedDensity
from .._program.log_density import UnconstrainedModel
from .._program.packing import Latent, Packing
from ..init.gaussians import MAX_DENSE_DIM, normal_noise
from ._message_map import MessageMap
from ._message_start import Starter, renew_messages
from ._natural_steps import climb
from ._on_roots import OnRoots
from ._structured import spread_over

__all__ = [
    "Learned",
    "approach",
    "bring_over",
    "check_previous",
    "copy_flow",
    "gap_of",
    "learned_of",
    "moments",
    "weigh",
]

MANY, FEW = 4096, 128
"""Draws of the earlier guide that tell its moments, and those that tell where it is."""
MOST_ELEMENTS = 2**20
SOME, WEIGHED = 128, 512
"""Draws that tell how near a guide is, and those that move the roots of one with messages."""
MOST_SPREAD = 2.0
"""Variance of log weights above which it says little."""
ROUNDS = 3
"""Renewals of the messages at the roots that were found with the last ones."""
MOST_APART = 1.0
"""Standard deviations of a root from where the messages are right that need no further one."""


Learned = dict[str, dict[str, Tensor]]
"""By site, what a fit has learned of its messages, by the names of parameters."""


@dataclass
class Point:
    """Where an earlier posterior is, in the coordinates of a new one.

    :param loc: means of the latents, ``(D,)``.
    :param sd: standard deviations, ``(D,)``.
    """

    loc: Tensor
    sd: Tensor


def gap_of(weights: Tensor) -> float:
    """How far below the evidence a guide is, nats, by log weights of its draws, as of normal ones."""
    return 0.5 * float(weights.double().var()) if bool(weights.isfinite().all()) else math.inf


def check_previous(guide: Any, previous: Any) -> None:
    """Refuses a guide from which nothing can be taken over.

    :raises ValueError: naming ``init``.
    """
    if previous.prototype_trace is None:
        raise ValueError(
            f"init: expected a guide that was fitted, got {previous.name!r}, which has not seen data; "
            "one whose state was loaded needs materialize with the data of its fit"
        )
    own, others = (each._packing.latents for each in (guide, previous))
    if not any(name in others and _fits(others[name], latent) for name, latent in own.items()):
        raise ValueError(f"init: expected a guide with some of the latents {list(own)}, got {list(others)}")


def bring_over(guide: Any, previous: Any, density: UnconstrainedModel) -> tuple[bool, Point | None]:
    """Gives a guide the flow of an earlier one, or its moments where the latents are others.

    :return: whether it has the flow; the earlier posterior's moments, or None where these are not needed.
    """
    layer, new = guide._map, guide._packing
    whole = previous is guide or _copied(guide, previous)
    if whole and layer is None:
        return True, None
    rows = _carried(previous, new, density.start, guide._init_scale, FEW if whole else MANY)
    if not whole:
        places = None if layer is None else layer.plan.root_places()
        loc, scale = moments(rows if places is None else rows[:, places])
        if places is not None and guide._flow_places(layer) is None:
            loc, scale = spread_over(places, loc, scale, new.dim)
        guide.place_at(loc, scale)
    return whole, Point(rows.mean(0), rows.std(0))


def _copied(guide: Any, previous: Any) -> bool:
    """Whether the guide has the flow of an earlier one now."""
    layer, earlier = guide._map, previous._map
    old, new = previous._packing, guide._packing
    if (layer is None) != (earlier is None):
        return False
    sites, others = list(new.latents), list(old.latents)
    if layer is not None:
        roots = layer.plan.structure.roots
        if roots != earlier.plan.structure.roots:
            return False
        if guide._flow_places(layer) is not None and previous._flow_places(earlier) is not None:
            sites = others = list(roots)
    if not (sites == others and _same_sites(sites, old, new) and copy_flow(guide._flow, previous._flow)):
        return False
    if layer is not None:
        _copy_shapes(layer, earlier)
    return True


def _copy_shapes(layer: MessageMap, earlier: MessageMap) -> None:
    """Gives a map the flows of the latents' noise, which all latents of a level share, of an earlier one."""
    for place, shape in layer.shapes.items():
        block = layer.plan.blocks[int(place)]
        if place in earlier.shapes and earlier.plan.blocks[int(place)] == block:
            shape.load_state_dict(earlier.shapes[place].state_dict())


def learned_of(layer: MessageMap) -> Learned:
    """What a fit has changed of the messages that it started with, in a frame, on average over rows."""
    found: Learned = {}
    for module, sites in _modules_of(layer):
        for site, rows in sites.items():
            found[site] = {name: getattr(module, name).detach()[rows].mean(0) for name in module.trained}
    return found


@torch.no_grad()
def _learn(layer: MessageMap, learned: Learned) -> None:
    """Changes messages that are new as those of an earlier fit."""
    for module, sites in _modules_of(layer):
        for site, rows in sites.items():
            for name, value in learned.get(site, {}).items():
                own = getattr(module, name)
                if value.shape == own.shape[1:]:
                    own[rows] = value.to(own)


def _modules_of(layer: MessageMap) -> list[tuple[Any, dict[str, slice]]]:
    """Modules with messages, and where in them those of each site are."""
    spans, start = {}, 0
    for block in layer.plan.blocks:
        for site in block:
            size = layer.plan.count([site])
            spans[site] = slice(start, start + size)
            start += size
    joint = zip(layer.joint_messages(), layer.plan.joint_sites, strict=True)
    return [*([(layer, spans)] if spans else []), *((module, {site: slice(None)}) for module, site in joint)]


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of draws, and the lower factor of their covariance, above MAX_DENSE_DIM their deviations."""
    loc, sd = rows.mean(0), rows.std(0).clamp(min=1e-6)
    if len(loc) > MAX_DENSE_DIM:
        return loc, sd
    scaled = (rows - loc) / sd
    correlation = scaled.mT @ scaled / len(rows)
    # Of what few draws say about many latents a part is chance.
    share = min(0.9, len(loc) / len(rows))
    correlation = (1.0 - share) * correlation + share * torch.eye(len(loc)).to(rows)
    return loc, sd.unsqueeze(-1) * torch.linalg.cholesky(correlation)


def _same_sites(sites: Iterable[str], old: Packing, new: Packing) -> bool:
    """Whether unconstrained numbers of these sites of the new packing are those of the old one."""
    return all(site in old.latents and _same(old.latents[site], new.latents[site]) for site in sites)


def _same(old: Latent, new: Latent) -> bool:
    if old.free_shape != new.free_shape or old.shape != new.shape:
        return False
    out = [
        torch.zeros(one.free_shape, device="cpu") if one.left_out is None else one.left_out.cpu()
        for one in (old, new)
    ]
    free = torch.linspace(-1.0, 1.0, old.free_shape.numel(), dtype=torch.float64).reshape(old.free_shape)
    one, other = (latent.bijection(free) for latent in (old, new))
    return torch.equal(out[0].bool(), out[1].bool()) and torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def _width(latent: Latent) -> int:
    """How many of a site's last dimensions are constrained together."""
    return int(latent.unit_bijection.domain.event_dim)


@torch.no_grad()
def _carried(previous: Any, new: Packing, start: Tensor, scale: float, num: int) -> Tensor:
    """Draws of an earlier guide as latents of a new model, ``(num, D)``, by site and by position.

    New rows of a site have the mean and the spread of those that it had; new sites are around ``start`` with
    a standard deviation of ``scale``.
    """
    num = max(FEW, min(num, MOST_ELEMENTS // max(1, previous.latent_dim)))
    old: Packing = previous._packing
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = old.constrain(previous.draw_latent(num)[0])
    noise = normal_noise(num, new.dim, start, seed=3)
    parts, others = new.split(start + scale * noise), new.split(noise)
    for site, latent in new.latents.items():
        if site in drawn and _fits(old.latents[site], latent):
            parts[site] = _overlap(old.latents[site], latent, drawn[site], parts[site], others[site])
    return new.keep(torch.cat([part.reshape(num, -1) for part in parts.values()], -1))


def _fits(old: Latent, new: Latent) -> bool:
    """Whether a site's numbers can be matched by position."""
    width = _width(new)
    alike = len(old.free_shape) == len(new.free_shape) and _width(old) == width
    return alike and (not width or old.free_shape[-width:] == new.free_shape[-width:])


def _overlap(old: Latent, new: Latent, values: Tensor, otherwise: Tensor, noise: Tensor) -> Tensor:
    """Unconstrained draws of a site, ``(n, *free shape)``: rows that it had, and new ones like them."""
    if not old.free_shape.numel() or not new.free_shape.numel():
        return otherwise
    free: Tensor = new.unit_bijection.inv(values.to(otherwise)).reshape(len(values), *old.free_shape)
    if not bool(free.isfinite().all()):  # outside of a support that is another one now
        return otherwise
    changed = [d for d, (a, b) in enumerate(zip(old.free_shape, new.free_shape, strict=True), 1) if a != b]
    if not changed:
        return free
    mean = free.mean([0, *changed], keepdim=True)
    filled: Tensor = mean + (free - mean).square().mean([0, *changed], keepdim=True).sqrt() * noise
    both = [slice(min(a, b)) for a, b in zip(old.free_shape, new.free_shape, strict=True)]
    filled[(slice(None), *both)] = free[(slice(None), *both)]
    return filled


@torch.no_grad()
def weigh(guide: Any, density: TracedDensity) -> Tensor:
    """Log weights of a guide's draws, whose spread moves the roots of one with messages.

    The best ELBO follows, along the roots, the mean m of the log weights, the posterior m + v / 2 with their
    variance v, where messages are not exact.  The slope of v has less noise than a mean by the weights.

    :param density: the model's graph.
    """
    layer = guide._map
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z, log_q = guide.draw_latent(SOME if layer is None else WEIGHED)
    weights: Tensor = density(z)[0] - log_q
    if layer is None or not bool(weights.isfinite().all()) or float(weights.var()) > MOST_SPREAD:
        return weights
    roots = layer.plan.root_places()
    inside = slice(None) if guide._flow_places(layer) is not None else roots
    guide.affine.loc[inside] += (
        0.5 * (weights - weights.mean()).square() @ (z[:, roots] - z[:, roots].mean(0)) / len(z)
    )
    return weights


# -- the flow ------------------------------------------------------------------------------------


def _parts(flow: Any) -> list[Any]:
    """Those before a message map, as the roots see them."""
    parts = (part for part in flow if not isinstance(part, MessageMap))
    return [part.inner if isinstance(part, OnRoots) else part for part in parts]


def _make(part: Any) -> list[Any]:
    """What two parts have in common that differ in their numbers alone."""
    if not isinstance(part, nn.Module):
        return [repr(part)]
    kinds = [type(module) for module in part.modules()]
    return [*kinds, *((name, value.shape) for name, value in part.state_dict().items())]


@torch.no_grad()
def copy_flow(flow: Any, earlier: Any) -> bool:
    """Gives a flow the numbers of an earlier one, but for those of a message map's messages.

    :return: False, and nothing is done, where the two differ in more than their numbers.
    """
    own, others = _parts(flow), _parts(earlier)
    alike = [_make(part) for part in own] == [_make(part) for part in others]
    if not alike:
        return False
    for one, other in zip(own, others, strict=True):
        if isinstance(one, nn.Module):
            one.load_state_dict(other.state_dict())
    for name, value in earlier.named_parameters(recurse=False):  # of a mixture its weights
        getattr(flow, name).copy_(value)
    return True


@torch.no_grad()
def approach(guide: Any, point: Point | None, learned: Learned, density: TracedDensity) -> bool:
    """Moves a guide from where an earlier one is towards the posterior.

    :param guide: the guide.
    :param point: where the earlier posterior is, of a guide with messages.
    :param learned: what the earlier fit has learned of its messages.
    :param density: the model's graph.
    :return: False where the latents have no mode given the roots; else messages are in a frame.
    """
    flow, layer, affine = guide.pushforward(guide._raw_model[0]), guide._map, guide.affine
    if layer is None or point is None:
        if flow is not None and guide.can_move():
            with suppress(NotImplementedError):  # a foreign transform may have no inverse, and so no score
                climb(flow, affine, None, density)
        return True
    if flow is None or not guide.can_move():
        return False
    places, roots = guide._flow_places(layer), layer.plan.root_places()
    z, sds, starter = point.loc.clone(), point.sd[roots], Starter(layer, density)
    for _ in range(ROUNDS):
        if not renew_messages(starter, z, sds):
            return False
        _learn(layer, learned)
        climb(flow, affine, places, density)
        before = z[roots]
        z = flow(torch.zeros(1, density.density.dim).to(z))[0]
        if not len(roots) or bool(((z[roots] - before) / sds).abs().max() < MOST_APART):
            break
    return True
