"""Networks that read a row's message off its data (amortised inference)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._coupling import lower_of
from ._message_map import MessageMap
from ._message_plan import taken
from ._row_tables import gathered, order_of, rows_of_params

__all__ = ["Encoder", "RowNetwork"]

WIDTHS = 64, 400
"""Units of a hidden layer at least and at most."""
LEAST_WEIGHT = 1.0
"""Precision that a message has at first at least, where a prior is wide."""


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
    jointly.  The layer gives its weight, and how far the mean is moved where the prior is that of the start:
    so that a model with a fixed prior trains as by an encoder of means.  All rows start near their prior.

    :param body: takes the observed values of B rows, one tensor ``(B, *)`` for each site, to ``(B, H)``;
        "auto" for a :class:`RowNetwork`.
    :param layer: the map of a page.
    :param start: latents of the page, ``(D,)``.
    :param values: the observed values of the page's rows.
    :raises ValueError: if the network returns anything else.
    """

    def __init__(self, body: Any, layer: MessageMap, start: Tensor, values: Sequence[Tensor]) -> None:
        super().__init__()
        like = values[0]
        self.body = RowNetwork(values) if isinstance(body, str) else body
        self.to(dtype=like.dtype, device=like.device)
        with torch.no_grad():
            found = self.body(*values)
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(like):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"amortize: expected a module that takes the observed values of {len(like)} rows, of shapes "
                f"{[tuple(value.shape) for value in values]}, to ({len(like)}, H), got {got}"
            )
        first = {key: value[0] for key, value in rows_of_params(layer).items()}
        self._read = [key for key in first if not key.endswith(("_slope", "_by_root"))]
        """The tables that the layer gives, the centres of messages as shifts of the mean."""
        self._shapes = [first[key].shape for key in self._read]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.head = nn.Linear(found.shape[-1], sum(self._sizes)).to(like)
        precisions = _prior_precisions(layer, start)
        for key, value in (first | precisions).items():
            self.register_buffer(f"start_{key}", value.to(like).clone())
        with torch.no_grad():
            parts = self.head.bias.split(self._sizes)
            for key, part in zip(self._read, parts, strict=True):
                part.copy_(_weak(key, first, precisions).reshape(-1))

    def _start(self, key: str) -> Tensor:
        found: Tensor = self.get_buffer(f"start_{key}")
        return found

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """The messages of rows by the names of their tables, each ``(B, *)``."""
        flat = self.head(self.body(*values))
        found = {
            key: part.reshape(len(flat), *shape)
            for key, shape, part in zip(self._read, self._shapes, flat.split(self._sizes, -1), strict=True)
        }
        for key in [key for key in found if key.endswith("_centre")]:
            name, shift = key.removesuffix("_centre"), found.pop(key)
            precision = self._start(f"{name}_precision")
            if f"{name}_log_weight" in found:
                pull = (found[f"{name}_log_weight"].exp() + precision) * shift
            else:
                factor = lower_of(found[f"{name}_factor"])
                whole, last = factor @ factor.mT + precision, shift.unsqueeze(-1)
                pull = (whole @ last).squeeze(-1)
            found[f"{name}_slope"] = self._start(f"{name}_slope") + pull
            found[key] = self._start(key).expand_as(shift)
            for end in ("slope_by_root", "log_weight_by_root"):
                if f"start_{name}_{end}" in self._buffers:
                    still = self._start(f"{name}_{end}")
                    found[f"{name}_{end}"] = still.expand(len(flat), *still.shape)
        return found

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


def _prior_precisions(layer: MessageMap, start: Tensor) -> dict[str, Tensor]:
    """The precisions of a row's latents in their priors at a point, zero where none is known."""
    plan, dense, found = layer.plan, torch.zeros_like(start), {}
    by_site = {}
    for site, prior in plan.priors_given(plan.split(start.unsqueeze(0))).items():
        scale = prior[1][0].to(start)
        if plan.priors.joint[site]:
            by_site[site] = torch.cholesky_inverse(scale)
        else:
            dense[plan.places()[site].flatten()] = scale.flatten() ** -2.0
    if plan.block_sizes:
        order = order_of(layer, "block_centre")[1]
        found["block_precision"] = order.by_row(taken(dense, plan.block_places()), 0)[0]
    for i, site in enumerate(plan.joint_sites):
        order = order_of(layer, f"joint_{i}_centre")[1]
        each = by_site[site].expand(*plan.packing.latents[site].free_shape, -1)
        found[f"joint_{i}_precision"] = order.by_row(each.reshape(-1, *each.shape[-2:]), 0)[0]
    return found


def _weak(key: str, first: Mapping[str, Tensor], precisions: Mapping[str, Tensor]) -> Tensor:
    """What the layer gives at first: no shift, and messages that say about as much as the prior does."""
    name, start = key.rsplit("_", 1)[0], first[key]
    if key.endswith("_centre"):
        return torch.zeros_like(start)
    if key == "block_log_weight":
        precision = precisions["block_precision"]
        return torch.where(precision > 0, precision.clamp(min=LEAST_WEIGHT).log(), start)
    if key.endswith("_factor"):
        precision = precisions[f"{name}_precision"].diagonal(dim1=-2, dim2=-1)
        return torch.diag_embed(0.5 * precision.clamp(min=LEAST_WEIGHT).log()).to(start)
    return start
