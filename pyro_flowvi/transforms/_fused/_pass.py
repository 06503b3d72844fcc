"""What a pass through a layer gives."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

__all__ = ["EXACT", "Form", "Gradients", "Pass", "accumulate", "form_of", "trained"]

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


Form = Callable[[Any, Tensor, Tensor], Pass | None]
"""Of a layer, points and the scores there the pass; None for a layer that it does not serve."""
EXACT: dict[type, Form] = {}
"""Forms by the class of the layer.  A subclass may do anything else: it has none."""


F = TypeVar("F", bound=Form)


def form_of(*kinds: type) -> Callable[[F], F]:
    """Enters a form for layers of these very classes."""

    def enter(form: F) -> F:
        EXACT.update(dict.fromkeys(kinds, form))
        return form

    return enter


def trained(grads: Gradients) -> Gradients:
    """The gradients of those parameters that are not frozen."""
    return {param: grad for param, grad in grads.items() if param.requires_grad}


def accumulate(total: dict[Tensor, Tensor], found: Gradients) -> None:
    """Adds gradients: a layer may occur twice."""
    for param, grad in found.items():
        total[param] = total[param] + grad if param in total else grad
