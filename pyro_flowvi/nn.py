"""Conditioner networks."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._checks import check_positive_int, check_widths

__all__ = ["MLP"]


class MLP(nn.Module):
    """A fully connected network with tanh units whose last layer starts at zero.

    So whatever it parameterises starts where its own offset puts it, independent of the input.

    :param in_dim: size of the input.
    :param hidden: widths of the hidden layers.
    :param out_dim: size of the output.
    :raises ValueError: if a size is not a positive integer.

    Example::

        >>> MLP(3, (16, 16), 2)(torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, in_dim: int, hidden: Sequence[int], out_dim: int) -> None:
        super().__init__()
        sizes = [check_positive_int("in_dim", in_dim), *check_widths("hidden", hidden)]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.last = nn.Linear(sizes[-1], check_positive_int("out_dim", out_dim))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        out: Tensor = self.last(x)
        return out
