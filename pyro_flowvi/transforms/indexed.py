"""Continuously-indexed layers: bijections of the variable together with the noise of its indices.

A layer of Caterini, Cornish, Sejdinovic and Doucet draws an index u ~ q(u | w) and moves w to G(w; u); what
its density lacks to be tractable is the law of u given the image, for which r(u | G(w; u)) stands in.  With
q and r Gaussian, u = μ_q(w) + σ_q(w) e, and the number e' = (u - μ_r(w')) / σ_r(w') has the standard normal
law if r is right.  So (w, e) -> (w', e') is a bijection with a tractable determinant, and

    log q(w, u) - log |det ∂G/∂w| - log r(u | w') = log N(w, e) - log |det ∂(w', e')/∂(w, e)| - log N(e').

That makes a continuously-indexed flow an ordinary flow over the variable and its indices, whose target on e'
is the standard normal: it is scored at any point, and carries path gradients, as every other flow does.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform

from .._checks import check_positive, check_positive_int, check_widths
from .._shapes import broadcast_shapes
from ..nn import MLP
from .base import forward_and_log_det, forward_with_score, inverse_and_log_det
from .compose import Chain, common_dim, own_dim
from .coupling import LOG_SCALE_LIMIT, pull_back
from .univariate import Affine

__all__ = ["IndexedCompose", "IndexedLayer"]

HIDDEN: Final = (10, 10)
INDEX_SCALE: Final = 0.1
"""How far the indices move the latents at first: those that move nothing may never be used."""
ORDERS: Final = ("after", "before")

Moved = tuple[Tensor, Tensor, Tensor]
"""The variable, its noise, and the log-determinant."""


class _AffineGiven(nn.Module):
    """x -> e^{s(c)} x + t(c), with a network of c that starts at zero: the identity."""

    def __init__(self, in_dim: int, hidden: Sequence[int], dim: int) -> None:
        super().__init__()
        self.transformer = Affine(LOG_SCALE_LIMIT)
        self.offset = nn.Parameter(torch.zeros(2, dim))
        self.network = MLP(in_dim, hidden, 2 * dim, last_bias=False)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.transformer.forward(x, self.network(c).unflatten(-1, self.offset.shape), self.offset)

    def inverse(self, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.transformer.inverse(y, self.network(c).unflatten(-1, self.offset.shape), self.offset)


def _coupled_score(
    image: Tensor, log_slope: Tensor, score: Tensor, given: Tensor, score_given: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores after ``image`` replaced what it is an affine image of, given ``given``, which stays."""
    score = score * (-log_slope.detach()).exp()
    pulled = pull_back([log_slope, image], [torch.ones_like(log_slope), score], given)
    return score, score_given if pulled is None else score_given - pulled


class IndexedLayer(nn.Module):
    r"""A bijection g made continuously indexed, :math:`G(w; u) = e^{s(u)} \odot g(w) + t(u)`.

    Caterini, Cornish, Sejdinovic and Doucet, *Variational Inference with Continuously-Indexed Normalizing
    Flows*, 2020.  The index is drawn from q(u | w), and r(u | G(w; u)) stands in for its law
    given the image; both are normal with independent coordinates, of which networks give means and log
    standard deviations.  Every log-scale is b + 2 tanh(h / 2), with b free.

    Starts as g alone (s = t = 0), with q = r standard normal.  That is a saddle: an index that moves nothing
    is independent of all else, and nothing but noise draws it in.  A start at some ``index_scale`` lets
    it be used from the first step.

    Used in an :class:`IndexedCompose` or :class:`pyro_flowvi.distributions.IndexedFlow`.

    :param transform: g, a transform of vectors, or a conditional one.
    :param index_dim: the length k of u.
    :param hidden: widths of the hidden layers of all three networks.
    :param order: "after" as above, or "before", :math:`G(w; u) = g(e^{-s(u)} \odot (w - t(u)))`, which is the
        order of the authors' code.
    :param context_dim: the length of the context vectors that q and r see beside w.
    :param dim: the length of the vectors, needed only if ``transform`` does not tell it.
    :param index_scale: standard deviation of the weights that s and t start with in their last layer.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> from pyro_flowvi.transforms import Planar
        >>> layer = IndexedLayer(Planar(3), index_dim=2)
        >>> w, noise, log_det = layer.forward(torch.zeros(5, 3), torch.zeros(5, 2))
        >>> w.shape, noise.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(
        self,
        transform: nn.Module | Transform,
        index_dim: int = 1,
        hidden: Sequence[int] = HIDDEN,
        *,
        order: str = "after",
        context_dim: int | None = None,
        dim: int | None = None,
        index_scale: float = INDEX_SCALE,
    ) -> None:
        super().__init__()
        conditional = hasattr(transform, "condition")
        if not (isinstance(transform, Transform) or conditional):
            raise ValueError(f"transform: expected a Transform, got {transform!r}")
        if order not in ORDERS:
            raise ValueError(f"order: expected one of {list(ORDERS)}, got {order!r}")
        if conditional and context_dim is None:
            raise ValueError("context_dim: expected a length with a conditional transform, got None")
        told, wanted = own_dim(transform), getattr(transform, "context_dim", context_dim)
        if conditional and wanted != context_dim:
            raise ValueError(f"context_dim: expected {wanted}, as the transform has it, got {context_dim}")
        if told is not None and dim not in (None, told):
            raise ValueError(f"dim: expected {told}, as the transform has it, got {dim}")
        self.transform: Any = transform
        self.dim = check_positive_int("dim", told if dim is None else dim)
        self.index_dim = check_positive_int("index_dim", index_dim)
        self.order = order
        self.context_dim = 0 if context_dim is None else check_positive_int("context_dim", context_dim)
        self.exact_inverse = getattr(transform, "exact_inverse", True)
        widths, seen = check_widths("hidden", hidden), self.dim + self.context_dim
        self.mover = _AffineGiven(self.index_dim, widths, self.dim)
        if index_scale != 0.0:
            nn.init.normal_(self.mover.network.last.weight, std=check_positive("index_scale", index_scale))
        self.index = _AffineGiven(seen, widths, self.index_dim)
        """q(u | w), of standard normal noise."""
        self.reverse = _AffineGiven(seen, widths, self.index_dim)
        """r(u | w')."""

    def condition(self, context: Tensor) -> "IndexedLayer":
        """The layer given ``context`` of shape ``(*B, context_dim)``; it shares this one's parameters.

        :raises ValueError: if the last dimension of ``context`` is not ``context_dim``.
        """
        return _ConditionedIndexedLayer(self, context)

    @property
    def batch_shape(self) -> Size:
        """The batch shape of the context, once conditioned."""
        return Size()

    def _given(self, w: Tensor) -> Tensor:
        """What q and r see."""
        if self.context_dim:
            raise ValueError("context: expected condition(context) to be called first, got none")
        return w

    def forward(self, w: Tensor, noise: Tensor) -> Moved:
        """The image with its noise.

        :param w: shape ``(*, D)``.
        :param noise: the standardised index under q, shape ``(*, k)``.
        :return: the image w', the standardised index under r, and ``log |det|`` of the whole.
        """
        u, log_q = self.index(noise, self._given(w))
        if self.order == "before":
            moved, log_scale = self.mover.inverse(w, u)
            y, log_det = forward_and_log_det(self.transform, moved)
        else:
            moved, log_det = forward_and_log_det(self.transform, w)
            y, log_scale = self.mover(moved, u)
        noise, log_r = self.reverse.inverse(u, self._given(y))
        return y, noise, log_det + log_scale.sum(-1) + (log_q + log_r).sum(-1)

    def inverse(self, y: Tensor, noise: Tensor) -> Moved:
        """The preimage of :meth:`forward`, and ``log |det|`` of the inverse."""
        u, log_r = self.reverse(noise, self._given(y))
        if self.order == "before":
            moved, log_det = inverse_and_log_det(self.transform, y)
            w, log_scale = self.mover(moved, u)
        else:
            moved, log_scale = self.mover.inverse(y, u)
            w, log_det = inverse_and_log_det(self.transform, moved)
        noise, log_q = self.index.inverse(u, self._given(w))
        return w, noise, log_det + log_scale.sum(-1) + (log_q + log_r).sum(-1)

    def forward_with_score(
        self, w: Tensor, noise: Tensor, score: Tensor, score_noise: Tensor
    ) -> tuple[Moved, Tensor, Tensor]:
        """:meth:`forward`, carrying the scores of both parts: see :class:`FlowTransform`."""
        u, log_q = self.index(noise, self._given(w))
        score_index, score = _coupled_score(u, log_q, score_noise, w, score)
        if self.order == "before":
            moved, log_scale = self.mover.inverse(w, u)
            score, score_index = _coupled_score(moved, log_scale, score, u, score_index)
            y, log_det, score = forward_with_score(self.transform, moved, score)
        else:
            moved, log_det, score = forward_with_score(self.transform, w, score)
            y, log_scale = self.mover(moved, u)
            score, score_index = _coupled_score(y, log_scale, score, u, score_index)
        noise, log_r = self.reverse.inverse(u, self._given(y))
        score_noise, score = _coupled_score(noise, log_r, score_index, y, score)
        return (y, noise, log_det + log_scale.sum(-1) + (log_q + log_r).sum(-1)), score, score_noise

    def extra_repr(self) -> str:
        return f"dim={self.dim}, index_dim={self.index_dim}, order={self.order!r}"


class _ConditionedIndexedLayer(IndexedLayer):
    """A layer at one context; lives as long as the call, and owns nothing."""

    def __init__(self, layer: IndexedLayer, context: Tensor) -> None:
        nn.Module.__init__(self)
        if context.dim() == 0 or context.shape[-1] != layer.context_dim:
            raise ValueError(f"context: expected shape (*, {layer.context_dim}), got {tuple(context.shape)}")
        self.dim, self.index_dim, self.context_dim = layer.dim, layer.index_dim, layer.context_dim
        self.order, self.exact_inverse = layer.order, layer.exact_inverse
        self.mover, self.index, self.reverse = layer.mover, layer.index, layer.reverse
        transform = layer.transform
        self.transform = transform.condition(context) if hasattr(transform, "condition") else transform
        self._context = context

    @property
    def batch_shape(self) -> Size:
        return self._context.shape[:-1]

    def _given(self, w: Tensor) -> Tensor:
        batch = broadcast_shapes(w.shape[:-1], self.batch_shape)
        return torch.cat([w.expand(batch + w.shape[-1:]), self._context.expand(batch + (-1,))], -1)


class IndexedCompose(Chain):
    """Indexed layers, and plain transforms among them, as one bijection of variable and noise.

    The first D coordinates are the variable, the others the standardised indices of all layers, the first
    layer's first; plain transforms leave these alone.  A standard normal vector goes to (z, e'), and with
    log q(z, e') its density there, log q(z, e') - log N(e') is the log density ratio
    ``q(w, u) |det| / r(u | z)`` that takes the place of a tractable log q(z); its mean is at least that of
    log q(z).

    :param parts: :class:`IndexedLayer` modules and transforms, the first one first.
    :param inner_dim: the length D of the variable, needed only if no part tells it.
    :raises ValueError: if ``parts`` is empty, holds anything else, or dimensions differ.

    Example::

        >>> from pyro_flowvi.transforms import ElementwiseAffine, Planar
        >>> flow = IndexedCompose([IndexedLayer(Planar(2)), IndexedLayer(Planar(2)), ElementwiseAffine(2)])
        >>> flow.inner_dim, flow.index_dim, flow.dim
        (2, 2, 4)
        >>> x = torch.randn(7, 4)
        >>> torch.allclose(flow.inv(flow(x)), x, atol=1e-5)
        True
    """

    def __init__(self, parts: Iterable[Any], inner_dim: int | None = None) -> None:
        if isinstance(parts, str) or not isinstance(parts, Iterable):
            raise ValueError(f"parts: expected a sequence of layers, got {parts!r}")
        parts = list(parts)
        if not parts:
            raise ValueError("parts: expected at least one layer, got none")
        for part in parts:
            if not isinstance(part, Transform | IndexedLayer) and not hasattr(part, "condition"):
                raise ValueError(f"parts: expected an IndexedLayer or a Transform, got {part!r}")
        dims = [part.dim if isinstance(part, IndexedLayer) else own_dim(part) for part in parts]
        self.inner_dim: int = common_dim(dims if inner_dim is None else [*dims, inner_dim])
        sizes = [part.index_dim if isinstance(part, IndexedLayer) else 0 for part in parts]
        self.index_dim: int = sum(sizes)
        super().__init__(parts, self.inner_dim + self.index_dim)
        self._sizes = [self.inner_dim, *(size for size in sizes if size)]

    def condition(self, context: Tensor) -> "IndexedCompose":
        """The flow given ``context``, shape ``(*B, context_dim)``; parts that do not depend on it stay."""
        parts = [part.condition(context) if _is_conditional(part) else part for part in self]
        return IndexedCompose(parts, self.inner_dim)

    @property
    def is_conditional(self) -> bool:
        """Whether a part waits for a context."""
        return any(map(_is_conditional, self))

    def _split(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        w, *noises = x.split(self._sizes, -1)
        return w, noises

    @staticmethod
    def _join(w: Tensor, noises: Sequence[Tensor]) -> Tensor:
        return torch.cat([w, *(noise.expand(w.shape[:-1] + noise.shape[-1:]) for noise in noises)], -1)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, noises = self._split(x)
        images: list[Tensor] = []
        log_dets = []
        for part in self._sequence:
            if isinstance(part, IndexedLayer):
                w, noise, log_det = part(w, noises[len(images)])
                images.append(noise)
            else:
                w, log_det = forward_and_log_det(part, w)
            log_dets.append(log_det)
        return self._join(w, images), functools.reduce(torch.add, log_dets)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, noises = self._split(x)
        score, scores = self._split(score)
        images: list[Tensor] = []
        image_scores, log_dets = [], []
        for part in self._sequence:
            if isinstance(part, IndexedLayer):
                place = len(images)
                moved, score, score_noise = part.forward_with_score(w, noises[place], score, scores[place])
                w, noise, log_det = moved
                images.append(noise)
                image_scores.append(score_noise)
            else:
                w, log_det, score = forward_with_score(part, w, score)
            log_dets.append(log_det)
        total = functools.reduce(torch.add, log_dets)
        return self._join(w, images), total, self._join(score, image_scores)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        w, noises = self._split(y)
        images: list[Tensor] = []
        log_dets = []
        for part in reversed(self._sequence):
            if isinstance(part, IndexedLayer):
                w, noise, log_det = part.inverse(w, noises[-1 - len(images)])
                images.append(noise)
            else:
                w, log_det = inverse_and_log_det(part, w)
            log_dets.append(log_det)
        return self._join(w, images[::-1]), functools.reduce(torch.add, log_dets)


def _is_conditional(part: Any) -> bool:
    if isinstance(part, IndexedLayer):
        return part.context_dim > 0 and not isinstance(part, _ConditionedIndexedLayer)
    return hasattr(part, "condition")
