"""Models built on flows, for stock Pyro inference."""

from typing import TYPE_CHECKING, Any

from .annihilation import Annihilation, annihilate
from .flow_vae import FlowVAE
from .images import ConvDecoder, ConvEncoder, Minibatches, MLPDecoder, MLPEncoder, binarize
from .multistart import multistart, ring_flow
from .overlap import class_map_by_overlap, component_overlap
from .vmonf import VMoNF

if TYPE_CHECKING:
    from .estimators import FlowMixture

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
        from .estimators import FlowMixture

        return FlowMixture
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
