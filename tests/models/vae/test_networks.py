"""Encoders and decoders."""

import pytest
import torch

from pyro_flowvi.models import ConvDecoder, ConvEncoder, MLPEncoder


def test_published_sizes():
    """Parameters of the authors' autoencoder for 28 x 28 images: 95,953, with heads for mean and scale."""
    encoder, decoder = ConvEncoder((1, 28, 28), 40), ConvDecoder(20, (1, 28, 28))
    count = sum(p.numel() for module in (encoder, decoder) for p in module.parameters())
    assert count == 95_953
    assert decoder(torch.zeros(2, 3, 20)).shape == (2, 3, 1, 28, 28)
    assert encoder(torch.zeros(2, 1, 28, 28)).shape == (2, 40)


def test_bad_shapes():
    with pytest.raises(ValueError, match="shape: expected an even height"):
        ConvEncoder((1, 7, 8), 4)
    with pytest.raises(ValueError, match="hidden: expected at least one"):
        MLPEncoder((1, 4, 4), ())
