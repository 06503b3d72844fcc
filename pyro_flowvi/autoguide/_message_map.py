"""The map from noise to latents that runs the model's own priors: each latent is drawn from prior times message."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._compile.priors import PriorGraph
from .._program.packing import Packing
from .._program.structure import LatentStructure
from ..transforms import FlowTransform
from ._coupling import Coupling
from ._fixed import Fixed
from ._joint_messages import JointMessages
from ._local_shape import LocalShape

__all__ = ["MessageMap", "Piece", "levels_of"]

FEWEST_SHAPED = 8
"""Elements of a level from which their noise gets a flow of its own."""
SHAPED = "shaped"
"""Of a frame, whether the noise of latents goes through flows of its own."""
MOST_NUMBERS = 1_000_000
"""Numbers of all draws that go through the map at once."""
MOST_APART = 12
"""Sites up to which each is a block of its own, and blocks are coupled."""
STEP = 4.0
"""Units by which a message's parameters are scaled in a frame: they settle sooner than a flow's."""
MOST_BY_ROOT = 1_000_000
"""Numbers that say how messages move with the roots, above which they stay where they are."""


class Piece(NamedTuple):
    """Sites that are drawn together, after those that their priors depend on."""

    sites: tuple[str, ...]
    place: int | None
    """Of the block of messages that they have; None with joint messages."""
    needed: list[str]
    """The latents that their priors depend on."""
    priors: Callable[..., list[tuple[Tensor, Tensor]]]


def levels_of(structure: LatentStructure) -> list[list[str]]:
    """Message sites with a prior, each after those that its prior depends on."""
    depth: dict[str, int] = {}
    for site, parents in structure.messages.items():  # in the program's order
        depth[site] = 1 + max((depth[parent] for parent in parents if parent in depth), default=-1)
    levels: list[list[str]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    for site, level in depth.items():
        levels[level].append(site)
    return levels


def _flat(value: Tensor) -> Tensor:
    return value.reshape(len(value), math.prod(value.shape[1:]))


class MessageMap(Fixed, FlowTransform):
    r"""From noise to latents, by the model's own priors and a Gaussian message for each latent.

    Roots pass as they are.  Every other latent z has a prior N(loc, scale²) given the latents before it and a
    message :math:`\exp(g (z - a) - r (z - a)^2 / 2)`, and noise x becomes

    .. math:: z = m + s\, x, \quad s = t \sqrt k, \quad m = l + t^2 k (g - r (l - a)), \quad
        k = 1 / (1 + r t^2)

    with the prior's location l and scale t: where x is standard normal, z is drawn from prior times message.
    Both g and log r may move linearly with the roots.  Where the data say nothing, r is zero and z follows
    its prior; where the prior's scale goes to zero, so does z's, as in a funnel.  The Jacobian is triangular,
    and the inverse a run with values given.  Latents without a known prior have a Gaussian of their own.

    In potential form, at a fixed point, a message stays defined wherever data or prior say nothing.

    :param packing: the latents.
    :param structure: which of them are roots, and which have messages.
    :param priors: their priors.
    :param scale: standard deviation that a message alone has at first.
    """

    names = (
        "centre",
        "slope",
        "log_weight",
        "slope_by_root",
        "log_weight_by_root",
        "root_loc",
        "log_root_width",
        "unit",
    )

    def __init__(
        self, packing: Packing, structure: LatentStructure, priors: PriorGraph, scale: float
    ) -> None:
        FlowTransform.__init__(self, packing.dim)
        for name in self.names:
            self.register_buffer(f"fixed_{name}", None)
        self._packing, self.structure, self._priors = packing, structure, priors
        self._numel = {name: latent.free_shape.numel() for name, latent in packing.latents.items()}
        self._plan()
        num_roots = sum(self._numel[name] for name in structure.roots)
        size = sum(self.block_sizes)
        total = size + sum(self._numel[site] for site in self._joint_sites)
        self.follows_roots = 0 < num_roots * total <= MOST_BY_ROOT
        if size:
            self.centre = nn.Parameter(torch.zeros(size))
            self.slope = nn.Parameter(torch.zeros(size))
            self.log_weight = nn.Parameter(torch.full((size,), -2.0 * math.log(scale)))
        if size and self.follows_roots:
            self.slope_by_root = nn.Parameter(torch.zeros(num_roots, size))
            self.log_weight_by_root = nn.Parameter(torch.zeros(num_roots, size))
        if self.follows_roots:
            self.root_loc = nn.Parameter(torch.zeros(num_roots))
            self.log_root_width = nn.Parameter(torch.zeros(num_roots))
        following = num_roots if self.follows_roots else 0
        shapes = [packing.latents[site].free_shape for site in self._joint_sites]
        self.joint = nn.ModuleList(JointMessages(shape, following, scale) for shape in shapes)
        first = 1 if structure.free else 0
        shaped = [str(i) for i, n in enumerate(self.block_sizes) if i >= first and n >= FEWEST_SHAPED]
        self.shapes = nn.ModuleDict({place: LocalShape() for place in shaped})
        places = range(len(self._blocks) if self._apart else 0)
        whole = [i for i in places if not packing.left_out.keys() & set(self._blocks[i])]
        self.couplings = nn.ModuleList(
            Coupling(self.block_sizes[i], {j: self.block_sizes[j] for j in whole if j < i})
            if i in whole
            else Coupling(1, {})
            for i in places
        )
        self.shaped = True
        """Whether the noise of latents goes through these flows, which are the identity until they are trained."""

    def _plan(self) -> None:
        """Orders the sites, and reads what follows from the graph of priors."""
        free, joint = self.structure.free, self._priors.joint
        self._blocks = [free] if free else []
        """Sites with a message for each number."""
        self.pieces = [Piece(free, 0, [], lambda: [])] if free else []
        self._joint_sites = []
        levels = levels_of(self.structure)
        self._apart = sum(map(len, levels)) <= MOST_APART
        """Whether each site is a block, and not all of a level together."""
        for level in levels:
            alone = [site for site in level if not joint[site]]
            for block in [(site,) for site in alone] if self._apart else [tuple(alone)] if alone else []:
                self.pieces.append(Piece(block, len(self._blocks), *self._priors.only(block)))
                self._blocks.append(block)
            for site in level:
                if joint[site]:
                    self.pieces.append(Piece((site,), None, *self._priors.only([site])))
                    self._joint_sites.append(site)
        self.block_sizes = [sum(self._numel[site] for site in block) for block in self._blocks]
        self._with_prior = [site for piece in self.pieces if piece.sites != free for site in piece.sites]
        self._all_needed, self._all_priors = self._priors.only(self._with_prior)

    def __getstate__(self) -> dict[str, Any]:
        planned = ("pieces", "_all_priors")
        return {key: value for key, value in super().__getstate__().items() if key not in planned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan()

    def coupling_of(self, piece: Piece) -> Coupling | None:
        """What couples a piece with others, if there is anything."""
        if piece.place is None or not self._apart:
            return None
        found: Any = self.couplings[piece.place]
        return found if found.active and (found.mixes or found.links) else None

    def _offsets(
        self, coupling: Coupling | None, values: Mapping[str, Tensor], centres: Sequence[Tensor]
    ) -> dict[int, Tensor]:
        """How far earlier blocks that a piece is linked with are from their centres."""
        places = () if coupling is None else coupling.links
        return {
            j: torch.cat([_flat(values[site]) for site in self._blocks[j]], -1) - centres[j] for j in places
        }

    def leave_shapes_out(self) -> None:
        """Spares the flows of the latents' noise, if they are the identity still."""
        self.shaped = any(
            bool(shape.last.weight.any() | shape.last.bias.any()) for shape in self.shapes.values()
        )

    def renew(self, priors: PriorGraph) -> None:
        """Takes priors that were recorded again, if they depend on the same latents."""
        if priors.joint == self._priors.joint and priors.parents == self._priors.parents:
            self._priors = priors
            self._plan()

    # -- frames --------------------------------------------------------------------------------

    def frame(self) -> tuple[dict[str, Tensor], ...]:
        """The fixed numbers of the messages, of those of each joint site, and of couplings."""
        own = {**self.fixed_numbers(), SHAPED: torch.tensor(self.shaped)}
        return own, *(module.fixed_numbers() for module in self._others())

    def set_frame(self, frame: Sequence[Mapping[str, Tensor]]) -> None:
        """Puts fixed numbers in place, none with an empty one, and leaves the parameters as they are."""
        modules: list[Fixed] = [self, *self._others()]
        for i, module in enumerate(modules):
            module.fix(frame[i] if i < len(frame) else {})
        self._spare(frame)

    @torch.no_grad()
    def enter_frame(self, frame: Sequence[Mapping[str, Tensor]] | None = None) -> None:
        """Makes the parameters corrections to fixed numbers, by default to what they are themselves."""
        self.leave_frame()
        modules: list[Fixed] = [self, *self._others()]
        for i, module in enumerate(modules):
            module.set_fixed(module.as_fixed() if frame is None or not frame[i] else frame[i])
        self._spare(frame or ())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.shaped = True
        super()._load_from_state_dict(*args, **kwargs)

    def _spare(self, frame: Sequence[Mapping[str, Tensor]]) -> None:
        """Leaves out what is the identity for as long as the map is in a frame."""
        for coupling in self.couplings:
            coupling.rest_if_idle()  # type: ignore[operator]
        if frame and not bool(frame[0].get(SHAPED, True)):
            self.leave_shapes_out()

    def as_fixed(self) -> dict[str, Tensor]:
        own = {name: param.detach().clone() for name, param in self._parameters.items() if param is not None}
        if self._blocks:
            own["unit"] = (0.5 * own["log_weight"]).exp()
        return own

    @torch.no_grad()
    def leave_frame(self) -> None:
        """Makes the parameters what they and the fixed numbers are together."""
        if self._blocks and self.fixed_centre is not None:
            own = {name: self.fixed_or(name) for name in self.names}
            own["slope"] = self.fixed_slope + STEP * self.fixed_unit * self.slope
            own["log_weight"] = self.fixed_log_weight + STEP * self.log_weight
            self.set_fixed(own, own=True)
        elif self.fixed_root_loc is not None:
            self.set_fixed({name: self.fixed_or(name) for name in self.names}, own=True)
        for module in self._others():
            module.leave()

    def _others(self) -> list[Any]:
        return [*self.joint, *self.couplings]

    def _joint_modules(self) -> list[JointMessages]:
        return list(self.joint)  # type: ignore[arg-type]

    # -- messages ------------------------------------------------------------------------------

    @property
    def num_messages(self) -> int:
        """How many latents are drawn by messages."""
        return sum(self.block_sizes) + sum(self._numel[site] for site in self._joint_sites)

    @property
    def num_roots(self) -> int:
        return sum(self._numel[site] for site in self.structure.roots)

    def _moved(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """How far roots, by site, are from where the messages are exact, up to a bound; ``(P, R)``."""
        if not self.follows_roots:
            return None
        roots = torch.cat([_flat(values[site]) for site in self.structure.roots], -1)
        offset = roots - self.fixed_or("root_loc")
        # Linear to within a thousandth over half of the width, and bounded by it.
        ratio = (offset * (-self.fixed_or("log_root_width")).exp()).square()
        return offset * (1.0 + ratio.square().square()) ** -0.125

    def _messages(self, moved: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Centre, slope and log weight of each block of sites."""
        if not self._blocks:
            return []
        slope, log_weight = self.slope, self.log_weight
        if self.fixed_centre is not None:
            slope = self.fixed_slope + STEP * self.fixed_unit * slope
            log_weight = self.fixed_log_weight + STEP * log_weight
        if moved is not None:
            slope = slope + moved @ self.fixed_or("slope_by_root")
            log_weight = log_weight + (moved @ self.fixed_or("log_weight_by_root")).clamp(-8.0, 8.0)
        parts = (self.fixed_or("centre"), slope, log_weight)
        return list(zip(*(part.split(self.block_sizes, -1) for part in parts), strict=True))

    @torch.no_grad()
    def centre_at(self, z: Tensor) -> None:
        """Puts the messages at a point of the latents, ``(D,)``, so that with its roots the others follow."""
        slopes = torch.zeros_like(z)
        for (loc, scale), places, joint in self.priors_at(z.unsqueeze(0)):
            flat = places.flatten()
            kept = flat >= 0
            offset = torch.where(kept, z[flat.clamp(min=0)], 0.0).reshape(places.shape) - loc[0].to(z)
            scale = scale[0].to(z)
            if joint:
                pull = torch.cholesky_solve(offset.unsqueeze(-1), scale).squeeze(-1)
            else:
                pull = offset / scale.square()
            slopes[flat[kept]] = pull.flatten()[kept]
        places = self.flat_places()
        if len(places):
            self.centre.copy_(torch.where(places >= 0, z[places.clamp(min=0)], 0.0))
            self.slope.copy_(torch.where(places >= 0, slopes[places.clamp(min=0)], 0.0))
        for module, where in zip(self._joint_modules(), self.joint_places(), strict=True):
            module.centre.copy_(z[where.clamp(min=0)])
            module.slope.copy_(slopes[where.clamp(min=0)])

    # -- where things stand --------------------------------------------------------------------

    def places(self) -> dict[str, Tensor]:
        """Where the numbers of each site are in the packed vector; -1 for what is left out."""
        numbers = torch.arange(1.0, self.dim + 1.0, dtype=torch.float64)
        return {site: where.long() - 1 for site, where in self._packing.split(numbers).items()}

    def flat_places(self) -> Tensor:
        """The same of the numbers that have a message each, in the order of these."""
        places = self.places()
        sites = [site for block in self._blocks for site in block]
        return torch.cat([torch.zeros(0, dtype=torch.long), *(places[site].flatten() for site in sites)])

    def joint_places(self) -> list[Tensor]:
        """The same of the sites with joint messages, ``(N, K)`` each."""
        places = self.places()
        return [
            places[site].reshape(module.num, module.width)  # type: ignore[union-attr]
            for site, module in zip(self._joint_sites, self.joint, strict=True)
        ]

    def root_scales(self, z: Tensor) -> Tensor:
        """Standard deviations of the roots' priors, ``(D,)``; infinite where none is known."""
        scales, places = torch.full_like(z, math.inf), self.places()
        roots = [site for site in self.structure.roots if site in self._priors.joint]
        needed, priors = self._priors.only(roots)
        values = self._split(z.unsqueeze(0))
        for site, (_, scale) in zip(roots, priors(*(values[name] for name in needed)), strict=True):
            spread = scale.norm(dim=-1) if self._priors.joint[site] else scale
            scales[places[site]] = spread[0].to(z)
        return scales

    def priors_at(self, z: Tensor) -> list[tuple[tuple[Tensor, Tensor], Tensor, bool]]:
        """Of each site with a message and a known prior: this at points ``(P, D)``, where its numbers are, and
        whether the prior is joint."""
        values, places = self._split(z), self.places()
        found = self._all_priors(*(values[site] for site in self._all_needed))
        return [
            (prior, places[site], self._priors.joint[site])
            for site, prior in zip(self._with_prior, found, strict=True)
        ]

    def _params_of(self, piece: Piece) -> Iterator[nn.Parameter]:
        """What is trained of a piece beside its block of messages."""
        shapes = dict(self.shapes.items()) if self.shaped else {}
        module = self._joint_of(piece) if piece.place is None else shapes.get(str(piece.place))
        modules = [each for each in (module, self.coupling_of(piece)) if each is not None]
        return (p for each in modules for p in each.parameters() if p.requires_grad)

    def _message_params(self) -> list[nn.Parameter]:
        """What :meth:`_messages` and :meth:`_moved` are made of."""
        return [param for param in self._parameters.values() if param is not None]

    # -- the map -------------------------------------------------------------------------------

    def _split(self, rows: Tensor) -> dict[str, Tensor]:
        return self._packing.split(rows)

    def _join(self, values: Mapping[str, Tensor]) -> Tensor:
        flat = torch.cat([_flat(values[site]) for site in self._packing.latents], -1)
        return self._packing.keep(flat)

    def _block(self, values: Mapping[str, Tensor], piece: Piece) -> Tensor:
        """A piece's numbers side by side, ``(P, M)``, of a joint one ``(P, N, K)``."""
        parts = [_flat(values[site]) for site in piece.sites]
        block = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return block if piece.place is not None else block.reshape(len(block), *self._joint_of(piece).shape)

    def _joint_of(self, piece: Piece) -> JointMessages:
        return self.joint[self._joint_sites.index(piece.sites[0])]  # type: ignore[return-value]

    def _spread(self, block: Tensor, piece: Piece) -> dict[str, Tensor]:
        """The inverse of :meth:`_block`."""
        latents = self._packing.latents
        parts = _flat(block).split([self._numel[site] for site in piece.sites], -1)
        return {
            site: part.reshape(len(block), *latents[site].free_shape)
            for site, part in zip(piece.sites, parts, strict=True)
        }

    def _counted(self, log_det: Tensor, piece: Piece) -> Tensor:
        """Log-determinants of a piece without those of numbers that are no part of the vector."""
        out = self._packing.left_out
        if not any(site in out for site in piece.sites):
            return log_det
        dropped = [
            out[site].flatten() if site in out else torch.zeros(self._numel[site], dtype=torch.bool)
            for site in piece.sites
        ]
        mask = torch.cat(dropped).to(log_det.device)
        if piece.place is None:
            mask = mask.reshape(self._joint_of(piece).shape).all(-1)
        return torch.where(mask, 0.0, log_det)

    def _move(
        self,
        piece: Piece,
        block: Tensor,
        priors: Sequence[tuple[Tensor, Tensor]],
        message: Any,
        forward: bool,
        offsets: Mapping[int, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """A piece's latents of its mixed noise, or back, and log-determinants of its numbers.

        :param message: the piece's block of :meth:`_messages`; of a joint one how far the roots have moved.
        :param offsets: of the blocks that it is linked with.
        """
        coupling = self.coupling_of(piece)
        if coupling is not None and offsets:
            centre, slope, log_weight = message
            message = centre, slope + coupling.pull(offsets), log_weight
        if piece.place is None:
            joint = self._joint_of(piece)
            ((loc, scale),) = priors
            loc = loc.reshape(-1, *joint.shape)
            scale = scale.reshape(-1, *joint.shape, joint.width)
            move = joint.forward_and_log_det if forward else joint.inverse_and_log_det
            block, log_det = move(block, loc, scale, message)
        elif not priors:
            centre, slope, log_weight = message
            mean, log_det = centre + slope * (-log_weight).exp(), -0.5 * log_weight
            scale = log_det.exp()
            block, log_det = (
                (mean + scale * block, log_det) if forward else ((block - mean) / scale, -log_det)
            )
            log_det = log_det.expand_as(block)
        else:
            block, log_det = self._elementwise(piece, block, priors, message, forward)
            log_det = log_det.expand_as(block)
        return block, self._counted(log_det, piece)

    def _run(self, rows: Tensor, forward: bool) -> tuple[Tensor, Tensor]:
        """Images of noise, or noise of images, and log-determinants of that direction."""
        given = self._split(rows)
        found = {site: given[site] for site in self.structure.roots}
        values = found if forward else given
        moved = self._moved(values)
        messages = self._messages(moved)
        total = rows.new_zeros(len(rows))
        together = None if forward else iter(self._all_priors(*(given[site] for site in self._all_needed)))
        for piece in self.pieces:
            if piece.sites == self.structure.free:
                priors = []
            elif together is None:
                priors = piece.priors(*(values[site] for site in piece.needed))
            else:
                priors = [next(together) for _ in piece.sites]
            priors = [(loc.to(rows), scale.to(rows)) for loc, scale in priors]
            message = moved if piece.place is None else messages[piece.place]
            coupling, block = self.coupling_of(piece), self._block(given, piece)
            mixes = coupling is not None and coupling.mixes
            if mixes and forward:
                block, mix_det = coupling.mixed(block)
            offsets = self._offsets(coupling, values, [centre for centre, *_ in messages])
            block, log_det = self._move(piece, block, priors, message, forward, offsets)
            if mixes and not forward:
                _, mix_det = coupling.mixed(block)
                block, mix_det = coupling.unmixed(block), -mix_det
            found |= self._spread(block, piece)
            total = total + (
                log_det + self._counted(mix_det.expand_as(log_det), piece) if mixes else log_det
            ).sum(-1)
        return self._join(found), total

    def _elementwise(
        self,
        piece: Piece,
        block: Tensor,
        priors: Sequence[tuple[Tensor, Tensor]],
        message: tuple[Tensor, Tensor, Tensor],
        forward: bool,
    ) -> tuple[Tensor, Tensor]:
        """Latents of the noise of a level's numbers, or back, and log-determinants for each."""
        loc, scale = (
            torch.cat([_flat(one) for one in part], -1) if len(part) > 1 else _flat(part[0])
            for part in zip(*priors, strict=True)
        )
        centre, slope, log_weight = message
        weight, variance = log_weight.exp(), scale.square()
        share = 1.0 / (1.0 + weight * variance)
        pull = slope - weight * (loc - centre)
        # Of the terms none is larger than the mean, wherever prior and message are.
        mean, width = centre + share * (loc - centre) + variance * share * slope, scale * share.sqrt()
        log_width = width.log()
        place = str(piece.place)
        shape: Any = self.shapes[place] if self.shaped and place in self.shapes else None
        context = None
        if shape is not None:
            parts = (mean, log_width, share, scale * share * pull)
            context = torch.stack([part.expand_as(block) for part in parts], -1)
        if forward:
            if shape is None:
                return mean + width * block, log_width
            shaped, log_det = shape.forward_and_log_det(block, context)
            return mean + width * shaped, log_width + log_det
        standard = (block - mean) / width
        if shape is None:
            return standard, -log_width
        noise, log_det = shape.inverse_and_log_det(standard, context)
        return noise, log_det - log_width

    def _in_parts(self, rows: Tensor, forward: bool) -> tuple[Tensor, Tensor]:
        """As :meth:`_run`, of many rows in parts: the flows of noise have networks with many units."""
        most = max(1, MOST_NUMBERS // self.dim)
        if len(rows) <= most:
            return self._run(rows, forward)
        images, log_dets = zip(*(self._run(part, forward) for part in rows.split(most)), strict=True)
        return torch.cat(images), torch.cat(log_dets)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self._in_parts(x.reshape(-1, self.dim), forward=True)
        return z.reshape(x.shape), log_det.reshape(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = self._in_parts(y.reshape(-1, self.dim), forward=False)
        return x.reshape(y.shape), log_det.reshape(y.shape[:-1])
