"""Rows whose messages a network reads off their data."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.utils import _pytree as pytree

from .._program.rows import RowPlate, find_row_plate, noting_plates, rows_in, showing
from .._program.sites import is_computed, latent_sites
from .._shapes import broadcast_shapes
from .._types import Program, Trace
from ._encoder import Encoder
from ._pages import Call, View
from ._row_draws import Rows

__all__ = ["AmortisedRows", "find_data_plate", "first_values", "has_data_of", "reads_rows"]


def find_data_plate(model: Program, call: Call, init: Any) -> tuple[RowPlate, Tensor]:
    """The plate whose rows a network reads, and the rows that a run shows.

    :raises ValueError: if there is no plate with latents and data.
    """
    with torch.random.fork_rng(), poutine.block(), torch.no_grad(), noting_plates() as told:
        trace = poutine.trace(InitMessenger(init)(model)).get_trace(*call[0], **call[1])
    plate = find_row_plate(trace, told)
    if plate is not None:
        known = plate.given or reads_rows(model, call, init, plate)
        return replace(plate, known=known), rows_in(trace, plate)
    latents = dict(latent_sites(trace))
    seen = {
        frame
        for node in trace.nodes.values()
        if node["type"] == "sample" and node["is_observed"]
        for frame in node["cond_indep_stack"]
    }
    held = {
        frame: sum(frame in site["cond_indep_stack"] for site in latents.values())
        for frame in seen
        if frame.vectorized
    }
    held = {frame: count for frame, count in held.items() if count}
    if not held:
        raise ValueError(
            "amortize: expected a model with a plate that holds latents and the data of each, got "
            f"{'none' if not seen else 'plates with data alone'}"
        )
    frame = max(held, key=lambda frame: (held[frame], -(frame.dim or 0)))
    assert frame.dim is not None
    plate = RowPlate(frame.name, frame.size, frame.size, frame.dim, given=False, known=False)
    return plate, torch.arange(plate.shown)


def observed_nodes(trace: Trace, plate: RowPlate) -> list[Any]:
    """The observed sites under a plate; what the model computes from latents is no data to be read."""
    return [
        node
        for node in trace.nodes.values()
        if node["type"] == "sample"
        and node["is_observed"]
        and plate.holds(node["cond_indep_stack"])
        and not is_computed(node)
    ]


def observed(trace: Trace, plate: RowPlate) -> list[Tensor]:
    """The observed values under a plate, each with the rows in front."""
    found = []
    for node in observed_nodes(trace, plate):
        value = torch.as_tensor(node["value"])
        value = value.expand(broadcast_shapes(value.shape, node["fn"].batch_shape + node["fn"].event_shape))
        axis = value.dim() - node["fn"].event_dim + plate.dim
        found.append(value.movedim(axis, 0).to(torch.get_default_dtype()))
    return found


class _Reading:
    """Where observed values are among the model's arguments, so that these need no run to be read.

    :param places: of each observed site the number of the argument's leaf, and the axis of its rows.
    :param size: of the plate, as its scale counts it.
    """

    def __init__(self, places: list[tuple[int, int]], size: int) -> None:
        self._places, self.size = places, size

    def read(self, leaves: Sequence[Any]) -> list[Tensor]:
        """The values, each with the rows in front."""
        return [leaves[i].movedim(axis, 0).to(torch.get_default_dtype()) for i, axis in self._places]


def _find_reading(trace: Trace, plate: RowPlate, leaves: Sequence[Any], size: int) -> _Reading | None:
    """None if an observed value is computed."""
    places = []
    for node in observed_nodes(trace, plate):
        value, fn = node["value"], node["fn"]
        place = next((i for i, leaf in enumerate(leaves) if leaf is value), None)
        if place is None or value.shape != fn.batch_shape + fn.event_shape:
            return None
        places.append((place, value.dim() - fn.event_dim + plate.dim))
    return _Reading(places, size)


def _kind_of(leaves: Sequence[Any]) -> tuple[Any, ...] | None:
    """What of arguments decides whether they are read alike; None if that is their values."""
    for leaf in leaves:
        if not leaf.dim() if isinstance(leaf, Tensor) else not isinstance(leaf, Hashable):
            return None
    return tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def reads_rows(model: Program, call: Call, init: Any, plate: RowPlate) -> bool:
    """Whether what a run observes depends on the rows that its plate draws."""
    values = []
    with torch.random.fork_rng(), poutine.block(), torch.no_grad():
        for first in (0, plate.size - plate.shown):
            rows = torch.arange(first, first + plate.shown)
            program = showing(InitMessenger(init)(model), plate, rows, None)
            values.append(observed(poutine.trace(program).get_trace(*call[0], **call[1]), plate))
    return any(not torch.equal(one, other) for one, other in zip(*values, strict=True))


def has_data_of(call: Call, plate: RowPlate) -> bool:
    """Whether an argument is as long as the rows that a run shows, and not as all."""
    leaves = pytree.tree_leaves((tuple(call[0]), dict(call[1])))
    return any(isinstance(leaf, Tensor) and plate.shown in leaf.shape[:1] for leaf in leaves)


class AmortisedRows(Rows):
    """Rows whose messages come from a network, and from corrections by index where rows are known."""

    follows_roots, rows_may_meet = False, True

    def __init__(self, plate: RowPlate, by_prior: bool, scale: float) -> None:
        # Where rows are not known, they are those of the last data.
        super().__init__(plate if plate.known else replace(plate, size=plate.shown), by_prior, scale)
        self._scales: dict[str, float | Tensor] = {}
        self._values: list[Tensor] = []
        """The observed values of the last call's rows."""
        self._call: Call | None = None
        self._size = plate.size
        """Of the plate, as the last call's scale counts it."""
        self._shown: View | None = None
        """The view of the last call's rows."""
        self._readings: dict[Any, _Reading] = {}

    def __getstate__(self) -> dict[str, Any]:
        shown = self._views[:1] if self._shown is None else [self._shown]
        return {**super().__getstate__(), "_views": shown, "_call": None, "_readings": {}}

    def run(self, guide: Any, call: Call, rows: Tensor | None = None) -> Trace:
        """A run of the model, of some rows or those that it shows by itself."""
        model = guide._require_model()
        if rows is not None:
            model = showing(model, self.plate, rows, None)
        with guide._apart():
            try:
                return poutine.trace(model).get_trace(*call[0], **call[1])
            except NotImplementedError:  # a prior that cannot be drawn from
                return poutine.trace(InitMessenger(guide._init_fn)(model)).get_trace(*call[0], **call[1])

    def encoder(self, guide: Any) -> Encoder:
        """The network."""
        found: Encoder = guide._flow.encoder
        return found

    def new_view(self, guide: Any, call: Call, rows: Tensor) -> View:
        made = super().new_view(guide, call, rows)
        if self._views:  # all pages share the flows of their noise, however short they are
            first = self.first_view().layer
            made.layer.shapes, made.layer.shaped = first.shapes, first.shaped
        return made

    def show(self, guide: Any, call: Call) -> tuple[Any, View, Tensor]:
        if self.plate.known:
            plates, view, rows = super().show(guide, call)
            self._call, self._shown = call, view
            trace = self.run(guide, call, None if self.plate.given else rows)
            self._values = observed(trace, self.plate)
            return plates, view, rows
        if not (call[0] or call[1]) and self._values:  # those of the last call
            count, size = len(self._values[0]), self._size
        else:
            size = self._read(guide, call)
            count, self._size, self._call = len(self._values[0]), size, call
        rows = torch.arange(count)
        plates = self._plates(guide, call, size, count)
        self.plate = replace(self.plate, size=count, shown=count)
        assert self._call is not None
        self._shown = self.view(guide, self._call, rows)
        self._shown.page.turn_to(rows, call if call[0] or call[1] else None)
        return plates, self._shown, rows

    def _read(self, guide: Any, call: Call) -> int:
        """Takes the values of a call, with a run of the model if need be; the size of its plate."""
        leaves = pytree.tree_leaves((tuple(call[0]), dict(call[1])))
        kind = _kind_of(leaves)
        known = None if kind is None else self._readings.get(kind)
        if known is not None:
            self._values = known.read(leaves)
            return known.size
        trace = self.run(guide, call)
        self._values = observed(trace, self.plate)
        nodes = [node for _, node in latent_sites(trace) if self.plate.holds(node["cond_indep_stack"])]
        frame = next(frame for frame in nodes[0]["cond_indep_stack"] if frame.name == self.plate.name)
        size = int(frame.full_size or frame.size)
        self._scales = {node["name"]: node["scale"] / (size / frame.size) for node in nodes}
        # A scale may be another at each call, as while one is annealed.
        plain = all(isinstance(scale, float) and scale == 1.0 for scale in self._scales.values())
        found = _find_reading(trace, self.plate, leaves, size) if plain and kind is not None else None
        if found is not None:
            self._readings[kind] = found
        return size

    def _plates(self, guide: Any, call: Call, size: int, count: int) -> Any:
        """The guide's plates, of which that of the rows is as long as these data."""
        if guide.master is not None or guide.create_plates is not None:
            return guide._create_plates(*call[0], **call[1])
        return self.plates_with(guide, call, size, subsample_size=count)

    def scale_of(self, site: str) -> float | Tensor:
        return self._scales.get(site, 1.0)

    def messages(self, guide: Any, view: View, rows: Tensor) -> AbstractContextManager[None]:
        tables = self.tables(guide) if self.plate.known else None
        corrections = None if tables is None else tables.of_rows(view.layer, rows)
        return self.encoder(guide).given(view.layer, self._values, corrections)

    # -- draws ---------------------------------------------------------------------------------

    def parts(self, guide: Any, rows: Tensor) -> Iterator[tuple[View, int, Tensor]]:
        view = self._shown or self.first_view()
        if not self.plate.known:
            if len(rows) != view.size:
                raise ValueError(
                    f"rows: expected None or all of the {view.size} rows of the last data, got {len(rows)}"
                )
            if self._call is not None:  # new rows may have been shown since
                view.page.turn_to(rows, self._call)
            with self.messages(guide, view, rows):
                yield view, view.size, rows
            return
        if self._call is None:
            raise RuntimeError("rows: a copy does not keep their data; call the guide with data first")
        shown = self._last is not None and torch.equal(rows, self._last)
        if not (shown or self.chooses(self._call)):
            raise RuntimeError(
                f"plate {self.plate.name!r}: expected `rows=` to be those of the last batch, got others, "
                "whose data a network would have to read; draw the latents outside with `sites=`, and "
                "those of rows with their batch, `guide(*batch)`"
            )
        for some in rows.split(view.size):
            page = torch.cat([some, some[:1].expand(view.size - len(some))])
            call = self.call_with(self._call, page)
            self._values = observed(self.run(guide, call, None if self.plate.given else page), self.plate)
            view.page.turn_to(page, call)
            with self.messages(guide, view, page):
                yield view, len(some), page

    def sample_new(self, guide: Any, num: int, call: Call, sites: Sequence[str] | None) -> dict[str, Tensor]:
        wanted, roots = self.check_sites(sites), guide.draw_roots(num)
        found = {site: [value] for site, value in self.first_view().constrained_roots(roots).items()}
        for rows in self._new_pages(guide, call):
            values = observed(self.run(guide, call, rows), self.plate)
            rows = torch.arange(len(values[0])) if rows is None else rows
            view = self.view(guide, call, rows)
            view.page.turn_to(rows, call)
            with self.encoder(guide).given(view.layer, values, None):
                drawn = view.draw_rows(roots, torch.randn(num, view.packing.dim).to(roots))
            for site in drawn:
                found.setdefault(site, []).append(view.packing.latents[site].constrain(drawn[site][0])[0])
        axis = self.first_view().axis
        return {site: torch.cat(found[site], 1 + axis.get(site, -1)) for site in wanted}

    def _new_pages(self, guide: Any, call: Call) -> Sequence[Tensor | None]:
        """The rows of other data, page by page; None for those that the data are of."""
        if self.plate.given or not self.plate.known:
            return [None]
        pages: Sequence[Tensor] = torch.arange(self.count_rows(guide, call)).split(self.plate.shown)
        return pages


def first_values(rows: AmortisedRows, guide: Any, call: Call, shown: Tensor | None) -> list[Tensor]:
    """The observed values at set-up.

    :raises ValueError: if there are none.
    """
    rows._call, values = call, observed(rows.run(guide, call, shown), rows.plate)
    rows._values = values
    if not values:
        raise ValueError(
            f"amortize: expected observed sites in the plate {rows.plate.name!r}, whose data a network can "
            "read, got none"
        )
    return values
