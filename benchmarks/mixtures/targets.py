"""Posteriors with several modes, and three with one: the targets of ``multimodal.py``.

Of the first the masses of the modes are known:

- *two even*, *two*: normals in five dimensions whose centres are 6 standard deviations apart, of masses
  .5 and .5, .2 and .8, the latter with correlations of their own;
- *nine*: the nine normals of ``cif_mixture.py``;
- *bananas*: two curved ridges, of masses .2 and .8;
- *labels*: a normal mixture of three components with unknown weights, centres and scales, 8 parameters, whose
  components have no order: six modes of the same mass;
- *shots*: the angle and the speed of a projectile, from where it lands and from roughly timed flights: a
  flat and a steep shot land at the same place (masses by quadrature);
- *sixteen*: normals on a lattice, of masses between .025 and .1; *unlike*: a wide one and, of two fifths of
  the mass, one a thirtieth as wide; *twenty*: three normals of unlike widths in twenty dimensions;
- one mode: *ring* (a ring of radius 4 with three bumps), *schools* (eight schools, non-centred), *kidiq* of
  posteriordb.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from benchmarks.common.posteriors import eight_schools_noncentered, load
from benchmarks.mixtures.cif_mixture import TARGETS as ISLANDS
from benchmarks.mixtures.cif_mixture import model as lattice

Sites = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """A model, and what is known of its posterior.

    :param mode_of: from draws to the index of the mode that each belongs to.
    :param masses: of the modes; one mode only has none.
    :param evidence: its logarithm.
    :param axes: from draws to the two coordinates that the picture shows.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    mode_of: Callable[[Sites], Tensor] | None = None
    masses: tuple[float, ...] = ()
    evidence: float | None = None
    axes: Callable[[Sites], Tensor] | None = None


def free_vector(dim: int, log_density: Callable[[Tensor], Tensor]) -> None:
    z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
    pyro.factor("log_density", log_density(z))


def two_normals(even: bool) -> Target:
    dim, gap = 5, 6.0
    locs = torch.zeros(2, dim)
    locs[:, 0] = torch.tensor([-gap / 2.0, gap / 2.0])
    shares, factors = torch.tensor([0.5, 0.5]), torch.eye(dim).repeat(2, 1, 1)
    if not even:
        shares = torch.tensor([0.2, 0.8])
        generator = torch.Generator().manual_seed(3)
        lower = 0.5 * torch.randn(2, dim, dim, generator=generator).tril(-1)
        factors = factors + lower  # the first coordinate, along which they are apart, keeps its scale
    law = dist.MixtureSameFamily(
        dist.Categorical(shares), dist.MultivariateNormal(locs, scale_tril=factors), validate_args=False
    )
    return Target(
        partial(free_vector, dim, law.log_prob),
        mode_of=lambda sites: (sites["z"][:, 0] > 0).long(),
        masses=tuple(shares.tolist()),
        evidence=0.0,
        axes=lambda sites: sites["z"][:, :2],
    )


def nine() -> Target:
    islands = ISLANDS["nine"]
    return Target(
        partial(lattice, islands),
        mode_of=lambda sites: torch.cdist(sites["z"], islands.locs).argmin(-1),
        masses=(1.0 / 9.0,) * 9,
        evidence=0.0,
        axes=lambda sites: sites["z"],
    )


def normals(locs: Tensor, scales: Tensor, shares: Tensor) -> Target:
    shares = shares / shares.sum()
    parts = dist.Normal(locs, scales.unsqueeze(-1)).to_event(1)
    law = dist.MixtureSameFamily(dist.Categorical(shares), parts, validate_args=False)
    return Target(
        partial(free_vector, locs.shape[-1], law.log_prob),
        mode_of=lambda sites: parts.log_prob(sites["z"].unsqueeze(-2)).argmax(-1),
        masses=tuple(shares.tolist()),
        evidence=0.0,
    )


def sixteen() -> Target:
    axis = 6.0 * torch.arange(4.0) - 9.0
    return normals(torch.cartesian_prod(axis, axis), torch.full((16,), 0.8), torch.linspace(0.5, 2.0, 16))


def unlike() -> Target:
    locs = torch.tensor([[-4.0, 0.0], [4.0, 0.0]])
    return normals(locs, torch.tensor([0.05, 1.5]), torch.tensor([0.4, 0.6]))


def twenty() -> Target:
    locs = torch.zeros(3, 20)
    locs[0, 0], locs[1, 3], locs[2, 7] = 8.0, -8.0, 10.0
    return normals(locs, torch.tensor([1.0, 0.7, 1.3]), torch.tensor([0.2, 0.5, 0.3]))


def log_ring(z: Tensor) -> Tensor:
    angle = torch.atan2(z[..., 1], z[..., 0])
    return -2.0 * (z.norm(dim=-1) - 4.0).square() + 0.3 * (3.0 * angle).cos()


def ring() -> Target:
    return Target(partial(free_vector, 2, log_ring))


def log_bananas(z: Tensor) -> Tensor:
    parts = []
    for share, sign in ((0.2, -1.0), (0.8, 1.0)):
        u, v = z[..., 0] - 4.0 * sign, sign * z[..., 1]
        log_prob = dist.Normal(0.0, 1.0).log_prob(u) + dist.Normal(0.5 * u**2, 0.3).log_prob(v)
        parts.append(math.log(share) + log_prob)
    return torch.stack(parts).logsumexp(0)


def banana_of(sites: Sites) -> Tensor:
    """The ridge that gives a draw the higher density; each has all its mass on its own side."""
    u, v = sites["z"].unbind(-1)
    near = [((v * s - 0.5 * (u - 4.0 * s) ** 2) / 0.3) ** 2 + (u - 4.0 * s) ** 2 for s in (-1.0, 1.0)]
    return (near[1] < near[0]).long()


def bananas() -> Target:
    return Target(
        partial(free_vector, 2, log_bananas),
        mode_of=banana_of,
        masses=(0.2, 0.8),
        evidence=0.0,
        axes=lambda sites: sites["z"],
    )


def normal_mixture(y: Tensor) -> None:
    shares = pyro.sample("shares", dist.Dirichlet(torch.full((3,), 3.0)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 4.0))
        scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    with pyro.plate("rows", len(y)):
        parts = dist.Normal(loc.unsqueeze(-2), scale.unsqueeze(-2))
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(shares), parts), obs=y)


ORDERS = list(itertools.permutations(range(3)))


def order_of(sites: Sites) -> Tensor:
    order = sites["loc"].argsort(-1)
    return (order.unsqueeze(1) == torch.tensor(ORDERS)).all(-1).long().argmax(-1)


def labels() -> Target:
    generator = torch.Generator().manual_seed(0)
    component = torch.multinomial(torch.tensor([0.3, 0.3, 0.4]), 80, replacement=True, generator=generator)
    locs, scales = torch.tensor([-3.0, 0.0, 2.5]), torch.tensor([0.5, 0.8, 0.4])
    y = locs[component] + scales[component] * torch.randn(80, generator=generator)
    return Target(normal_mixture, (y,), order_of, (1.0 / 6.0,) * 6, None, lambda sites: sites["loc"][:, :2])


GRAVITY = 9.81
SPEED, SPEED_SPREAD = 20.0, 0.04
RANGE_ERROR, TIME_ERROR = 0.5, 4.0


def shot(distances: Tensor, times: Tensor) -> None:
    angle = pyro.sample("angle", dist.Uniform(0.0, math.pi / 2.0))
    speed = pyro.sample("speed", dist.LogNormal(math.log(SPEED), SPEED_SPREAD))
    with pyro.plate("shots", len(distances)):
        lands = speed**2 * (2.0 * angle).sin() / GRAVITY
        pyro.sample("distance", dist.Normal(lands, RANGE_ERROR), obs=distances)
        pyro.sample("time", dist.Normal(2.0 * speed * angle.sin() / GRAVITY, TIME_ERROR), obs=times)


def shots() -> Target:
    distances, times = torch.tensor([29.8, 30.4, 30.1]), torch.tensor([4.0, 0.5, 5.0])
    size = 2000
    angle = ((torch.arange(size, dtype=torch.float64) + 0.5) / size * math.pi / 2.0).unsqueeze(-1)
    deviate = (torch.arange(size, dtype=torch.float64) + 0.5) / size * 12.0 - 6.0
    speed = (math.log(SPEED) + SPEED_SPREAD * deviate).exp()
    log_joint = dist.Normal(0.0, 1.0).log_prob(deviate.to(torch.float64)) + math.log(12.0 / size / size)
    lands, flight = speed**2 * (2.0 * angle).sin() / GRAVITY, 2.0 * speed * angle.sin() / GRAVITY
    for distance, seconds in zip(distances.tolist(), times.tolist(), strict=True):
        for value, seen, error in ((lands, distance, RANGE_ERROR), (flight, seconds, TIME_ERROR)):
            log_joint = (
                log_joint - 0.5 * ((seen - value) / error) ** 2 - math.log(error * (2 * math.pi) ** 0.5)
            )
    evidence = float(log_joint.flatten().logsumexp(0))
    flat = float(log_joint[angle.squeeze() < math.pi / 4.0].flatten().logsumexp(0))
    share = math.exp(flat - evidence)
    return Target(
        shot,
        (distances, times),
        lambda sites: (sites["angle"] > math.pi / 4.0).long(),
        (share, 1.0 - share),
        evidence,
        lambda sites: torch.stack([sites["angle"], sites["speed"]], -1),
    )


def schools() -> Target:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return Target(eight_schools_noncentered, (y, sigma))


def kidiq(folder: Path) -> Target:
    name = "kidiq-kidscore_momhsiq"
    posterior = load(folder, [name])[name]
    return Target(posterior.model, tuple(x.float() if x.is_floating_point() else x for x in posterior.args))


TARGETS: dict[str, Callable[[], Target]] = {
    "two even": partial(two_normals, True),
    "two": partial(two_normals, False),
    "nine": nine,
    "bananas": bananas,
    "labels": labels,
    "shots": shots,
    "sixteen": sixteen,
    "unlike": unlike,
    "twenty": twenty,
    "ring": ring,
    "schools": schools,
}
