"""Models built on flows, for stock Pyro inference."""

from .flow_vae import FlowVAE
from .images import ConvDecoder, ConvEncoder, Minibatches, MLPDecoder, MLPEncoder, binarize

__all__ = [
    "ConvDecoder",
    "ConvEncoder",
    "FlowVAE",
    "MLPDecoder",
    "MLPEncoder",
    "Minibatches",
    "binarize",
]
