"""Any parametric transform given a context."""

from collections.abc import Sequence

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Size, Tensor

from .._checks import check_positive_int
from ..nn import MLP
from .base import FlowTransform, ParametricTransform, score_by_inverse

__all__ = ["Conditional"]


class Conditional(ConditionalTransformModule):
    """A parametric transform whose raw parameters depend on a context.

    Raw parameters = the layer's own + a network of the context whose last layer starts at zero, so
    the conditional transform starts as the unconditional one.

    :param layer: the transform.
    :param context_dim: the length of the context vectors.
    :param hidden: widths of the network's hidden layers.
    :raises ValueError: if a size is not a positive integer, or the layer has no parameters.

    Example::

        >>> from pyro_flowvi.transforms import Planar
        >>> flow = Conditional(Planar(2), context_dim=3)
        >>> flow.condition(torch.zeros(5, 3))(torch.zeros(7, 5, 2)).shape
        torch.Size([7, 5, 2])
    """

    def __init__(self, layer: ParametricTransform, context_dim: int, hidden: Sequence[int] = (32,)) -> None:
        super().__init__()
        if not isinstance(layer, ParametricTransform):
            raise ValueError(f"layer: expected a ParametricTransform, got {layer!r}")
        self.layer = layer
        self.dim = layer.dim
        self.context_dim = check_positive_int("context_dim", context_dim)
        self._sizes = {name: raw.numel() for name, raw in layer.raw_parameters().items()}
        if not self._sizes:
            raise ValueError(f"layer: expected parameters that a context can move, got none in {layer!r}")
        self.network = MLP(context_dim, hidden, sum(self._sizes.values()))

    def condition(self, context: Tensor) -> FlowTransform:
        """The transform given ``context`` of shape ``(*B, context_dim)``; its batch shape is B.

        Layer and network are read at each call of it, as Pyro's conditional transforms read theirs: it may be
        kept while they are trained.

        :raises ValueError: if the last dimension of ``context`` is not ``context_dim``.
        """
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise ValueError(f"context: expected shape (*, {self.context_dim}), got {tuple(context.shape)}")
        return _Conditioned(self, context)


class _Conditioned(FlowTransform):
    """A conditional transform given one context; shares its parameters."""

    def __init__(self, conditional: Conditional, context: Tensor) -> None:
        super().__init__(conditional.dim)
        self.conditional = conditional
        self._context = context
        self.exact_inverse = conditional.layer.exact_inverse

    @property
    def batch_shape(self) -> Size:
        return self._context.shape[:-1]

    def raw_parameters(self) -> dict[str, Tensor]:
        """The layer's raw parameters at the context, by name; of batch shape B each."""
        conditional, context = self.conditional, self._context
        offsets = conditional.network(context).split(list(conditional._sizes.values()), -1)
        return {
            name: own + offset.reshape(self.batch_shape + own.shape)
            for (name, own), offset in zip(conditional.layer.raw_parameters().items(), offsets, strict=True)
        }

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conditional.layer.forward_given(self.raw_parameters(), x)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layer, raw = self.conditional.layer, self.raw_parameters()
        with torch.no_grad():
            pushed = layer.score_given(raw, x, score)
        y, log_det = layer.forward_given(raw, x)
        return y, log_det, score_by_inverse(layer, y, score, raw) if pushed is None else pushed

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.conditional.layer.inverse_given(self.raw_parameters(), y)
