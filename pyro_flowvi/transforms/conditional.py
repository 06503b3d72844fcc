"""Any parametric transform given a context."""

from collections.abc import Sequence

from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor

from .._checks import check_positive_int
from ..nn import MLP
from .base import FlowTransform, ParametricTransform, _Conditioned

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

        :raises ValueError: if the last dimension of ``context`` is not ``context_dim``.
        """
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise ValueError(f"context: expected shape (*, {self.context_dim}), got {tuple(context.shape)}")
        batch_shape = context.shape[:-1]
        offsets = self.network(context).split(list(self._sizes.values()), -1)
        raw = {
            name: own + offset.reshape(batch_shape + own.shape)
            for (name, own), offset in zip(self.layer.raw_parameters().items(), offsets, strict=True)
        }
        return _Conditioned(self.layer, raw, batch_shape)
