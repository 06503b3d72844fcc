"""What a pass through a layer gives."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

__all__ = ["Gradients", "Pass", "accumulate"]

Gradients = Mapping[Tensor, Tensor]
"""A gradient for every parameter that is trained."""


class Pass(NamedTuple):
    """A layer at P points, and the way back.  Nothing of it has a graph."""

    image: Tensor
    """Shape ``(P, D)``."""
    log_det: Tensor
    """log |det J|, ``(P,)``, or a scalar."""
    score: Tensor
    """∇ log q at the image, ``(P, D)``."""
    pull: Callable[[Tensor], tuple[Tensor, Gradients]]
    """The vector-Jacobian product of the image, for ``(P, D)``: at the input, and by parameter."""


def accumulate(total: dict[Tensor, Tensor], found: Gradients) -> None:
    """Adds gradients: a layer may occur twice."""
    for param, grad in found.items():
        total[param] = total[param] + grad if param in total else grad
