"""A transform turned around."""

from torch import Size, Tensor

from .base import FlowTransform, ParametricTransform, Raw

__all__ = ["Inverse"]


class Inverse(ParametricTransform):
    """The inverse of a transform, as a module that owns its parameters.

    torch's ``transform.inv`` is no module: what is built from it trains nothing.

    :param transform: a transform of this package with an exact inverse.
    :raises ValueError: if it is not.

    Example::

        >>> from pyro_flowvi.transforms import ElementwiseAffine
        >>> Inverse(ElementwiseAffine(1, scale=2.0))(torch.ones(1)).item()
        0.5
    """

    def __init__(self, transform: FlowTransform) -> None:
        if not isinstance(transform, FlowTransform) or not transform.exact_inverse:
            raise ValueError(f"transform: expected a FlowTransform with an exact inverse, got {transform!r}")
        super().__init__(transform.dim)
        self.transform = transform

    @property
    def batch_shape(self) -> Size:
        return self.transform.batch_shape

    def raw_parameters(self) -> dict[str, Tensor]:
        """Those of the transform, if a context can move them."""
        if isinstance(self.transform, ParametricTransform):
            return self.transform.raw_parameters()
        return {}

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.transform, ParametricTransform):
            return self.transform.inverse_given(raw, x)
        return self.transform.inverse_and_log_det(x)

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.transform, ParametricTransform):
            return self.transform.forward_given(raw, y)
        return self.transform.forward_and_log_det(y)
