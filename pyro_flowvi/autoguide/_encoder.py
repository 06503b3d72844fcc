"""Networks that read a row's message off its data (amortised inference)."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._message_map import MessageMap
from ._row_tables import gathered, rows_of_params

__all__ = ["Encoder", "RowNetwork"]

WIDTHS = 64, 400
"""Units of a hidden layer at least and at most."""


class RowNetwork(nn.Module):
    """The network of ``amortize="auto"``: two hidden layers on the observed values of a row.

    Each value enters as it is and as its area hyperbolic sine, in which counts are spread evenly, both less
    the mean of the first data and in units of their standard deviation.

    :param values: the observed values of some rows, ``(B, *)`` of each site.

    Example::

        >>> RowNetwork([torch.randn(10, 3)])(torch.randn(2, 3)).shape
        torch.Size([2, 64])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, values: Sequence[Tensor]) -> None:
        super().__init__()
        features = self._features(values)
        spread = features.std(0, correction=0)
        self.register_buffer("loc", features.mean(0))
        self.register_buffer("scale", torch.where(spread > 1e-6 * (1.0 + self.loc.abs()), spread, 1.0))
        count = features.shape[-1]
        width = min(WIDTHS[1], max(WIDTHS[0], count // 2))
        self.layers = nn.Sequential(nn.Linear(count, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    @staticmethod
    def _features(values: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([value.reshape(len(value), -1) for value in values], -1)
        flat = flat.nan_to_num(0.0, 0.0, 0.0)
        return torch.cat([flat, flat.asinh()], -1)

    def forward(self, *values: Tensor) -> Tensor:
        """A description of each row, ``(B, H)``."""
        found: Tensor = self.layers((self._features(values) - self.loc) / self.scale)
        return found


class Encoder(nn.Module):
    """From a row's data to its messages: a network, and a linear layer behind it.

    A message is a Gaussian of the row's latents, one number after another or, where their prior is joint,
    jointly; it starts the same for all rows.

    :param body: takes the observed values of B rows, one tensor ``(B, *)`` for each site, to ``(B, H)``;
        "auto" for a :class:`RowNetwork`.
    :param layer: the map of a page.
    :param values: the observed values of the page's rows.
    :raises ValueError: if the network returns anything else.
    """

    def __init__(self, body: Any, layer: MessageMap, values: Sequence[Tensor]) -> None:
        super().__init__()
        like = values[0]
        self.body = RowNetwork(values) if isinstance(body, str) else body
        self._shapes = {
            key: tuple(value.shape[1:])
            for key, value in rows_of_params(layer).items()
            if not key.endswith(("_slope", "_by_root"))
        }
        self._still = {
            key: tuple(value.shape[1:])
            for key, value in rows_of_params(layer).items()
            if key.endswith(("_slope", "_by_root"))
        }
        self.to(dtype=like.dtype, device=like.device)
        with torch.no_grad():
            found = self.body(*values)
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(like):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"amortize: expected a module that takes the observed values of {len(like)} rows, of shapes "
                f"{[tuple(value.shape) for value in values]}, to ({len(like)}, H), got {got}"
            )
        count = sum(math.prod(shape) for shape in self._shapes.values())
        self.head = nn.Linear(found.shape[-1], count).to(like)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            start = {key: value[0] for key, value in rows_of_params(layer).items()}
            self.head.bias.copy_(torch.cat([start[key].reshape(-1) for key in self._shapes]))

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """The messages of rows by the names of their tables, each ``(B, *)``."""
        flat = self.head(self.body(*values))
        parts = flat.split([math.prod(shape) for shape in self._shapes.values()], -1)
        found = {
            key: part.reshape(len(flat), *shape)
            for (key, shape), part in zip(self._shapes.items(), parts, strict=True)
        }
        return {**found, **{key: flat.new_zeros(len(flat), *shape) for key, shape in self._still.items()}}

    @contextmanager
    def given(
        self, layer: MessageMap, values: Sequence[Tensor], corrections: dict[str, Tensor] | None
    ) -> Iterator[None]:
        """A map with the messages of rows with these data.

        :param corrections: what the rows have of their own, to be added.
        """
        found = self(*values)
        if corrections is not None:
            found = {key: value + corrections[key] for key, value in found.items()}
        with gathered(layer, found):
            yield
