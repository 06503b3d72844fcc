"""Models built on flows, for stock Pyro inference."""

from typing import TYPE_CHECKING, Any

from .mixture import (
    Annihilation,
    VMoNF,
    annihilate,
    class_map_by_overlap,
    component_overlap,
    multistart,
    ring_flow,
)
from .vae import ConvDecoder, ConvEncoder, FlowVAE, Minibatches, MLPDecoder, MLPEncoder, binarize

if TYPE_CHECKING:
    from .mixture.estimator import FlowMixture

__all__ = [
    "Annihilation",
    "ConvDecoder",
    "ConvEncoder",
    "FlowMixture",
    "FlowVAE",
    "MLPDecoder",
    "MLPEncoder",
    "Minibatches",
    "VMoNF",
    "annihilate",
    "binarize",
    "class_map_by_overlap",
    "component_overlap",
    "multistart",
    "ring_flow",
]


def __getattr__(name: str) -> Any:
    """The estimator, when it is first asked for: its base class is scikit-learn's."""
    if name == "FlowMixture":
        from .mixture.estimator import FlowMixture

        return FlowMixture
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
