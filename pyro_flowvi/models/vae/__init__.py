"""The variational autoencoder whose posterior is a flow, its networks and its minibatches."""

from .flow_vae import FlowVAE
from .minibatches import Minibatches, binarize
from .networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder

__all__ = [
    "ConvDecoder",
    "ConvEncoder",
    "FlowVAE",
    "MLPDecoder",
    "MLPEncoder",
    "Minibatches",
    "binarize",
]
