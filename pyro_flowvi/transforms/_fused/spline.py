r"""The pass of couplings by rational-quadratic splines, with a fully connected network.

What a coordinate depends on in its bin are six numbers: left ends, sizes and end derivatives.  With the
notation of :mod:`~pyro_flowvi.transforms.splines`, :math:`c = \xi (1 - \xi)`, q the denominator and N the
numerator of the slope, y has the derivatives

.. math:: \frac{\partial}{\partial s} \frac{y - y_k}{h} = \frac{c (d_1 \xi^2 - d_0 (1-\xi)^2)}{q^2}, \quad
    \frac{\partial}{\partial d_0} = \frac{c (1-\xi) (s (1-\xi) + d_1 \xi)}{q^2}, \quad
    \frac{\partial}{\partial d_1} = -\frac{c \xi (s \xi + d_0 (1-\xi))}{q^2} .
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..coupling import Coupling
from ..splines import MIN_BIN, MIN_DERIVATIVE
from ..univariate import RationalQuadratic
from ._pass import Gradients, Pass, trained
from .coupling import _Network
from ...nn import MLP

__all__ = ["SplinePass", "pass_spline"]

aten = torch.ops.aten
_SHIFT = math.log(math.expm1(1.0 - MIN_DERIVATIVE))


class SplinePass:
    """Splines of a batch of numbers, with their derivatives.

    :param x: shape ``(P, N)``.
    :param raw: raw parameters, shape ``(P, 3 K - 1, N)``.
    :param transformer: the splines' bound and number of bins.
    """

    def __init__(self, x: Tensor, raw: Tensor, transformer: RationalQuadratic) -> None:
        num, bound = transformer.num_bins, transformer.limit
        self._num, self._span = num, 2.0 * bound * (1.0 - MIN_BIN * num)
        self._shares = raw[:, : 2 * num].unflatten(1, (2, num)).softmax(2)
        self._bent = raw[:, 2 * num :] + _SHIFT
        bins = self._span * self._shares + 2.0 * bound * MIN_BIN
        clamped = x.clamp(-bound, bound)
        reached = ((clamped + bound).unsqueeze(1) >= bins[:, 0, :-1].cumsum(1)).to(x.dtype)
        # Of each bin, whether it lies below that of x, and whether it is that.
        self._below = torch.nn.functional.pad(reached, (0, 0, 0, 1))
        self._here = torch.nn.functional.pad(reached, (0, 0, 1, 0), value=1.0) - self._below
        x0, y0 = ((bins * self._below.unsqueeze(1)).sum(2) - bound).unbind(1)
        w, h = (bins * self._here.unsqueeze(1)).sum(2).unbind(1)
        slopes = torch.nn.functional.pad(
            torch.nn.functional.softplus(self._bent) + MIN_DERIVATIVE, (0, 0, 1, 1), value=1.0
        )
        d0, d1 = (slopes[:, :-1] * self._here).sum(1), (slopes[:, 1:] * self._here).sum(1)

        s, xi = h / w, (clamped - x0) / w
        rest = 1.0 - xi
        cross, xi2, rest2 = xi * rest, xi.square(), rest.square()
        both = xi2 + rest2
        q = torch.addcmul(s * both, d0 + d1, cross)
        numerator = torch.addcmul(torch.addcmul(d1 * xi2, d0, rest2), s, cross, value=2.0)
        q2 = q.square()
        slope = s.square() * numerator / q2
        first = torch.addcmul(s * xi, d0, rest)  # of the map, which is xi times it over q
        last = torch.addcmul(s * rest, d1, xi)
        height = xi * first / q
        inside = x == clamped
        self.image = torch.where(inside, torch.addcmul(y0, h, height), x)
        self.slope = torch.where(inside, slope, 1.0)
        """dy/dx."""
        self.log_slope = self.slope.log()

        by_s = s * cross * torch.addcmul(d1 * xi2, d0, rest2, value=-1.0) / q2
        risen = h * cross / q2
        by_d0, by_d1 = risen * rest * last, -risen * xi * first
        by_w = -torch.addcmul(s * by_s, slope, xi)
        one = torch.ones_like(slope)
        # By x0, y0, w, h, d0, d1; the log-slope is 2 log s + log(numerator) - 2 log q.
        by_y = torch.stack((-slope, one, by_w, height + by_s, by_d0, by_d1), 1)
        tilt = 1.0 - 2.0 * xi
        bend = 2.0 * (last - first) / numerator - 2.0 * (d0 + d1 - 2.0 * s) * tilt / q
        bend = bend / w
        log_d = -2.0 * cross / q
        log_s = 2.0 * (1.0 / s + cross / numerator - both / q) / w
        by_log = torch.stack(
            (
                -bend,
                torch.zeros_like(bend),
                -torch.addcmul(s * log_s, xi, bend),
                log_s,
                log_d + rest2 / numerator,
                log_d + xi2 / numerator,
            ),
            1,
        )
        outside = ~inside.unsqueeze(1)
        self._by_image, self._by_log_slope = by_y.masked_fill(outside, 0.0), by_log.masked_fill(outside, 0.0)
        self.bend = bend.masked_fill(~inside, 0.0)
        """The derivative of the log-slope by x."""

    def to_raw(self, v: Tensor, of_log_slope: bool = False) -> Tensor:
        """What ``v`` at the image, and ones at the log-slope, are at the raw parameters; ``(P, 3 K - 1, N)``."""
        v = v.unsqueeze(1)
        grad = torch.addcmul(self._by_log_slope, self._by_image, v) if of_log_slope else self._by_image * v
        left, size = grad[:, :2].unsqueeze(2), grad[:, 2:4].unsqueeze(2)
        bins = torch.addcmul(left * self._below.unsqueeze(1), size, self._here.unsqueeze(1))
        sizes = aten._softmax_backward_data(bins * self._span, self._shares, 2, bins.dtype)
        slopes = torch.addcmul(
            grad[:, 4:5] * self._here[:, 1:], grad[:, 5:6], self._here[:, :-1]
        )
        slopes = aten.softplus_backward(slopes, self._bent, 1.0, 20.0)
        return torch.cat((sizes.flatten(1, 2), slopes), 1)


def pass_spline(layer: Any, x: Tensor, score: Tensor) -> Pass | None:
    """The pass of a coupling by splines; None of anything else."""
    if not isinstance(layer, Coupling) or type(layer).forward_with_score is not Coupling.forward_with_score:
        return None
    if type(layer).forward_given is not Coupling.forward_given:
        return None
    mlp, transformer = layer.conditioner, layer.transformer
    if type(transformer) is not RationalQuadratic or not (mlp is None or type(mlp) is MLP and not mlp.columns):
        return None
    moved, offset = x[:, layer._moved], layer.offset
    kept = kept_score = network = None
    raw = offset.expand(len(x), *offset.shape)
    if mlp is not None:
        kept, kept_score = x[:, layer._kept], score[:, layer._kept]
        network = _Network(mlp, kept)
        raw = offset + network.output.unflatten(-1, offset.shape)
    spline = SplinePass(moved, raw, transformer)
    moved_score = (score[:, layer._moved] - spline.bend) / spline.slope
    if network is not None and kept_score is not None:
        at_first = network.pull(spline.to_raw(moved_score, of_log_slope=True).flatten(1))[-1]
        kept_score = torch.addmm(kept_score, at_first, network.layers[0].weight, alpha=-1)

    def pull(v: Tensor) -> tuple[Tensor, Gradients]:
        v_moved, v_kept = v[:, layer._moved], None if kept is None else v[:, layer._kept]
        at_raw = spline.to_raw(v_moved)
        grads: dict[Tensor, Tensor] = {offset: at_raw.sum(0)}
        if network is not None and v_kept is not None:
            pulled = network.pull(at_raw.flatten(1))
            grads |= network.gradients(pulled)
            v_kept = torch.addmm(v_kept, pulled[-1], network.layers[0].weight)
        return layer._merge(v_kept, v_moved * spline.slope), trained(grads)

    return Pass(
        layer._merge(kept, spline.image),
        spline.log_slope.sum(-1),
        layer._merge(kept_score, moved_score),
        pull,
    )
