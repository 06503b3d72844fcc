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
NO_PRIOR = 1e-12
"""Precision that stands for that of an unknown prior."""


class _Unit(nn.Module):
    """Features less the mean of the first data, in units of their standard deviation there."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        loc, spread = features.mean(0), features.std(0, correction=0)
        varies = spread > 1e-6 * (1.0 + loc.abs())
        # Parameters, as the param store knows no buffers.
        self.loc = nn.Parameter(loc)
        self.log_scale = nn.Parameter(torch.where(varies, spread, 1.0).log())

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.loc) * (-self.log_scale).exp()


class RowNetwork(nn.Module):
    """The network of ``amortize="auto"``: two hidden layers on the observed values of a row.

    Each value enters as it is and as its area hyperbolic sine, in which counts are spread evenly, both less
    the mean of the first data and in units of their standard deviation.  Where the first data miss values,
    as NaN, it is told which are there.

    :param values: the observed values of some rows, ``(B, *)`` of each site.

    Example::

        >>> RowNetwork([torch.randn(10, 3)])(torch.randn(2, 3)).shape
        torch.Size([2, 64])
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        super().__init__()
        self._some_miss = any(bool(value.isnan().any()) for value in values)
        features = self._features(values)
        self.unit = _Unit(features)
        count = features.shape[-1]
        width = min(WIDTHS[1], max(WIDTHS[0], count // 2))
        self.layers = nn.Sequential(nn.Linear(count, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def _features(self, values: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([value.reshape(len(value), -1) for value in values], -1)
        missing = [flat.isnan().to(flat)] if self._some_miss else []
        flat = flat.nan_to_num(0.0, 0.0, 0.0)
        return torch.cat([flat, flat.asinh(), *missing], -1)

    def forward(self, *values: Tensor) -> Tensor:
        """A description of each row, ``(B, H)``."""
        found: Tensor = self.layers(self.unit(self._features(values)))
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
        self._read = [key for key in first if not key.endswith("_slope")]
        """The tables that the layer gives, the centres of messages as shifts of the mean."""
        self._shapes = [first[key].shape for key in self._read]
        self._sizes = [shape.numel() for shape in self._shapes]
        # Small numbers are learned from slowly; those of the network above are many.
        self.unit = nn.Identity() if isinstance(self.body, RowNetwork) else _Unit(found)
        self.head = nn.Linear(found.shape[-1], sum(self._sizes)).to(like)
        precisions = _prior_precisions(layer, start)
        # Parameters, as the param store knows no buffers.
        self.centres = nn.ParameterDict(
            {key: value.to(like) for key, value in first.items() if key.endswith("_centre")}
        )
        self.log_precisions = nn.ParameterDict(
            {key: (value + NO_PRIOR).log().to(like) for key, value in precisions.items()}
        )
        with torch.no_grad():
            for key, part in zip(self._read, self.head.bias.split(self._sizes), strict=True):
                part.copy_(_weak(key, first[key], precisions).reshape(-1))

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """The messages of rows by the names of their tables, each ``(B, *)``."""
        flat = self.head(self.unit(self.body(*values)))
        found = {
            key: part.reshape(len(flat), *shape)
            for key, shape, part in zip(self._read, self._shapes, flat.split(self._sizes, -1), strict=True)
        }
        for key, centre in self.centres.items():
            name, shift = key.removesuffix("_centre"), found[key]
            pull = self.log_precisions[name].exp() * shift
            if f"{name}_log_weight" in found:
                pull = pull + found[f"{name}_log_weight"].exp() * shift
            else:
                factor = lower_of(found[f"{name}_factor"])
                pull = pull + (factor @ (factor.mT @ shift.unsqueeze(-1))).squeeze(-1)
            found[f"{name}_slope"] = pull
            found[key] = centre.expand_as(shift)
        return found

    @contextmanager
    def given(
        self, layer: MessageMap, values: Sequence[Tensor], corrections: dict[str, Tensor] | None
    ) -> Iterator[None]:
        """A map with the messages of rows with these data.

        :param corrections: what the rows have of their own, to be added.
        """
        found = self(*(value.to(self.head.weight) for value in values))
        if corrections is not None:
            found = {key: value + corrections[key] for key, value in found.items()}
        with gathered(layer, found):
            yield


def _prior_precisions(layer: MessageMap, start: Tensor) -> dict[str, Tensor]:
    """By message the precisions of a row's latents in their priors at a point, zero where none is known."""
    plan, whole, found = layer.plan, torch.zeros_like(start), {}
    for prior in plan.priors_at(start.unsqueeze(0)):
        scale = prior.scale[0].to(start)
        precision = scale.square().reciprocal()
        if prior.joint:
            precision = torch.cholesky_inverse(scale).diagonal(dim1=-2, dim2=-1)
        whole[prior.places.flatten()] = precision.expand(prior.places.shape).flatten()
    places = {"block": plan.block_places()} if plan.block_sizes else {}
    places |= {f"joint_{i}": where for i, where in enumerate(plan.joint_places())}
    for name, where in places.items():
        dim, order = order_of(layer, f"{name}_centre")
        found[name] = order.by_row(taken(whole, where), dim)[0]
    return found


def _weak(key: str, start: Tensor, precisions: Mapping[str, Tensor]) -> Tensor:
    """What the layer gives at first: no shift, and messages that say about as much as the prior does."""
    if key.endswith("_centre"):
        return torch.zeros_like(start)
    if key.endswith("_log_weight"):
        precision = precisions[key.removesuffix("_log_weight")]
        return torch.where(precision > 0, precision.clamp(min=LEAST_WEIGHT).log(), start)
    if key.endswith("_factor"):
        precision = precisions[key.removesuffix("_factor")]
        return torch.diag_embed(0.5 * precision.clamp(min=LEAST_WEIGHT).log()).to(start)
    return start
