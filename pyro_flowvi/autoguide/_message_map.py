"""The map from noise to latents by the model's own priors: each latent is drawn from prior times message."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._compile.priors import PriorGraph
from .._program.packing import Packing
from .._program.structure import LatentStructure
from ..transforms import FlowTransform
from ._block_messages import BlockMessages
from ._coupling import Coupling
from ._fixed import Fixed
from ._joint_messages import JointMessages
from ._local_shape import LocalShape
from ._message_plan import MessagePlan, Piece, Prior, joined, taken
from ._row_layout import RowLayout

__all__ = ["MessageMap"]

FEWEST_SHAPED = 8
"""Elements of a level from which their noise gets a flow of its own."""
MOST_NUMBERS = 1_000_000
"""Numbers of all draws that go through the map at once."""
SHAPED = "shaped"
"""Of a frame, whether the noise of latents goes through flows of its own."""
MOST_ROOTS_OF_ROWS = 20
"""Roots up to which the messages of rows move with them."""
MOST_BY_ROOT = 1_000_000
"""Numbers that say how messages move with the roots, above which they stay where they are."""


class MessageMap(BlockMessages, FlowTransform):
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
    :param rows: the rows that all but the roots belong to, and whose log-determinants have weights; None
        without any.
    :param follow: whether messages may move with the roots.
    """

    def __init__(
        self,
        packing: Packing,
        structure: LatentStructure,
        priors: PriorGraph,
        scale: float,
        rows: RowLayout | None = None,
        follow: bool = True,
    ) -> None:
        FlowTransform.__init__(self, packing.dim)
        self.register_fixed()
        self.plan = plan = MessagePlan(packing, structure, priors)
        self.rows = rows
        num_roots = plan.count(structure.roots)
        if rows is not None:
            following = num_roots if follow and num_roots <= MOST_ROOTS_OF_ROWS else 0
        else:
            following = num_roots if num_roots * plan.num_messages <= MOST_BY_ROOT else 0
        self._add_messages(plan.block_sizes, following, scale)
        self.joint = nn.ModuleList(
            JointMessages(plan.joint_shape(site), following, scale) for site in plan.joint_sites
        )
        first = 1 if structure.free else 0
        self.shapes = nn.ModuleDict(
            {
                str(i): LocalShape()
                for i, size in enumerate(plan.block_sizes)
                if i >= first and (size >= FEWEST_SHAPED or rows is not None)
            }
        )
        self.couplings = nn.ModuleList(map(self._new_coupling, range(plan.num_couplings)))
        self.shaped = True
        """Whether the noise of latents goes through these flows, the identity until they are trained."""

    def _new_coupling(self, place: int) -> Coupling:
        sizes, coupled = self.plan.block_sizes, self.plan.coupled
        if place not in coupled:
            return Coupling(1, {})
        earlier = {j: sizes[j] for j in coupled if j < place}
        return Coupling(sizes[place], earlier, by_number=self.rows is not None)

    def weighted(self, log_det: Tensor, piece: Piece) -> Tensor:
        """Log-determinants of a piece's numbers, times the weights of their rows."""
        return (
            log_det if self.rows is None else log_det * self.rows.weights_of(piece.sites, log_det.shape[-1])
        )

    def renew(self, priors: PriorGraph) -> None:
        """Takes priors that were recorded again, if they depend on the same latents."""
        self.plan = self.plan.renewed(priors)

    @property
    def structure(self) -> LatentStructure:
        """Which latents are roots, and which have messages."""
        return self.plan.structure

    def places(self) -> dict[str, Tensor]:
        """Where the numbers of each site are in the vector; -1 for what is left out."""
        return self.plan.places()

    # -- parts ---------------------------------------------------------------------------------

    def joint_messages(self) -> list[JointMessages]:
        """Those of each site with a joint prior."""
        return [module for module in self.joint if isinstance(module, JointMessages)]

    def all_couplings(self) -> list[Coupling]:
        """Of the blocks, by their places."""
        return [module for module in self.couplings if isinstance(module, Coupling)]

    def joint_of(self, piece: Piece) -> JointMessages:
        """The messages of a piece without a block."""
        found: Any = self.joint[self.plan.joint_sites.index(piece.sites[0])]
        messages: JointMessages = found
        return messages

    def coupling_of(self, piece: Piece) -> Coupling | None:
        """What couples a piece with others, or its numbers with each other, if there is anything."""
        if piece.place is None or not len(self.couplings):
            return None
        found: Any = self.couplings[piece.place]
        return found if found.active and (found.mixes or found.links) else None

    def _shape_of(self, piece: Piece) -> LocalShape | None:
        """The flow of a piece's noise, if it has one that is not left out."""
        place = str(piece.place)
        found = self.shapes[place] if self.shaped and place in self.shapes else None
        return found if isinstance(found, LocalShape) else None

    def params_of(self, piece: Piece) -> Iterator[nn.Parameter]:
        """What is trained of a piece beside its block of messages."""
        module = self.joint_of(piece) if piece.place is None else self._shape_of(piece)
        modules = [each for each in (module, self.coupling_of(piece)) if each is not None]
        return (p for each in modules for p in each.parameters() if p.requires_grad)

    def offsets(
        self, coupling: Coupling | None, values: Mapping[str, Tensor], centres: Sequence[Tensor]
    ) -> dict[int, Tensor]:
        """How far earlier blocks that a piece is linked with are from their centres."""
        blocks = self.plan.blocks
        return {
            j: joined([values[site] for site in blocks[j]]) - centres[j]
            for j in (() if coupling is None else coupling.links)
        }

    def moved_by(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """How far roots, by site, have :meth:`moved`, ``(P, R)``; None where no message follows them."""
        if not self.follows_roots:
            return None
        return self.moved(joined([values[site] for site in self.plan.structure.roots]))

    # -- frames --------------------------------------------------------------------------------

    def frame(self) -> tuple[dict[str, Tensor], ...]:
        """The fixed numbers of the messages, of those of each joint site, and of couplings."""
        own, *others = (module.fixed_numbers() for module in self._framed())
        return {**own, SHAPED: torch.tensor(self.shaped)}, *others

    def set_frame(self, frame: Sequence[Mapping[str, Tensor]]) -> None:
        """Puts fixed numbers in place, none with an empty one, and leaves the parameters as they are."""
        for i, module in enumerate(self._framed()):
            module.fix(frame[i] if i < len(frame) else {})
        self._leave_out(frame)

    @torch.no_grad()
    def enter_frame(self, frame: Sequence[Mapping[str, Tensor]] | None = None) -> None:
        """Makes the parameters corrections to fixed numbers, by default to what they are themselves."""
        self.leave_frame()
        for i, module in enumerate(self._framed()):
            module.set_fixed(module.as_fixed() if frame is None or not frame[i] else frame[i])
        self._leave_out(frame or ())

    @torch.no_grad()
    def leave_frame(self) -> None:
        """Makes the parameters what they and the fixed numbers are together."""
        for module in self._framed():
            module.leave()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.shaped = True
        super()._load_from_state_dict(*args, **kwargs)

    def _framed(self) -> list[Fixed]:
        return [self, *self.joint_messages(), *self.all_couplings()]

    def _leave_out(self, frame: Sequence[Mapping[str, Tensor]]) -> None:
        """Leaves out what is the identity for as long as the map is in a frame."""
        for coupling in self.all_couplings():
            coupling.rest_if_idle()
        if frame and not bool(frame[0].get(SHAPED, True)):
            self.leave_shapes_out()

    def leave_shapes_out(self) -> None:
        """Spares the flows of the latents' noise, if they are the identity still."""
        shapes = [shape for shape in self.shapes.values() if isinstance(shape, LocalShape)]
        self.shaped = not all(shape.is_identity() for shape in shapes)

    @torch.no_grad()
    def centre_at(self, z: Tensor) -> None:
        """Puts the messages at a point of the latents, ``(D,)``, so that with its roots the others follow."""
        slopes = torch.zeros_like(z).unsqueeze(0)
        for prior in self.plan.priors_at(z.unsqueeze(0)):
            offset = taken(z, prior.places) - prior.loc[0].to(z)
            scale = prior.scale[0].to(z)
            if prior.joint:
                pull = torch.cholesky_solve(offset.unsqueeze(-1), scale).squeeze(-1)
            else:
                pull = offset / scale.square()
            prior.put(pull.unsqueeze(0), slopes)
        places = self.plan.block_places()
        if len(places):
            self.centre.copy_(taken(z, places))
            self.slope.copy_(taken(slopes[0], places))
        for module, where in zip(self.joint_messages(), self.plan.joint_places(), strict=True):
            module.centre.copy_(z[where.clamp(min=0)])
            module.slope.copy_(slopes[0, where.clamp(min=0)])

    # -- the map -------------------------------------------------------------------------------

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

    def run_by_site(self, x: Tensor, forward: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Images of noise ``(P, D)``, or noise of images; by site the log-determinants of its numbers, or of
        its joint latents."""
        parts = dict[str, Tensor]()
        return self._run(x, forward, parts)[0], parts

    def _run(
        self, rows: Tensor, forward: bool, parts: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images of noise, or noise of images, and log-determinants of that direction.

        :param parts: is given the log-determinants by site.
        """
        plan = self.plan
        given = plan.split(rows)
        found = {site: given[site] for site in plan.structure.roots}
        values = found if forward else given
        moved = self.moved_by(values)
        messages = self.messages(moved)
        centres = [centre for centre, *_ in messages]
        total = rows.new_zeros(len(rows))
        # With all values given one run of the priors' graph is enough.
        known = None if forward else plan.priors_given(given)
        for piece in plan.pieces:
            if known is None:
                priors = piece.priors_given(values, rows)
            else:
                together = [known[site] for site in piece.sites if site in known]
                priors = [(loc.to(rows), scale.to(rows)) for loc, scale in together]
            message = moved if piece.place is None else messages[piece.place]
            coupling, block = self.coupling_of(piece), plan.gather(given, piece)
            mixing = coupling if coupling is not None and coupling.mixes else None
            mix_det = None
            if mixing is not None and forward:
                block, mix_det = mixing.mixed(block)
            offsets = self.offsets(coupling, values, centres)
            block, log_det = self.move(piece, block, priors, message, forward, offsets)
            if mixing is not None and not forward:
                block, mix_det = mixing.unmixed(block)
            found |= plan.scatter(block, piece)
            if mix_det is not None:
                log_det = log_det + plan.counted(mix_det.expand_as(log_det), piece)
            if parts is not None:
                parts |= plan.spread(log_det, piece)
            total = total + self.weighted(log_det, piece).sum(-1)
        return plan.join(found), total

    def move(
        self,
        piece: Piece,
        block: Tensor,
        priors: Sequence[Prior],
        message: Any,
        forward: bool,
        offsets: Mapping[int, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """A piece's latents of its mixed noise, or back, and log-determinants of its numbers.

        :param message: the piece's block of :meth:`messages`; of a joint one how far the roots have moved.
        :param offsets: of the blocks that it is linked with.
        """
        coupling = self.coupling_of(piece)
        if coupling is not None and offsets:
            centre, slope, log_weight = message
            message = centre, slope + coupling.pull(offsets), log_weight
        if piece.place is None:
            joint = self.joint_of(piece)
            ((loc, scale),) = priors
            loc, scale = joint.by_row(loc, scale)
            move = joint.forward_and_log_det if forward else joint.inverse_and_log_det
            block, log_det = move(block, loc, scale, message)
        elif priors:
            block, log_det = self._by_priors(piece, block, priors, message, forward)
            log_det = log_det.expand_as(block)
        else:
            block, log_det = _by_messages(block, message, forward)
        return block, self.plan.counted(log_det, piece)

    def _by_priors(
        self,
        piece: Piece,
        block: Tensor,
        priors: Sequence[Prior],
        message: tuple[Tensor, Tensor, Tensor],
        forward: bool,
    ) -> tuple[Tensor, Tensor]:
        """Latents of the noise of a block's numbers, or back, and log-determinants for each."""
        loc, scale = (joined(part) for part in zip(*priors, strict=True))
        centre, slope, log_weight = message
        weight, variance = log_weight.exp(), scale.square()
        share = 1.0 / (1.0 + weight * variance)
        pull = slope - weight * (loc - centre)
        # Of the terms none is larger than the mean, wherever prior and message are.
        mean, width = centre + share * (loc - centre) + variance * share * slope, scale * share.sqrt()
        log_width = width.log()
        shape = self._shape_of(piece)
        if shape is None:
            return (mean + width * block, log_width) if forward else ((block - mean) / width, -log_width)
        parts = (mean, log_width, share, scale * share * pull)
        context = torch.stack([part.expand_as(block) for part in parts], -1)
        if forward:
            shaped, log_det = shape.forward_and_log_det(block, context)
            return mean + width * shaped, log_width + log_det
        noise, log_det = shape.inverse_and_log_det((block - mean) / width, context)
        return noise, log_det - log_width


def _by_messages(
    block: Tensor, message: tuple[Tensor, Tensor, Tensor], forward: bool
) -> tuple[Tensor, Tensor]:
    """The same for numbers whose priors are not known: their messages alone are Gaussians."""
    centre, slope, log_weight = message
    mean, log_scale = centre + slope * (-log_weight).exp(), -0.5 * log_weight
    scale = log_scale.exp()
    if forward:
        return mean + scale * block, log_scale.expand_as(block)
    return (block - mean) / scale, (-log_scale).expand_as(block)
