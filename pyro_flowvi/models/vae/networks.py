"""Encoders and decoders."""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..._checks import check_positive_int, check_widths
from ...nn import ACTIVATIONS, check_activation, check_image_shape

__all__ = ["ConvDecoder", "ConvEncoder", "MLPDecoder", "MLPEncoder"]

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
