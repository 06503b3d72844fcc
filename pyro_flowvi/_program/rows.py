"""The subsampled plate that latents stand under, and the model of a page of its rows."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .._types import Program, Trace
from .pyro_private import subsampling_replaced
from .sites import latent_sites
from .structure import is_subsampled

__all__ = [
    "RowPlate",
    "check_rows_known",
    "find_row_plate",
    "noting_plates",
    "per_row",
    "rows_in",
    "rows_said",
    "showing",
]


@dataclass(frozen=True)
class RowPlate:
    """A plate that shows some of its rows at each run, with latents under it."""

    name: str
    size: int
    """N, the rows that there are."""
    shown: int
    """B, those that one run shows."""
    dim: int
    given: bool
    """Whether the model says which rows it shows, with ``subsample=``; else they are drawn at each run."""
    known: bool = True
    """Whether it is known which of all rows a run shows; else they are those of the data that it is given."""

    @property
    def data_change(self) -> bool:
        """Whether a run's arguments have the rows, or their data."""
        return self.given or not self.known

    def holds(self, stack: tuple[CondIndepStackFrame, ...]) -> bool:
        """Whether a site with these plates has something for each row."""
        return any(frame.name == self.name for frame in stack)


def find_row_plate(trace: Trace, seen: Mapping[str, bool]) -> RowPlate | None:
    """The subsampled plate of a trace that latents stand under; None if there is none.

    :param trace: of the model, with the sites by which plates choose their rows.
    :param seen: by plate whether the model itself said which rows.
    :raises ValueError: for latents under two subsampled plates, or one that was made before the run.
    """
    found: dict[str, tuple[str, CondIndepStackFrame]] = {}
    for name, site in latent_sites(trace):
        frames = [frame for frame in site["cond_indep_stack"] if is_subsampled(frame)]
        if len(frames) > 1:
            names = " and ".join(repr(frame.name) for frame in frames)
            raise ValueError(
                f"site {name!r}: expected one subsampled plate, got {names}, crossed: a pair of rows is seen "
                "too seldom to be learned; subsample one of them and show the other in full"
            )
        for frame in frames:
            found.setdefault(frame.name, (name, frame))
    if len(found) > 1:
        (one, _), (other, _) = list(found.values())[:2]
        raise ValueError(
            f"sites {one!r} and {other!r}: expected latents under one subsampled plate, got "
            f"{sorted(found)}; subsample one of them and show the other in full"
        )
    for site, frame in found.values():
        if frame.name not in trace.nodes:
            raise ValueError(
                f"site {site!r}: expected a subsampled plate that is made at each run of the model, got "
                f"{frame.name!r}, made outside, which shows the same rows at each step; write "
                f"`with pyro.plate({frame.name!r}, {frame.full_size}, subsample_size={frame.size})` in it"
            )
        assert frame.full_size is not None
        assert frame.dim is not None
        return RowPlate(frame.name, frame.full_size, frame.size, frame.dim, seen.get(frame.name, False))
    return None


def check_rows_known(model: Program, guide: Program, call: tuple[Any, Mapping[str, Any]]) -> None:
    """Refuses latents of a batch's rows where the model does not say which rows these are.

    :raises ValueError: naming the site.
    """
    with torch.random.fork_rng(), poutine.block(), torch.no_grad():
        drawn = poutine.trace(guide).get_trace(*call[0], **call[1])
        trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*call[0], **call[1])
    for name, site in latent_sites(trace):
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        own = math.prod(frame.full_size / frame.size for frame in frames if is_subsampled(frame))
        scale = float(torch.as_tensor(site["scale"]).max()) / own
        if frames and scale > 1.0 + 1e-6:
            plate = frames[0].name
            raise ValueError(
                f"site {name!r}: expected latents of rows that are known, got batches in which they stand "
                f"for others (scaled by {scale:g}), and nothing that says which rows they are of; write "
                f"`with pyro.plate({plate!r}, N, subsample=index)` in the model, with the index of each "
                "batch among its arguments, or draw latents from data, with the guide's `amortize=`"
            )


def per_row(weights: Tensor, plate: RowPlate) -> Tensor:
    """Weights ``(B,)`` in a shape that stands against densities under the plate."""
    return weights.reshape(-1, *[1] * (-plate.dim - 1))


class _Weighted(Messenger):
    """Multiplies densities under a plate by a weight for each row."""

    def __init__(self, plate: RowPlate, weights: Tensor) -> None:
        super().__init__()
        self._plate, self._weights = plate, weights

    def _pyro_sample(self, msg: Any) -> None:
        if self._plate.holds(msg["cond_indep_stack"]):
            msg["scale"] = per_row(self._weights, self._plate) * msg["scale"]


def showing(model: Program, plate: RowPlate, rows: Tensor | None, weights: Tensor | None) -> Program:
    """The model with a plate that consists of some rows alone: subsampled no longer, and not scaled.

    :param rows: which; None for those that the model itself says.
    :param weights: by which the densities of each are multiplied, ``(B,)``; None for one.
    """

    def shown(*args: Any, **kwargs: Any) -> Any:
        with subsampling_replaced(plate.name, rows):
            if weights is None:
                return model(*args, **kwargs)
            with _Weighted(plate, weights):
                return model(*args, **kwargs)

    return shown


class _Noting(Messenger):
    """Notes which plates are told which rows to show."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, bool] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.told[msg["name"]] = msg["value"] is not None


@contextmanager
def noting_plates() -> Iterator[dict[str, bool]]:
    """By plate of the models that run in this context whether they say themselves which rows it shows."""
    with _Noting() as noting:
        yield noting.told


class _Found(BaseException):  # no model catches it
    """Ends a run of a model once the rows are known."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows


class _Finding(Messenger):
    def __init__(self, plate: RowPlate) -> None:
        super().__init__()
        self._plate = plate

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] == self._plate.name:
            raise _Found(torch.arange(self._plate.size) if msg["value"] is None else msg["value"])


def rows_said(model: Program, plate: RowPlate, *args: Any, **kwargs: Any) -> Tensor:
    """The rows that a model says it shows; it is run no further than to its plate.

    :raises KeyError: if it has no such plate.
    """
    try:
        with _Finding(plate):
            model(*args, **kwargs)
    except _Found as found:
        return torch.as_tensor(found.rows).long()
    raise KeyError(plate.name)


def rows_in(trace: Trace, plate: RowPlate) -> Tensor:
    """The rows that a run has shown."""
    return torch.as_tensor(trace.nodes[plate.name]["value"]).long()
