r"""The pass of couplings by rational-quadratic splines, with a fully connected network.

What a coordinate depends on in its bin are six numbers: left ends, sizes w and h and end derivatives.  In the
notation of :mod:`~pyro_flowvi.transforms.splines`, with :math:`A = d_0 (1-\xi) + s \xi,
B = s (1-\xi) + d_1 \xi, q = (1-\xi) B + \xi A, N = (1-\xi) A + \xi B`, the height in the bin is
:math:`\eta = \xi A / q` and the slope :math:`s^2 N / q^2`.  With :math:`c = \xi (1-\xi)`,

.. math:: \frac{\partial \eta}{\partial d_0} = \frac{c (1-\eta)}{q}, \quad
    \frac{\partial \eta}{\partial d_1} = -\frac{c \eta}{q}, \quad
    \frac{\partial \eta}{\partial s} = \frac{c (N - 2 (1-\xi) A)}{q^2} .
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn import MLP
from ..coupling import Coupling
from ..splines import MIN_BIN, MIN_DERIVATIVE
from ..univariate import RationalQuadratic
from ._pass import Gradients, Pass, trained
from .coupling import Network

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
        span = 2.0 * bound * (1.0 - MIN_BIN * num)
        self._shares = raw[:, : 2 * num].unflatten(1, (2, num)).softmax(2)
        self._bent = raw[:, 2 * num :] + _SHIFT
        bins = torch.add(raw.new_full((), 2.0 * bound * MIN_BIN), self._shares, alpha=span)
        slopes = F.pad(F.softplus(self._bent) + MIN_DERIVATIVE, (0, 0, 1, 1), value=1.0).unsqueeze(1)
        table = torch.cat((bins, slopes[:, :, :-1], slopes[:, :, 1:]), 1)
        clamped = x.clamp(-bound, bound)
        place = clamped + bound
        reached = (place.unsqueeze(1) >= bins[:, 0, :-1].cumsum(1)).to(x.dtype).unsqueeze(1)
        # Of each bin, whether it lies below that of x, and whether it is that.
        self._below = F.pad(reached, (0, 0, 0, 1))
        self._here = F.pad(reached, (0, 0, 1, 0), value=1.0) - self._below
        left, low = (bins * self._below).sum(2).unbind(1)
        w, h, d0, d1 = (table * self._here).sum(2).unbind(1)
        inside = x == clamped

        s, xi = h / w, (place - left) / w
        rest = 1.0 - xi
        cross = xi * rest
        first, last = torch.lerp(d0, s, xi), torch.lerp(s, d1, xi)  # A and B, without cancellation
        q, numerator = torch.lerp(last, first, xi), torch.lerp(first, last, xi)
        steep = s / q
        slope = steep.square() * numerator
        height = xi * first / q
        self.image = torch.where(inside, torch.addcmul(low, h, height) - bound, x)
        self.slope = torch.where(inside, slope, 1.0)
        """dy/dx."""
        self.log_slope = self.slope.log()

        bow = cross / q
        by_s = steep * bow * torch.sub(numerator, rest * first, alpha=2.0)  # s times it
        risen = h * bow
        falls = risen * height
        by_w = torch.addcmul(s * by_s, slope, xi)
        by_image = (slope, torch.ones_like(slope), by_w, height + by_s, risen - falls, falls)
        # The log-slope is 2 log s + log N - 2 log q; half of its derivatives.
        ends = d0 + d1
        turn = torch.sub(ends, s, alpha=2.0) * (rest - xi) / q
        bend = ((last - first) / numerator - turn) / w
        by_log_s = torch.addcmul(bow * ends, cross, s / numerator)  # s times it
        half = 0.5 / numerator
        by_log_slope = (
            bend,
            torch.zeros_like(bend),
            torch.addcmul(by_log_s / w, xi, bend),
            by_log_s / h,
            torch.addcmul(-bow, rest * rest, half),
            torch.addcmul(bow, xi * xi, half, value=-1.0),
        )
        # Signs, and the size of the box by which the shares of the bins count.
        signs = torch.tensor([-span, span, -span, span, 1.0, -1.0], dtype=x.dtype, device=x.device)
        signs = torch.where(inside.unsqueeze(1), signs.unsqueeze(-1), 0.0)
        self._by_image, self._by_log_slope = (
            torch.stack(parts, 1) * signs for parts in (by_image, by_log_slope)
        )
        self.bend = torch.where(inside, bend, 0.0)
        """Half the derivative of the log-slope by x."""

    def _chained(self, grad: Tensor) -> Tensor:
        """From a bin's ends, sizes and derivatives to the raw parameters."""
        left, here = grad.unsqueeze(2).split((2, 4), 1)
        here = here * self._here
        bins = torch.addcmul(here[:, :2], left, self._below)
        sizes = aten._softmax_backward_data(bins, self._shares, 2, bins.dtype)
        slopes = here[:, 2, 1:] + here[:, 3, :-1]
        slopes = aten.softplus_backward(slopes, self._bent, 1.0, 20.0)
        return torch.cat((sizes.flatten(1, 2), slopes), 1)

    def to_raw(self, v: Tensor) -> Tensor:
        """What ``v`` at the image is at the raw parameters, ``(P, 3 K - 1, N)``."""
        return self._chained(self._by_image * v.unsqueeze(1))

    def log_slope_to_raw(self, v: Tensor | None = None) -> Tensor:
        """What ones at the log-slope are there, and ``v`` at the image."""
        grad = 2.0 * self._by_log_slope
        return self._chained(grad if v is None else torch.addcmul(grad, self._by_image, v.unsqueeze(1)))

    def offset_gradient(self, v: Tensor, at_raw: Tensor) -> Tensor:
        """From what :meth:`to_raw` gave."""
        return at_raw.sum(0)


def pass_spline(layer: Any, x: Tensor, score: Tensor) -> Pass | None:
    """The pass of a coupling by splines; None of anything else."""
    if not isinstance(layer, Coupling) or type(layer).forward_with_score is not Coupling.forward_with_score:
        return None
    if type(layer).forward_given is not Coupling.forward_given:
        return None
    mlp, transformer = layer.conditioner, layer.transformer
    if type(transformer) is not RationalQuadratic or type(mlp) not in (MLP, type(None)):
        return None
    if mlp is not None and mlp.columns:
        return None
    moved, offset = x[:, layer._moved], layer.offset
    kept = kept_score = network = None
    raw = offset.expand(len(x), *offset.shape)
    if mlp is not None:
        kept, kept_score = x[:, layer._kept], score[:, layer._kept]
        network = Network(mlp, kept)
        raw = offset + network.output.unflatten(-1, offset.shape)
    spline = SplinePass(moved, raw, transformer)
    moved_score = torch.sub(score[:, layer._moved], spline.bend, alpha=2.0) / spline.slope
    if network is not None and kept_score is not None:
        at_first = network.pull(spline.log_slope_to_raw(moved_score).flatten(1))[-1]
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
