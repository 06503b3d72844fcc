"""Models built on flows, for stock Pyro inference."""

from .flow_vae import FlowVAE
from .images import ConvDecoder, ConvEncoder, Minibatches, MLPDecoder, MLPEncoder, binarize
from .vmonf import VMoNF

__all__ = [
    "ConvDecoder",
    "ConvEncoder",
    "FlowVAE",
    "MLPDecoder",
    "MLPEncoder",
    "Minibatches",
    "VMoNF",
    "binarize",
]
