"""Where the messages of a structured guide start: at the mode of the latents given the roots.

Laplace's approximation nested in one of the roots, as in INLA (Rue, Martino and Chopin 2009).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._compile.log_density import TracedDensity
from .._compile.pulled_back import pulled_back_at
from ..init.gaussians import hessians_at, normal_noise
from ..init.lbfgs import ascend
from ..init.sparse_laplace import Elimination
from ._given_roots import GivenRoots, LaplaceMessages
from ._message_map import MessageMap

__all__ = ["Starter", "place_messages", "renew_messages"]

NEWTON_STEPS, RENEWED_STEPS = 12, 4
"""Newton steps from a start that is far, and from one that is near."""
ROUNDS = 6
"""Renewals of the messages at the roots that were found with the last ones."""
ARRIVED = 0.05
"""Standard deviations of a root within which a round changes nothing."""
NODES = 8
"""Draws of the noise over which the roots' density is averaged."""
ASCENT = 30
"""Evaluations to find the roots in a round."""
APART = 0.5
"""Standard deviations of a root between the points that tell how messages move with it."""
REACH = 4.0
"""Standard deviations of a root beyond which messages no longer move."""
WIDEST = 3.0
"""Standard deviation of a root at most, where its prior is not known; else it is the prior's.  At its mode
the density of a root may be nearly flat."""
EXACT = 0.02
"""Standard deviation of log weights of latents given the roots, nats, below which these are Gaussian."""


class Starter:
    """The search for the roots, with messages that are renewed where they are.

    :param layer: the map, whose fixed numbers are set.
    :param density: the model's graph.
    """

    def __init__(self, layer: MessageMap, density: TracedDensity) -> None:
        self.layer, self.density = layer, density
        self.start = density.density.start
        self.roots = layer.plan.root_places()
        known = layer.plan.root_scales(self.start)
        self.bound = torch.where(known.isfinite(), known, WIDEST)[self.roots]
        """Standard deviation that each root has at most."""
        self.given = GivenRoots(layer, density)

    # -- messages ------------------------------------------------------------------------------

    def put(self, z: Tensor, factor: Elimination, scale: Tensor | None) -> None:
        """Gives the map the messages at a mode; with ``scale`` of the roots also how these move with them."""
        couplings = self.given.read_couplings(z, factor)  # first: a block that is mixed has other messages
        own = self.given.read_messages(z, factor)
        self._set(z, own)
        for coupling, numbers in zip(self.layer.all_couplings(), couplings, strict=True):
            coupling.set_fixed(numbers)
            coupling.active = bool(numbers)
        if scale is not None and self.layer.follows_roots:
            first, *others = self._movements(z, own, scale)
            first = {**first, "root_loc": z[self.roots], "log_root_width": (REACH * scale).log()}
            self._set(z, own, [first, *others])

    def _set(self, z: Tensor, own: LaplaceMessages, moves: list[dict[str, Tensor]] | None = None) -> None:
        """Gives the map messages, which stay where they are without ``moves``."""
        first, *others = moves or [{} for _ in range(1 + len(own.joint))]
        numbers = {**_still(self.layer), **own.numbers, **first}
        if self.layer.follows_roots and "root_loc" not in first:
            numbers |= {"root_loc": z[self.roots], "log_root_width": z.new_zeros(len(self.roots))}
        self.layer.set_fixed({name: value for name, value in numbers.items() if value.numel()})
        for module, joint, movement in zip(self.layer.joint_messages(), own.joint, others, strict=True):
            module.set_fixed({**_still(module), **joint, **movement})

    def follow(self, u: Tensor) -> Tensor:
        """Latents in the middle of prior and message for roots ``(P, R)``."""
        x = u.new_zeros(len(u), self.density.density.dim)
        x[:, self.roots] = u
        return self.layer.forward_and_log_det(x)[0]

    def _movements(self, z: Tensor, own: LaplaceMessages, scale: Tensor) -> list[dict[str, Tensor]]:
        """How messages move with the roots, of the blocks and of each site with a joint prior.

        By differences over half a standard deviation of each root to both sides, at the modes there.
        """
        num = len(self.roots)
        shifts = torch.diag(APART * scale)
        roots = z[self.roots] + torch.cat([shifts, -shifts])
        around, factors = self.given.newton(self.follow(roots), RENEWED_STEPS)
        sides = [
            None if factor is None else self.given.read_messages(at, factor)
            for at, factor in zip(around, factors, strict=True)
        ]
        moves: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(1 + len(own.joint))]
        for high, low, sd in zip(sides[:num], sides[num:], scale, strict=True):
            width = 2.0 * APART * sd
            if high is None or low is None:
                high = low = own
            change = _slope_at(own.numbers, high.numbers) - _slope_at(own.numbers, low.numbers)
            change = change - self._by_links(high.numbers["centre"] - low.numbers["centre"])
            grown = high.numbers["log_weight"] - low.numbers["log_weight"]
            moves[0].append((change / width, grown / width))
            for found, here, one, other in zip(moves[1:], own.joint, high.joint, low.joint, strict=True):
                change = _joint_slope(here, one) - _joint_slope(here, other)
                grown = _mean_log_weight(one) - _mean_log_weight(other)
                found.append(((change / width).flatten(), grown / width))
        return [
            {
                "slope_by_root": torch.stack([slope for slope, _ in found]),
                "log_weight_by_root": torch.stack([weight for _, weight in found]),
            }
            for found in moves
        ]

    def _by_links(self, moves: Tensor) -> Tensor:
        """What links already do to slopes where the latents move."""
        if not len(moves):
            return moves
        parts = moves.split(self.layer.plan.block_sizes)
        pulled = [torch.zeros_like(part) for part in parts]
        for place, coupling in enumerate(self.layer.all_couplings()):
            if coupling.active and coupling.links:
                pulled[place] = coupling.pull({j: parts[j].unsqueeze(0) for j in coupling.links})[0]
        return torch.cat(pulled)

    # -- the roots -----------------------------------------------------------------------------

    def roots_density(self, nodes: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The roots' log density by the mean over draws of noise of log p(roots, z, data) - log q(z | roots).

        That is a lower bound on the marginal, and the marginal itself where messages are exact.

        :param nodes: noise, ``(K, D)``.
        """

        def value_and_grad(u: Tensor) -> tuple[Tensor, Tensor]:
            x = nodes.repeat(len(u), 1)
            x[:, self.roots] = u.repeat_interleave(len(nodes), 0)
            value, gradient = pulled_back_at(self.layer, self.density, x)
            value, gradient = value.reshape(len(u), -1), gradient[:, self.roots]
            return value.mean(1), gradient.reshape(len(u), len(nodes), -1).mean(1)

        return value_and_grad

    def locate(self, u: Tensor, scale: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, float]:
        """The mode of the roots from u in units of ``scale``.

        :param nodes: as of :meth:`roots_density`.
        :return: the mode; a lower factor of the roots' covariance; how many standard deviations they moved.
        """
        density = self.roots_density(nodes)

        def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = density(u + x @ scale.mT)
            return value, gradient @ scale

        found = ascend(scaled, u.new_zeros(1, len(u)), ASCENT)
        at = found.points[:1]
        hessian = hessians_at(scaled, at)[0].nan_to_num(0.0, 0.0, 0.0)
        values, vectors = torch.linalg.eigh(hessian)
        spread = vectors * values.clamp(min=0.05).rsqrt()
        covariance = scale @ spread @ spread.mT @ scale.mT
        widest = (covariance.diagonal().sqrt() / self.bound).clamp(min=1.0)
        covariance = covariance / widest.unsqueeze(-1) / widest
        moved = float((at[0].abs() / spread.norm(dim=-1)).max()) if len(u) else 0.0
        return u + scale @ at[0], torch.linalg.cholesky(covariance), moved

    def is_gaussian(self, z: Tensor, nodes: Tensor) -> bool:
        """Whether the latents given the roots are what the messages say, as with conjugate priors."""
        x = nodes.clone()
        x[:, self.roots] = z[self.roots]
        value = pulled_back_at(self.layer, self.density, x)[0] + 0.5 * x.square().sum(-1)
        return bool(value.std() < EXACT)


def _still(module: nn.Module) -> dict[str, Tensor]:
    """Of messages that do not move with the roots how they do."""
    params = module.named_parameters(recurse=False)
    return {name: torch.zeros_like(param) for name, param in params if "by_root" in name}


def _slope_at(here: dict[str, Tensor], there: dict[str, Tensor]) -> Tensor:
    """The slope of a message at another centre."""
    return there["slope"] - there["log_weight"].exp() * (here["centre"] - there["centre"])


def _joint_slope(here: dict[str, Tensor], there: dict[str, Tensor]) -> Tensor:
    """The same of joint messages."""
    offset = (here["centre"] - there["centre"]).unsqueeze(-1)
    return there["slope"] - (there["weight"] @ offset).squeeze(-1)


def _mean_log_weight(there: dict[str, Tensor]) -> Tensor:
    """Of joint messages the mean logarithm of their weights' eigenvalues."""
    log_det: Tensor = torch.linalg.slogdet(there["weight"])[1]
    return log_det / there["weight"].shape[-1]


@torch.no_grad()
def place_messages(layer: MessageMap, density: TracedDensity) -> tuple[Tensor, Tensor] | None:
    """Gives a map the messages to start with, and says where its roots are.

    :param layer: the map; it is in a frame afterwards.
    :param density: the model's graph.
    :return: location of the roots, ``(R,)``, and lower factor of their covariance; None where the latents'
        Hessian has no pattern that can be used, or is singular.
    """
    starter = Starter(layer, density)
    if not starter.given.usable:
        return None
    z = starter.start.clone()
    scale = torch.diag(starter.bound)
    nodes = normal_noise(NODES, density.density.dim, z, seed=1)
    sds = None
    for step in range(ROUNDS if len(starter.roots) else 0):
        modes, factors = starter.given.newton(z.unsqueeze(0), RENEWED_STEPS if step else NEWTON_STEPS)
        if factors[0] is None:
            return None
        z = modes[0]
        starter.put(z, factors[0], sds)
        u, scale, moved = starter.locate(z[starter.roots], scale, nodes if step else 0.0 * nodes[:1])
        sds = scale.norm(dim=-1)
        z = starter.follow(u.unsqueeze(0))[0]
        if step and moved < ARRIVED:
            break
    steps = RENEWED_STEPS if len(starter.roots) else NEWTON_STEPS
    modes, factors = starter.given.newton(z.unsqueeze(0), steps)
    if factors[0] is None:
        return None
    starter.put(modes[0], factors[0], sds)
    if starter.is_gaussian(modes[0], nodes):
        layer.leave_shapes_out()
    return z[starter.roots], scale


@torch.no_grad()
def renew_messages(starter: Starter, z: Tensor, scale: Tensor) -> bool:
    """Gives a map the messages at roots that are known already.

    :param starter: of the map, which is in a frame afterwards.
    :param z: a point with the roots where they are, and the other latents where they may be, ``(D,)``.
    :param scale: standard deviations of the roots, ``(R,)``.
    :return: False, and nothing is done, where :func:`place_messages` would give None.
    """
    if not starter.given.usable:
        return False
    modes, factors = starter.given.newton(z.unsqueeze(0), NEWTON_STEPS)
    if factors[0] is None:
        return False
    starter.put(modes[0], factors[0], scale if len(scale) else None)
    if starter.is_gaussian(modes[0], normal_noise(NODES, len(z), z, seed=1)):
        starter.layer.leave_shapes_out()
    return True
