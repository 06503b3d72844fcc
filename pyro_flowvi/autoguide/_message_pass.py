"""The pass of training through a message map, piece by piece: one forward run, and two ways back over it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..transforms._fused import Pass, form_of
from ..transforms.base import vector_jacobian
from ._message_map import MessageMap, Piece

__all__: list[str] = []


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
        self.piece, self.coupling = piece, layer.coupling_of(piece)
        linked = () if self.coupling is None else self.coupling.links
        sites = [*piece.needed, *(site for j in linked for site in layer._blocks[j])]
        self.parents = [values[site] for site in dict.fromkeys(sites)]
        self.message = [*own, *(centres[j] for j in linked)]
        given = own if piece.place is not None else next(iter(own), None)
        priors = (
            piece.priors(*(values[site] for site in piece.needed))
            if piece.sites != layer.structure.free
            else []
        )
        self.priors = [(loc.to(noise), scale.to(noise)) for loc, scale in priors]
        self.noise = _leaf(noise)
        self.mixes = self.coupling is not None and self.coupling.mixes
        self.mixed, mix_det = self.coupling.mixed(self.noise) if self.mixes else (self.noise, None)
        self.inner = _leaf(self.mixed) if self.mixes else self.noise
        offsets = layer._offsets(self.coupling, values, centres)
        self.image, self.log_det = layer._move(piece, self.inner, self.priors, given, True, offsets)
        self.total = self.log_det.detach().sum(-1)
        if mix_det is not None:
            self.total = self.total + layer._counted(mix_det.detach().expand_as(self.log_det), piece).sum(-1)
        self.params = list(layer._params_of(piece))

    def local_score(self, layer: MessageMap, score: Tensor) -> Tensor:
        """∇ log q of the latents given those before them, of the noise's score."""
        if self.mixes:
            with torch.no_grad():
                score = self.coupling.push(score)
        (slope,) = vector_jacobian([self.log_det], [torch.ones_like(self.log_det)], [self.inner], keep=True)
        own = score if slope is None else score - slope
        if self.piece.place is not None:
            return own * (-self.log_det.detach()).exp()
        joint = layer._joint_of(self.piece)
        ((loc, scale),) = self.priors
        scale = scale.detach().reshape(-1, *joint.shape, joint.width)
        moved = self.message[0].detach() if self.message else None
        with torch.no_grad():
            return joint.push(own, loc.detach().reshape(-1, *joint.shape), scale, moved)

    def back(
        self, outputs: Sequence[Tensor], weights: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> list[Tensor]:
        """Vector-Jacobian products, with zeros where there is no way."""
        found = vector_jacobian(outputs, weights, inputs, keep=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


@form_of(MessageMap)
def _pass_messages(layer: Any, x: Tensor, score: Tensor) -> Pass:
    """The pass of training, written out: no run of the inverse, for the noise of every latent is known."""
    with torch.enable_grad():
        return _through(layer, x, score)


def _through(layer: MessageMap, x: Tensor, score: Tensor) -> Pass:
    noise, scores = layer._split(x), layer._split(score)
    roots = layer.structure.roots
    values = {site: _leaf(noise[site]) for site in roots}
    moved = layer._moved(values)
    messages = layer._messages(moved)
    moved_leaf = None if moved is None else _leaf(moved)
    leaves = [tuple(map(_leaf, message)) for message in messages]
    steps = []
    for piece in layer.pieces:
        still = () if moved_leaf is None else (moved_leaf,)
        own = still if piece.place is None else leaves[piece.place]
        step = _Step(layer, piece, layer._block(noise, piece), values, own, [centre for centre, *_ in leaves])
        steps.append(step)
        values |= {site: _leaf(value) for site, value in layer._spread(step.image, piece).items()}
    log_det = x.new_zeros(len(x))
    for step in steps:
        log_det = log_det + step.total

    sources = [*(value for message in messages for value in message), *([] if moved is None else [moved])]
    source_leaves = [
        *(leaf for message in leaves for leaf in message),
        *([] if moved_leaf is None else [moved_leaf]),
    ]

    def collect(
        step: _Step,
        outputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        more: Sequence[Tensor],
        total: dict[int, Tensor],
        sign: float,
    ) -> list[Tensor]:
        """Adds what a piece gives back to its parents and its message; what it gives to ``more``."""
        inputs = [*step.parents, *step.message, *more]
        found = step.back(outputs, weights, inputs)
        count = len(step.parents) + len(step.message)
        for leaf, grad in zip(inputs[:count], found[:count], strict=True):
            grad = sign * grad
            total[id(leaf)] = total[id(leaf)] + grad if id(leaf) in total else grad
        return found[count:]

    def to_roots(total: dict[int, Tensor], params: Sequence[Tensor]) -> list[Tensor]:
        """What the messages' leaves hold goes back to the roots, and to parameters."""
        known = [
            (out, total[id(leaf)])
            for out, leaf in zip(sources, source_leaves, strict=True)
            if id(leaf) in total
        ]
        known = [(out, grad) for out, grad in known if out.requires_grad]
        inputs = [*(values[site] for site in roots), *params]
        if not known or not inputs:
            return [torch.zeros_like(value) for value in inputs]
        found = vector_jacobian([out for out, _ in known], [grad for _, grad in known], inputs, keep=True)
        return [torch.zeros_like(v) if g is None else g for v, g in zip(inputs, found, strict=True)]

    pushed: dict[int, Tensor] = {}
    local: dict[str, Tensor] = {}
    for step in steps:
        own = step.local_score(layer, layer._block(scores, step.piece))
        local |= layer._spread(own, step.piece)
        collect(step, [step.image, step.log_det], [own, torch.ones_like(step.log_det)], [], pushed, -1.0)
    through = to_roots(pushed, [])
    final = {}
    for site, value in values.items():
        own_score = scores[site] if site in roots else local[site]
        final[site] = own_score + pushed[id(value)] if id(value) in pushed else own_score
    for site, grad in zip(roots, through, strict=True):
        final[site] = final[site] + grad

    def pull(v: Tensor) -> Any:
        total = {id(values[site]): part for site, part in layer._split(v).items()}
        back, grads = dict[str, Tensor](), dict[Tensor, Tensor]()
        for step in reversed(steps):
            image = layer._block({site: total[id(values[site])] for site in step.piece.sites}, step.piece)
            noise_grad, *found = collect(step, [step.image], [image], [step.inner, *step.params], total, 1.0)
            if step.mixes:
                noise_grad, *mixing = step.back([step.mixed], [noise_grad], [step.noise, *step.params])
                found = [one + other for one, other in zip(found, mixing, strict=True)]
            back |= layer._spread(noise_grad, step.piece)
            for param, grad in zip(step.params, found, strict=True):
                grads[param] = grads[param] + grad if param in grads else grad
        params = [p for p in layer._message_params() if p.requires_grad]
        through = to_roots(total, params)
        for site, grad in zip(roots, through, strict=False):
            back[site] = total[id(values[site])] + grad
        for param, grad in zip(params, through[len(roots) :], strict=True):
            grads[param] = grads[param] + grad if param in grads else grad
        return layer._join(back), {param: grad.detach() for param, grad in grads.items()}

    image = layer._join({site: value.detach() for site, value in values.items()})
    return Pass(image, log_det, layer._join(final).detach(), pull)
