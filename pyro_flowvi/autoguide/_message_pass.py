"""The pass of training through a message map, piece by piece: one forward run, and two ways back over it."""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..transforms._fused import Pass, form_of
from ..transforms.base import vector_jacobian
from ._message_map import MessageMap
from ._message_plan import Piece

__all__: list[str] = []

Key = TypeVar("Key", bound=Hashable)


class _Step:
    """A piece's latents as a function of leaves: its noise, the latents before it, and messages."""

    def __init__(
        self,
        layer: MessageMap,
        piece: Piece,
        noise: Tensor,
        values: dict[str, Tensor],
        own: tuple[Tensor, ...],
        centres: list[Tensor],
    ) -> None:
        plan, coupling = layer.plan, layer.coupling_of(piece)
        self.piece = piece
        linked = () if coupling is None else coupling.links
        sites = [*piece.needed, *(site for j in linked for site in plan.blocks[j])]
        self.parents = [values[site] for site in dict.fromkeys(sites)]
        self.message = [*own, *(centres[j] for j in linked)]
        given = own if piece.place is not None else next(iter(own), None)
        self.priors = piece.priors_given(values, noise)
        self.noise = _leaf(noise)
        self.mixing = coupling if coupling is not None and coupling.mixes else None
        self.mixed = self.inner = self.noise
        mix_det = None
        if self.mixing is not None:
            self.mixed, mix_det = self.mixing.mixed(self.noise)
            self.inner = _leaf(self.mixed)
        offsets = layer.offsets(coupling, values, centres)
        self.image, self.log_det = layer.move(piece, self.inner, self.priors, given, True, offsets)
        self.weight = layer.weighted(torch.ones_like(self.log_det), piece)
        self.total = (self.weight * self.log_det.detach()).sum(-1)
        if mix_det is not None:
            mixed = plan.counted(mix_det.detach().expand_as(self.log_det), piece)
            self.total = self.total + (self.weight * mixed).sum(-1)
        self.params = list(layer.params_of(piece))

    def local_score(self, layer: MessageMap, score: Tensor) -> Tensor:
        """∇ log q of the latents given those before them, of the noise's score."""
        if self.mixing is not None:
            with torch.no_grad():
                score = self.mixing.push(score)
        (slope,) = vector_jacobian([self.log_det], [self.weight], [self.inner], keep=True)
        own = score if slope is None else score - slope
        if self.piece.place is not None:
            return own * (-self.log_det.detach()).exp()
        joint = layer.joint_of(self.piece)
        ((loc, scale),) = self.priors
        moved = self.message[0].detach() if self.message else None
        with torch.no_grad():
            return joint.push(own, *joint.by_row(loc.detach(), scale.detach()), moved)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def _back(outputs: Sequence[Tensor], weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Vector-Jacobian products, with zeros where there is no way."""
    found = vector_jacobian(outputs, weights, inputs, keep=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _add(total: dict[Key, Tensor], more: Iterable[tuple[Key, Tensor]]) -> None:
    for key, value in more:
        total[key] = total[key] + value if key in total else value


@form_of(MessageMap)
def _pass_messages(layer: Any, x: Tensor, score: Tensor) -> Pass:
    """The pass of training, written out: no run of the inverse, for the noise of every latent is known."""
    with torch.enable_grad():
        return _Run(layer, x, score).passed()


class _Run:
    """A forward run with every piece's graph apart, from leaves; of each leaf a total is kept by its id.

    :param x: noise, ``(P, D)``.
    :param score: ∇ log q of it.
    """

    def __init__(self, layer: MessageMap, x: Tensor, score: Tensor) -> None:
        self.layer, self.plan = layer, layer.plan
        noise, self.scores = self.plan.split(x), self.plan.split(score)
        self.roots = self.plan.structure.roots
        self.values = {site: _leaf(noise[site]) for site in self.roots}
        moved = layer.moved_by(self.values)
        messages = layer.messages(moved)
        still = () if moved is None else (_leaf(moved),)
        leaves = [(_leaf(centre), _leaf(slope), _leaf(weight)) for centre, slope, weight in messages]
        centres = [centre for centre, *_ in leaves]
        self.steps: list[_Step] = []
        self.log_det = x.new_zeros(len(x))
        for piece in self.plan.pieces:
            own = still if piece.place is None else leaves[piece.place]
            step = _Step(layer, piece, self.plan.gather(noise, piece), self.values, own, centres)
            self.steps.append(step)
            self.log_det = self.log_det + step.total
            spread = self.plan.scatter(step.image, piece)
            self.values |= {site: _leaf(value) for site, value in spread.items()}
        sources = [
            *(value for message in messages for value in message),
            *(() if moved is None else (moved,)),
        ]
        source_leaves = [*(leaf for message in leaves for leaf in message), *still]
        self.sources = list(zip(sources, source_leaves, strict=True))
        """What the messages are, as functions of the roots, and the leaves that the pieces see of it."""

    def passed(self) -> Pass:
        """The image and its score, and the way back from it."""
        image = self.plan.join({site: value.detach() for site, value in self.values.items()})
        return Pass(image, self.log_det, self.plan.join(self.pushed_score()).detach(), self.pull)

    def collect(
        self,
        step: _Step,
        outputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        more: Sequence[Tensor],
        total: dict[int, Tensor],
        sign: float,
    ) -> list[Tensor]:
        """Adds what a piece gives back to its parents and its message; what it gives to ``more``."""
        leaves = [*step.parents, *step.message]
        found = _back(outputs, weights, [*leaves, *more])
        _add(total, ((id(leaf), sign * grad) for leaf, grad in zip(leaves, found, strict=False)))
        return found[len(leaves) :]

    def to_roots(self, total: dict[int, Tensor], params: Sequence[Tensor]) -> list[Tensor]:
        """What the messages' leaves hold goes back to the roots, and to parameters."""
        known = [
            (source, total[id(leaf)])
            for source, leaf in self.sources
            if id(leaf) in total and source.requires_grad
        ]
        inputs = [*(self.values[site] for site in self.roots), *params]
        if not known or not inputs:
            return [torch.zeros_like(value) for value in inputs]
        return _back([source for source, _ in known], [grad for _, grad in known], inputs)

    def pushed_score(self) -> dict[str, Tensor]:
        """∇ log q of the latents, by site."""
        total: dict[int, Tensor] = {}
        local = {site: self.scores[site] for site in self.roots}
        for step in self.steps:
            own = step.local_score(self.layer, self.plan.gather(self.scores, step.piece))
            local |= self.plan.scatter(own, step.piece)
            self.collect(step, [step.image, step.log_det], [own, step.weight], [], total, -1.0)
        through = self.to_roots(total, [])
        final = {}
        for site, value in self.values.items():
            final[site] = local[site] + total[id(value)] if id(value) in total else local[site]
        _add(final, zip(self.roots, through, strict=True))
        return final

    def pull(self, v: Tensor) -> tuple[Tensor, dict[Tensor, Tensor]]:
        """Gradients of noise and parameters, of one ``v`` of the image."""
        plan = self.plan
        total = {id(self.values[site]): part for site, part in plan.split(v).items()}
        back, grads = dict[str, Tensor](), dict[Tensor, Tensor]()
        for step in reversed(self.steps):
            image = plan.gather({site: total[id(self.values[site])] for site in step.piece.sites}, step.piece)
            noise, *found = self.collect(step, [step.image], [image], [step.inner, *step.params], total, 1.0)
            if step.mixing is not None:
                noise, *mixing = _back([step.mixed], [noise], [step.noise, *step.params])
                found = [one + other for one, other in zip(found, mixing, strict=True)]
            back |= plan.scatter(noise, step.piece)
            _add(grads, zip(step.params, found, strict=True))
        params = [p for p in self.layer.message_params() if p.requires_grad]
        through = self.to_roots(total, params)
        for site, grad in zip(self.roots, through, strict=False):
            back[site] = total[id(self.values[site])] + grad
        _add(grads, zip(params, through[len(self.roots) :], strict=True))
        return plan.join(back), {param: grad.detach() for param, grad in grads.items()}
