"""A VAE as in Pyro's tutorial: a decoder in the model, an encoder, and the guide that is written by hand.

https://pyro.ai/examples/vae.html, with one hidden layer of softplus units on either side, a diagonal normal
posterior and Adam at 1e-3.  The digits are scikit-learn's, 8 x 8 pixels, or the 10,000 test images of MNIST
in a folder, of which a seed makes parts of 8,000, 1,000 and 1,000.  Pixels are binarised once.
"""

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks.common import mnist
from pyro_flowvi.datasets import digits
from pyro_flowvi.models import binarize

RATE, BATCH = 1e-3, 100
SIZES = {"digits": (8, 128), "MNIST": (50, 400)}
"""Latents and hidden units."""


def images(name: str, folder: Path | None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of zeros and ones, by rows, to train with and to test with."""
    if name == "digits":
        train, _, test = (torch.from_numpy(part.images / 16).float().flatten(1) for part in digits())
    else:
        parts = mnist.parts(folder, seed)
        train, _, test = (torch.from_numpy(part.images / 255.0).float().flatten(1) for part in parts)
    return binarize(train, 12345), binarize(test, 54321)


class VAE(nn.Module):
    """The tutorial's networks; ``encoder`` gives the loc and the logarithm of the scale."""

    def __init__(self, pixels: int, latents: int, hidden: int) -> None:
        super().__init__()
        self.latents = latents
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Softplus(), nn.Linear(hidden, 2 * latents))
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.Softplus(), nn.Linear(hidden, pixels))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            zero = x.new_zeros(self.latents)
            z = pyro.sample("z", dist.Normal(zero, 1.0 + zero).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
