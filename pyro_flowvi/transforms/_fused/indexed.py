"""The pass of continuously-indexed layers: three couplings around the pass of the layer that they index."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...nn import MLP
from ..indexed import IndexedCompose, IndexedLayer, _AffineGiven
from ._pass import Gradients, Pass, accumulate, trained
from .affine import log_scale_gradient
from .coupling import Network, bounded_log_scale

__all__ = ["pass_indexed"]

Through = Callable[[Any, Tensor, Tensor], Pass]
"""The pass of a transform."""


class _Coupled(NamedTuple):
    """One vector moved given another, which stays."""

    image: Tensor
    log_det: Tensor
    score: Tensor
    """At the image."""
    score_given: Tensor
    """At what stays."""
    pull: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Gradients]]
    """Of vectors at the image and at what stays: the same before, and by parameter."""


def _couple(
    layer: _AffineGiven, x: Tensor, given: Tensor, score: Tensor, score_given: Tensor, *, back: bool = False
) -> _Coupled:
    """The pass of y = e^s x + t, with s and t of what is given, or of its inverse."""
    mlp: Any = layer.network
    network, limit, offset = Network(mlp, given), layer.transformer.limit, layer.offset
    size, sign = x.shape[-1], -1.0 if back else 1.0
    raw_scale, raw_shift = network.output.split(size, -1)
    log_scale, squashed = bounded_log_scale(offset, raw_scale, limit)
    log_scale = log_scale * sign
    slope, shift = log_scale.exp(), offset[1] + raw_shift
    moved = (x - shift) * slope if back else x * slope  # without what is added last
    image = moved if back else moved + shift
    new_score = score / slope

    def to_raw(by_scale: Tensor, v: Tensor) -> Tensor:
        """What ``by_scale`` at the log-slope, and ``v`` at the image, are at the network's output."""
        by_shift = -v * slope if back else v
        return torch.cat([4.0 * sign * torch.ops.aten.sigmoid_backward(by_scale, squashed), by_shift], -1)

    first = network.layers[0].weight
    at_raw = to_raw(torch.addcmul(torch.ones_like(x), new_score, moved), new_score)
    score_given = torch.addmm(score_given, network.pull(at_raw)[-1], first, alpha=-1)

    def pull(v: Tensor, v_given: Tensor) -> tuple[Tensor, Tensor, Gradients]:
        by_scale = v * moved
        at_raw = to_raw(by_scale, v)
        pulled = network.pull(at_raw)
        rows = log_scale_gradient(by_scale.sum(0) * sign, offset[0]), at_raw[:, size:].sum(0)
        grads = {offset: torch.stack(rows), **network.gradients(pulled)}
        return v * slope, torch.addmm(v_given, pulled[-1], first), trained(grads)

    return _Coupled(image, log_scale.sum(-1), new_score, score_given, pull)


class _Layer:
    """An indexed layer at points: variable and noise, their scores, and the way back."""

    def __init__(
        self, layer: IndexedLayer, through: Through, w: Tensor, noise: Tensor, score: Tensor, of_noise: Tensor
    ) -> None:
        self._before = layer.order == "before"
        # The noise becomes the index given the variable.
        self._index = _couple(layer.index, noise, w, of_noise, score)
        u, of_index, score = self._index.image, self._index.score, self._index.score_given
        if self._before:
            self._mover = _couple(layer.mover, w, u, score, of_index, back=True)
            self._inner = through(layer.transform, self._mover.image, self._mover.score)
            self.image, score = self._inner.image, self._inner.score
        else:
            self._inner = through(layer.transform, w, score)
            self._mover = _couple(layer.mover, self._inner.image, u, self._inner.score, of_index)
            self.image, score = self._mover.image, self._mover.score
        # And the index the noise that r sees in it, given the image.
        self._reverse = _couple(layer.reverse, u, self.image, self._mover.score_given, score, back=True)
        self.noise, self.score_noise = self._reverse.image, self._reverse.score
        self.score = self._reverse.score_given
        couplings = self._index.log_det + self._mover.log_det + self._reverse.log_det
        self.log_det = couplings + self._inner.log_det

    def pull(self, v: Tensor, v_noise: Tensor, grads: dict[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Of vectors at image and noise: the same before; adds to the gradients."""
        v_index, v, found = self._reverse.pull(v_noise, v)
        accumulate(grads, found)
        if self._before:
            v, found = self._inner.pull(v)
            accumulate(grads, found)
            v, v_index, found = self._mover.pull(v, v_index)
        else:
            v, v_index, found = self._mover.pull(v, v_index)
            accumulate(grads, found)
            v, found = self._inner.pull(v)
        accumulate(grads, found)
        v_noise, v, found = self._index.pull(v_index, v)
        accumulate(grads, found)
        return v, v_noise


def _is_served(part: Any) -> bool:
    if not isinstance(part, IndexedLayer):
        return not hasattr(part, "condition")
    networks = (part.index.network, part.mover.network, part.reverse.network)
    plain = all(type(network) is MLP and not network.columns for network in networks)
    return type(part) is IndexedLayer and not part.context_dim and plain


def pass_indexed(flow: IndexedCompose, x: Tensor, score: Tensor, through: Through) -> Pass | None:
    """The pass of indexed layers and the transforms among them; None where a context has a say.

    :param flow: the composition.
    :param x: variable and noise, shape ``(P, D + K)``.
    :param score: at ``x``.
    :param through: gives the pass of a transform of the variable.
    """
    if type(flow) is not IndexedCompose or not all(map(_is_served, flow)):
        return None
    w, noises = flow._split(x)
    score, of_noises = flow._split(score)
    passes: list[Pass | _Layer] = []
    images: list[Tensor] = []
    image_scores, log_det = [], x.new_zeros(x.shape[:-1])
    for part in flow:
        if isinstance(part, IndexedLayer):
            place = len(images)
            layer = _Layer(part, through, w, noises[place], score, of_noises[place])
            images.append(layer.noise)
            image_scores.append(layer.score_noise)
            passes.append(layer)
        else:
            passes.append(through(part, w, score))
        w, score = passes[-1].image, passes[-1].score
        log_det = log_det + passes[-1].log_det

    def pull(v: Tensor) -> tuple[Tensor, Gradients]:
        grads: dict[Tensor, Tensor] = {}
        v, of_noise = flow._split(v)
        place = len(of_noise)
        for one in reversed(passes):
            if isinstance(one, _Layer):
                place -= 1
                v, of_noise[place] = one.pull(v, of_noise[place], grads)
            else:
                v, found = one.pull(v)
                accumulate(grads, found)
        return flow._join(v, of_noise), grads

    return Pass(flow._join(w, images), log_det, flow._join(score, image_scores), pull)
