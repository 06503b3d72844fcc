"""The pass of couplings that are affine in what they move, with a fully connected network."""

import math
from typing import Any

import torch
from torch import Tensor

from ...nn import MLP
from ..coupling import Coupling
from ..univariate import Additive, Affine, Multiplicative
from ._pass import Gradients, Pass, trained
from .affine import log_scale_gradient

__all__ = ["Network", "bounded_log_scale", "pass_coupling"]


class Network:
    """A network of tanh or relu at a batch of points, with products of vectors and its Jacobian.

    :param mlp: the network.
    :param x: shape ``(P, in)``.
    """

    def __init__(self, mlp: MLP, x: Tensor) -> None:
        self.mlp, self.inputs = mlp, [x]
        self.layers: list[Any] = [*mlp.hidden, mlp.last]
        hidden: Any = mlp.hidden
        for layer in hidden:
            if mlp.activation == "tanh":
                # tanh(u) = 2 sigmoid(2 u) - 1: of the same absolute accuracy, and several times as fast.
                doubled = torch.addmm(layer.bias, self.inputs[-1], layer.weight.t(), beta=2, alpha=2)
                self.inputs.append(torch.add(x.new_full((), -1.0), torch.sigmoid(doubled), alpha=2.0))
            else:
                self.inputs.append(torch.relu(torch.addmm(layer.bias, self.inputs[-1], layer.weight.t())))
        last, h = mlp.last, self.inputs[-1]
        self.output = h @ last.weight.t() if last.bias is None else torch.addmm(last.bias, h, last.weight.t())

    def pull(self, v: Tensor) -> list[Tensor]:
        """Of ``v`` at the output: the same at what each layer gives, the first last; and at the input."""
        found = [v]
        for i in range(len(self.layers) - 1, 0, -1):
            back, h = found[-1] @ self.layers[i].weight, self.inputs[i]
            if self.mlp.activation == "tanh":
                found.append(torch.ops.aten.tanh_backward(back, h))
            else:
                found.append(torch.ops.aten.threshold_backward(back, h, 0))
        return found

    def gradients(self, pulled: list[Tensor]) -> dict[Tensor, Tensor]:
        """By parameter, from what :meth:`pull` gave."""
        grads: dict[Tensor, Tensor] = {}
        for layer, x, v in zip(reversed(self.layers), reversed(self.inputs), pulled, strict=True):
            grads[layer.weight] = v.t() @ x
            if layer.bias is not None:
                grads[layer.bias] = v.sum(0)
        return grads


def free_log_scale(offset: Tensor) -> Tensor:
    """The log-scale that a transformer has of its own, as far as its exponential is finite."""
    largest = 0.3 * math.log(torch.finfo(offset.dtype).max)
    return offset[0].clamp(-largest, largest)


def bounded_log_scale(offset: Tensor, raw: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """s = b + k tanh(h / k) of a network's output h, and the sigmoid that its gradient needs."""
    squashed = torch.sigmoid(raw * (2.0 / limit))
    return torch.add(free_log_scale(offset) - limit, squashed, alpha=2.0 * limit), squashed


def pass_coupling(layer: Any, x: Tensor, score: Tensor) -> Pass | None:
    """The pass of an affine, additive or multiplicative coupling; None of anything else.

    With y = exp(s) x + t and s = b + k tanh(h / k), the score at the image is exp(-s) times that at the input
    for what is moved; what passes loses the pull-back, by the network, of the score times dy and of ds.
    """
    if not isinstance(layer, Coupling) or type(layer).forward_with_score is not Coupling.forward_with_score:
        return None
    if type(layer).forward_given is not Coupling.forward_given:
        return None
    transformer: Any = layer.transformer
    kind, mlp = type(transformer), layer.conditioner
    if kind not in (Additive, Affine, Multiplicative) or not (mlp is None or type(mlp) is MLP):
        return None
    if mlp is not None and mlp.columns:
        return None
    limit = transformer.limit
    scales, shifts = kind is not Additive, kind is not Multiplicative
    offset = layer.offset
    moved, moved_score = x[:, layer._moved], score[:, layer._moved]
    kept = kept_score = network = None
    size = moved.shape[-1]
    if mlp is not None:
        kept, kept_score = x[:, layer._kept], score[:, layer._kept]
        network = Network(mlp, kept)
    raw = list(network.output.split(size, -1)) if network is not None else []
    log_scale = scale = squashed = shift = None
    if scales:
        if raw:
            log_scale, squashed = bounded_log_scale(offset, raw[0], limit)
        else:
            log_scale = free_log_scale(offset).expand_as(moved)
        scale = log_scale.exp()
    if shifts:
        shift = offset[-1] + raw[-1] if raw else offset[-1]
    if scale is None:
        assert shift is not None
        image, new_score = moved + shift, moved_score
    else:
        image = moved * scale if shift is None else torch.addcmul(shift, moved, scale)
        new_score = moved_score / scale

    def to_raw(v: Tensor, bend: Tensor | None) -> Tensor:
        """What ``v`` at the image, and ``bend`` at the log-scale, are at the network's output."""
        parts = []
        if bend is not None and squashed is not None:
            parts.append(4.0 * torch.ops.aten.sigmoid_backward(bend, squashed))
        if shifts:
            parts.append(v)
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    if network is not None and kept_score is not None:
        # By scale: d(log_scale) has weight 1 + score · dy/ds = 1 + (score / scale) x scale.
        bend = torch.addcmul(torch.ones_like(moved), moved_score, moved) if scales else None
        at_first = network.pull(to_raw(new_score, bend))[-1]
        kept_score = torch.addmm(kept_score, at_first, network.layers[0].weight, alpha=-1)
    log_det = x.new_zeros(()) if log_scale is None else log_scale.sum(-1)

    def pull(v: Tensor) -> tuple[Tensor, Gradients]:
        v_moved, v_kept = v[:, layer._moved], None if kept is None else v[:, layer._kept]
        bend, back = None, v_moved
        if scale is not None:
            back = v_moved * scale
            bend = back * moved
        grads: dict[Tensor, Tensor] = {}
        if network is not None and v_kept is not None:
            pulled = network.pull(to_raw(v_moved, bend))
            grads |= network.gradients(pulled)
            v_kept = torch.addmm(v_kept, pulled[-1], network.layers[0].weight)
        rows = []
        if bend is not None:
            rows.append(log_scale_gradient(bend.sum(0), offset[0]))
        if shifts:
            rows.append(v_moved.sum(0))
        grads[offset] = torch.stack(rows)
        return layer._merge(v_kept, back), trained(grads)

    return Pass(layer._merge(kept, image), log_det, layer._merge(kept_score, new_score), pull)
