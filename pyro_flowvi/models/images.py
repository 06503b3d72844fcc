"""What image models are made of: encoders and decoders, and minibatches that a resumed run sees again."""

import itertools
import math
from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import check_positive_int, check_widths
from ..nn import ACTIVATIONS, check_activation, check_image_shape

__all__ = ["ConvDecoder", "ConvEncoder", "MLPDecoder", "MLPEncoder", "Minibatches", "binarize"]

_MODULES: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def _layers(sizes: Sequence[int], activation: str, *, last: bool) -> nn.Sequential:
    """Linear layers with an activation after each, or after each but the last."""
    parts: list[nn.Module] = []
    for size, following in itertools.pairwise(sizes):
        parts += [nn.Linear(size, following), _MODULES[check_activation(activation)]()]
    return nn.Sequential(*(parts if last else parts[:-1]))


class MLPEncoder(nn.Module):
    """Features of an image by a fully connected network, with an activation after every layer.

    :param shape: of an image, ``(C, H, W)``.
    :param hidden: widths; the last is the number of features.
    :param activation: "tanh" or "relu".
    :raises ValueError: if a size is not a positive integer, ``hidden`` empty, or the activation unknown.

    Shapes: input ``(*, C, H, W)``, output ``(*, feature_dim)``.

    Example::

        >>> MLPEncoder((1, 28, 28))(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 64])
    """

    def __init__(
        self, shape: Sequence[int], hidden: Sequence[int] = (128, 64), *, activation: str = "relu"
    ) -> None:
        super().__init__()
        widths = check_widths("hidden", hidden)
        if not widths:
            raise ValueError(f"hidden: expected at least one width, got {hidden!r}")
        self.shape = check_image_shape("shape", shape)
        self.feature_dim = widths[-1]
        self.layers = _layers([math.prod(self.shape), *widths], activation, last=True)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x.flatten(-3))
        return features


class MLPDecoder(nn.Module):
    """Logits of the pixels by a fully connected network; the last layer is linear.

    :param latent_dim: the length D of the latent vectors.
    :param shape: of an image, ``(C, H, W)``.
    :param hidden: widths of the hidden layers.
    :param activation: "tanh" or "relu".
    :raises ValueError: if a size is not a positive integer, or the activation unknown.

    Shapes: input ``(*, D)``, output ``(*, C, H, W)``.

    Example::

        >>> MLPDecoder(40, (1, 28, 28))(torch.zeros(5, 40)).shape
        torch.Size([5, 1, 28, 28])
    """

    def __init__(
        self,
        latent_dim: int,
        shape: Sequence[int],
        hidden: Sequence[int] = (64, 128),
        *,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.shape = check_image_shape("shape", shape)
        sizes = [self.latent_dim, *check_widths("hidden", hidden), math.prod(self.shape)]
        self.layers = _layers(sizes, activation, last=False)

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.layers(z).unflatten(-1, self.shape)
        return logits


def _half(shape: Sequence[int]) -> tuple[int, int, int]:
    sizes = check_image_shape("shape", shape)
    if sizes[1] % 2 or sizes[2] % 2:
        raise ValueError(f"shape: expected an even height and width, got {shape!r}")
    return sizes


class ConvEncoder(nn.Module):
    """Features of an image by one convolution to half its size, and a linear layer.

    The encoder of Caterini, Cornish, Sejdinovic and Doucet, *Variational Inference with
    Continuously-Indexed Normalizing Flows*, 2020: kernel 4, stride 2, padding 1, tanh.

    :param shape: of an image, ``(C, H, W)``, height and width even.
    :param feature_dim: the number of features; theirs is twice the length of the latent vectors.
    :param channels: of the convolution.
    :param activation: "tanh" or "relu".
    :raises ValueError: if a size is not a positive integer, height or width odd, or the activation unknown.

    Shapes: input ``(*, C, H, W)``, output ``(*, feature_dim)``.

    Example::

        >>> ConvEncoder((1, 28, 28), 40)(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 40])
    """

    def __init__(
        self, shape: Sequence[int], feature_dim: int, *, channels: int = 8, activation: str = "tanh"
    ) -> None:
        super().__init__()
        self.shape = _half(shape)
        self.feature_dim = check_positive_int("feature_dim", feature_dim)
        self.activation = check_activation(activation)
        depth, height, width = self.shape
        self.conv = nn.Conv2d(depth, check_positive_int("channels", channels), 4, 2, 1)
        self.last = nn.Linear(channels * (height // 2) * (width // 2), self.feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.activation](self.conv(x.reshape(-1, *self.shape)))
        features: Tensor = self.last(hidden.flatten(1))
        return features.reshape(x.shape[:-3] + features.shape[1:])


class ConvDecoder(nn.Module):
    """Logits of the pixels by a linear layer and one transposed convolution from half the size.

    The counterpart of :class:`ConvEncoder`.

    :param latent_dim: the length D of the latent vectors.
    :param shape: of an image, ``(C, H, W)``, height and width even.
    :param channels: before the convolution.
    :param activation: "tanh" or "relu".
    :raises ValueError: if a size is not a positive integer, height or width odd, or the activation unknown.

    Shapes: input ``(*, D)``, output ``(*, C, H, W)``.

    Example::

        >>> ConvDecoder(20, (1, 28, 28))(torch.zeros(5, 20)).shape
        torch.Size([5, 1, 28, 28])
    """

    def __init__(
        self, latent_dim: int, shape: Sequence[int], *, channels: int = 8, activation: str = "tanh"
    ) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.shape = _half(shape)
        self.activation = check_activation(activation)
        depth, height, width = self.shape
        self.small = (check_positive_int("channels", channels), height // 2, width // 2)
        self.first = nn.Linear(self.latent_dim, math.prod(self.small))
        self.conv = nn.ConvTranspose2d(channels, depth, 4, 2, 1)

    def forward(self, z: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.activation](self.first(z)).reshape(-1, *self.small)
        logits: Tensor = self.conv(hidden)
        return logits.reshape(z.shape[:-1] + self.shape)


def _draw_seed(*key: int) -> int:
    """A seed of torch's generators from several numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _check_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed: expected an integer that is not negative, got {seed!r}")
    return int(seed)


def _check_means(images: Tensor) -> Tensor:
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() < 2:
        got = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else repr(images)
        raise ValueError(f"images: expected a floating-point tensor of shape (N, ...), got {got}")
    if len(images) == 0:
        raise ValueError("images: expected at least one image, got none")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0.0 and high <= 1.0):  # NaN fails as well
        raise ValueError(f"images: expected means from 0 to 1, got values from {low} to {high}")
    return images


def _bernoulli(means: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    # In float32 whatever the images are, so that a seed binarises alike in every dtype.
    noise = torch.rand(means.shape, generator=generator, dtype=torch.float32, device="cpu")
    return (noise.to(means.device) < means).to(means.dtype)


def binarize(images: Tensor, seed: int = 0) -> Tensor:
    """One draw of zeros and ones, with the pixels as their means; the same for the same seed.

    :param images: means from 0 to 1, floating point, shape ``(N, ...)``.
    :param seed: of the draw, apart from torch's own generator.
    :raises ValueError: if ``images`` is not of the described kind.

    Example::

        >>> binarize(torch.tensor([[0.0, 0.5, 1.0]]).expand(1000, 3)).mean(0).round(decimals=1)
        tensor([0.0000, 0.5000, 1.0000])
    """
    return _bernoulli(_check_means(images), _draw_seed(_check_seed(seed)))


class Minibatches:
    """Minibatches in shuffled epochs as a function of the step, for ``fit(..., batches=...)``.

    A batch depends on the seed and the step alone, so that a run that is resumed sees the same ones.  What
    does not fill a batch at the end of an epoch is left out of it.

    :param images: shape ``(N, ...)``; to binarise, means from 0 to 1.
    :param batch_size: images in a batch.
    :param binarize: whether pixels are drawn anew as zeros and ones each time (dynamic binarisation).
    :param seed: of order and draws, apart from torch's own generator.
    :raises ValueError: if an argument is not of the described kind, or there is less than one batch.

    Example::

        >>> batches = Minibatches(torch.full((250, 1, 8, 8), 0.3), 100)
        >>> batches.steps_per_epoch, batches(7).shape
        (2, torch.Size([100, 1, 8, 8]))
        >>> torch.equal(batches(7), batches(7))
        True
    """

    def __init__(
        self, images: Tensor, batch_size: int = 100, *, binarize: bool = True, seed: int = 0
    ) -> None:
        self.images = _check_means(images)
        self.batch_size = check_positive_int("batch_size", batch_size)
        if self.batch_size > len(images):
            raise ValueError(f"batch_size: expected at most the {len(images)} images, got {batch_size}")
        self.binarize, self.seed = bool(binarize), _check_seed(seed)
        self.steps_per_epoch = len(images) // self.batch_size
        self._epoch: tuple[int, Tensor] | None = None

    def _order(self, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
            self._epoch = epoch, torch.from_numpy(order).to(self.images.device)
        return self._epoch[1]

    def __call__(self, step: int) -> Tensor:
        """The batch of a step, counted from 0, shape ``(batch_size, ...)``."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rows = self._order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        batch = self.images[rows]
        return _bernoulli(batch, _draw_seed(self.seed, step, 1)) if self.binarize else batch
