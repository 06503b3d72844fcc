"""Conditioner networks."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_positive_int, check_widths

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "ConvResNet",
    "MaskedMLP",
    "check_activation",
    "check_image_shape",
    "masked_degrees",
]

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {"tanh": torch.tanh, "relu": torch.relu}
"""The activations of hidden layers, by name."""
_IN_PLACE: Final[dict[str, Callable[[Tensor], Tensor]]] = {"tanh": torch.tanh_, "relu": torch.relu_}
Biases = Mapping[str, Tensor]


def _tanh(x: Tensor) -> Tensor:
    """As torch's to the last place of one; on a CPU it takes a third of the time."""
    return torch.sigmoid(x + x) * 2.0 - 1.0


def check_activation(name: str) -> str:
    """``name``, or ValueError unless it names an activation.

    Example::

        >>> check_activation("relu")
        'relu'
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {name!r}")
    return name


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None or bias.dim() == 1:
        return F.linear(x, weight, bias)
    return F.linear(x, weight) + bias  # a bias for each row of a context


class MLP(nn.Module):
    """A fully connected network whose last layer starts at zero.

    So whatever it parameterises starts where its own offset puts it, independent of the input.  The
    biases can be given at a call: that is how a context reaches the network.

    :param in_dim: size of the input.
    :param hidden: widths of the hidden layers.
    :param out_dim: size of the output.
    :param activation: "tanh" or "relu".
    :param last_bias: whether the last layer has a bias.
    :raises ValueError: if a size is not a positive integer or the activation unknown.

    Example::

        >>> MLP(3, (16, 16), 2)(torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_dim: int,
        hidden: Sequence[int],
        out_dim: int,
        *,
        activation: str = "tanh",
        last_bias: bool = True,
    ) -> None:
        super().__init__()
        sizes = [check_positive_int("in_dim", in_dim), *check_widths("hidden", hidden)]
        self.activation = check_activation(activation)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.last = nn.Linear(sizes[-1], check_positive_int("out_dim", out_dim), bias=last_bias)
        for param in self.last.parameters():
            nn.init.zeros_(param)
        self.columns = False
        """Whether inputs of two dimensions are taken as columns: faster for many small networks at once."""

    def biases(self) -> dict[str, Tensor]:
        """The biases by name, first layer first."""
        return {name: param for name, param in self.named_parameters() if name.endswith("bias")}

    def forward(self, x: Tensor, biases: Biases | None = None) -> Tensor:
        """The output, shape ``(*, out_dim)``; ``biases`` replace the network's own."""
        biases = self.biases() if biases is None else biases
        activate = _IN_PLACE[self.activation]
        if self.columns and x.dim() == 2:
            return self._on_columns(x.mT, biases, _tanh if self.activation == "tanh" else activate).mT
        for i, layer in enumerate(self.hidden):
            x = activate(_linear(x, self._weight(layer), biases[f"hidden.{i}.bias"]))
        return _linear(x, self._weight(self.last), biases.get("last.bias"))

    def _on_columns(self, x: Tensor, biases: Biases, activate: Callable[[Tensor], Tensor]) -> Tensor:
        for i, layer in enumerate(self.hidden):
            x = activate(self._weight(layer) @ x + biases[f"hidden.{i}.bias"].unsqueeze(-1))
        last = self._weight(self.last) @ x
        return last + biases["last.bias"].unsqueeze(-1) if "last.bias" in biases else last

    def _weight(self, layer: nn.Module) -> Tensor:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return weight


def masked_degrees(dim: int, width: int) -> Tensor:
    """Degrees of ``width`` hidden units, sorted, from 1 to D - 1: a unit of degree m sees m inputs.

    Example::

        >>> masked_degrees(4, 6)
        tensor([1, 1, 2, 2, 3, 3])
    """
    return 1 + torch.arange(width, device="cpu") * (dim - 1) // width


class MaskedMLP(MLP):
    """A network whose output i depends on the inputs before i alone, ``num_params`` values each.

    Germain, Gregor, Murray and Larochelle, *MADE: Masked Autoencoder for Distribution Estimation*, 2015,
    equations 12 and 13.  Degrees are sorted, so that the units that become known with one more input are
    next to each other.

    :param dim: the number D of inputs, at least 2.
    :param hidden: widths of the hidden layers, at least one.
    :param num_params: the number P of values for each input.
    :param activation: "tanh" or "relu".
    :raises ValueError: if a size is not a positive integer, ``dim`` is 1, or ``hidden`` empty.

    Shapes: input ``(*, D)``, output ``(*, P D)``, value p of input i at ``p D + i``.

    Example::

        >>> net = MaskedMLP(3, (8,), 2)
        >>> net(torch.ones(5, 3)).shape
        torch.Size([5, 6])
    """

    def __init__(self, dim: int, hidden: Sequence[int], num_params: int, *, activation: str = "tanh") -> None:
        if dim < 2 or not hidden:
            raise ValueError(f"dim, hidden: expected at least 2 inputs and 1 layer, got {dim}, {hidden}")
        super().__init__(dim, hidden, dim * num_params, activation=activation, last_bias=False)
        seen = torch.arange(1, dim + 1, device="cpu")
        for layer, width in zip(self.hidden, hidden, strict=True):
            degrees = masked_degrees(dim, width)
            layer.register_buffer("mask", self._mask(degrees.unsqueeze(-1) >= seen), persistent=False)
            seen = degrees
        outputs = torch.arange(dim, device="cpu").repeat(num_params)
        self.last.register_buffer("mask", self._mask(outputs.unsqueeze(-1) >= seen), persistent=False)

    @staticmethod
    def _mask(visible: Tensor) -> Tensor:
        return visible.to(device=torch.get_default_device(), dtype=torch.get_default_dtype())

    def _weight(self, layer: nn.Module) -> Tensor:
        weight: Tensor = layer.weight * layer.mask  # type: ignore[operator]
        return weight

    def jacobian(self, x: Tensor) -> Tensor:
        """The derivatives of all outputs by all inputs, ``(*, P D, D)``, at ``x`` of shape ``(*, D)``."""
        *weights, last = self.masked_weights()
        total: Tensor | None = None
        for layer, weight in zip(self.hidden, weights, strict=True):
            x = ACTIVATIONS[self.activation](F.linear(x, weight, layer.bias))  # type: ignore[arg-type]
            slope = 1.0 - x.square() if self.activation == "tanh" else (x > 0).to(x)
            total = slope.unsqueeze(-1) * (weight if total is None else weight @ total)
        assert total is not None  # there is at least one hidden layer
        return last @ total

    def masked_weights(self) -> list[Tensor]:
        """The weights of all layers, masked, first layer first."""
        return [self._weight(layer) for layer in (*self.hidden, self.last)]


def check_image_shape(name: str, shape: Sequence[int]) -> tuple[int, int, int]:
    """``shape`` as three positive ints, channels, height and width, or ValueError.

    Example::

        >>> check_image_shape("shape", [3, 32, 32])
        (3, 32, 32)
    """
    sizes = check_widths(name, shape)
    if len(sizes) != 3:
        raise ValueError(f"{name}: expected (channels, height, width), got {shape!r}")
    return sizes


def _conv(image: Tensor, layer: nn.Module, bias: Tensor | None) -> Tensor:
    """A convolution of images ``(*, C, H, W)``, with a bias for each row of a context if it has rows."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    batch = image.shape[:-3]
    shared = bias if bias is None or bias.dim() == 1 else None
    out = F.conv2d(image.reshape(-1, *image.shape[-3:]), weight, shared, padding="same")
    out = out.reshape(*batch, *out.shape[-3:])
    return out if bias is None or bias is shared else out + bias[..., None, None]


class ConvResNet(nn.Module):
    """A residual convolutional network for the coupling layers of an image flow.

    The pixels that pass through are put in their places, the others are zero, and further channels say
    which is which.  A 3 x 3 convolution, residual blocks of two each and a last one, which starts at zero
    and has no bias, follow; the outputs at the pixels that move are kept.

    Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, 2017, sections 3.4 and 4.1, without
    the batch normalisation; the order within a block is that of He, Zhang, Ren and Sun, *Identity Mappings
    in Deep Residual Networks*, 2016.

    :param shape: of an image, ``(C, H, W)``.
    :param mask: C H W booleans, True where a pixel passes through; as many as pass are the input's length.
    :param num_params: the number P of outputs for each pixel that moves.
    :param channels: of the hidden layers.
    :param num_blocks: the number of residual blocks.
    :param activation: "tanh" or "relu".
    :raises ValueError: if a size is not a positive integer, or ``mask`` not of the described kind.

    Shapes: input ``(*, N)``, output ``(*, P M)`` for N pixels that pass and M that move, in the order of the
    flat image; parameter p of moved pixel i is at ``p M + i``.

    Example::

        >>> net = ConvResNet((1, 2, 3), [True, False, True, False, True, False], num_params=2)
        >>> net(torch.ones(5, 3)).shape
        torch.Size([5, 6])
    """

    def __init__(
        self,
        shape: Sequence[int],
        mask: Sequence[bool] | Tensor,
        num_params: int,
        *,
        channels: int = 32,
        num_blocks: int = 2,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.shape = check_image_shape("shape", shape)
        self.activation = check_activation(activation)
        check_positive_int("num_params", num_params)
        width = check_positive_int("channels", channels)
        size = math.prod(self.shape)
        keep = torch.as_tensor(mask, device="cpu")
        if keep.dtype != torch.bool or keep.shape != (size,):
            raise ValueError(f"mask: expected {size} booleans, got {mask!r}")
        moved = (~keep).nonzero().flatten()
        outputs = torch.cat([moved + p * size for p in range(num_params)])
        frame = torch.cat([torch.zeros(size, device="cpu"), keep.to(torch.float32)])
        self.kept: Tensor
        self.outputs: Tensor
        self.frame: Tensor
        device = torch.get_default_device()
        self.register_buffer("kept", keep.nonzero().flatten().to(device), persistent=False)
        self.register_buffer("outputs", outputs.to(device), persistent=False)
        self.register_buffer("frame", frame.to(device, torch.get_default_dtype()), persistent=False)
        depth = self.shape[0]
        self.first = nn.Conv2d(2 * depth, width, 3)
        count = 2 * check_positive_int("num_blocks", num_blocks)
        self.hidden = nn.ModuleList(nn.Conv2d(width, width, 3) for _ in range(count))
        self.last = nn.Conv2d(width, num_params * depth, 3, bias=False)
        nn.init.zeros_(self.last.weight)

    def biases(self) -> dict[str, Tensor]:
        """The biases by name, first layer first."""
        return {name: param for name, param in self.named_parameters() if name.endswith("bias")}

    def forward(self, x: Tensor, biases: Biases | None = None) -> Tensor:
        """The output, shape ``(*, P M)``; ``biases`` replace the network's own."""
        biases = self.biases() if biases is None else biases
        activate = ACTIVATIONS[self.activation]
        frame = self.frame.expand(*x.shape[:-1], self.frame.shape[0])
        image = frame.index_copy(-1, self.kept, x).unflatten(-1, (-1, *self.shape[1:]))
        h = _conv(image, self.first, biases["first.bias"])
        for i in range(0, len(self.hidden), 2):
            inner = _conv(activate(h), self.hidden[i], biases[f"hidden.{i}.bias"])
            h = h + _conv(activate(inner), self.hidden[i + 1], biases[f"hidden.{i + 1}.bias"])
        return _conv(activate(h), self.last, None).flatten(-3).index_select(-1, self.outputs)
