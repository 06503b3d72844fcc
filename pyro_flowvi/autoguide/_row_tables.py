"""The messages of all rows of a subsampled plate, and those of a page of them in a map."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._ranks import Ranks
from ._coupling import Coupling
from ._fixed import Fixed
from ._joint_messages import JointMessages
from ._message_map import MessageMap
from ._row_layout import Order, RowLayout

__all__ = ["RowTables", "pages_of"]

ELSEWHERE = (
    "rows: expected those whose messages this rank has, got others; call guide.gather_rows() on all ranks "
    "first, or draw what all rows share, with sites="
)
NOTHING = 1e-6
"""Root of the weight of a message that says nothing."""


class _Place(NamedTuple):
    """Where a page's part of a table stands in a map."""

    module: Fixed
    name: str
    dim: int
    order: Order


def _places(layer: MessageMap) -> dict[str, _Place]:
    """The numbers of a page's map that belong to rows, by the names of their tables; looked for once."""
    assert layer.rows is not None
    known: dict[str, _Place] = layer.rows.places
    if not known:
        known |= _find_places(layer, layer.rows)
    return known


def _find_places(layer: MessageMap, rows: RowLayout) -> dict[str, _Place]:
    plan = layer.plan
    found: dict[str, _Place] = {}

    def enter(prefix: str, module: Fixed, name: str, dim: int, order: Order) -> None:
        found[f"{prefix}_{name}"] = _Place(module, name, dim, order)

    blocks = [site for block in plan.blocks for site in block]
    if blocks:
        order = Order(rows.row_of_numbers(blocks))
        for name in ("centre", "slope", "log_weight", "unit"):
            enter("block", layer, name, 0, order)
        for name in ("slope_by_root", "log_weight_by_root"):
            enter("block", layer, name, 1, order)
    for i, (site, joint) in enumerate(zip(plan.joint_sites, layer.joint_messages(), strict=True)):
        numbers = rows.row_of_numbers([site])
        each, latents = Order(numbers), Order(numbers[:: joint.width])
        for name in ("centre", "slope", "factor", "unit"):
            enter(f"joint_{i}", joint, name, 0, latents)
        enter(f"joint_{i}", joint, "slope_by_root", 1, each)
        enter(f"joint_{i}", joint, "log_weight_by_root", 1, latents)
    for place, coupling in enumerate(layer.all_couplings()):
        for j in coupling.links:
            enter(
                f"coupling_{place}", coupling, f"link_{j}", 0, Order(rows.row_of_numbers(plan.blocks[place]))
            )
            enter(f"coupling_{place}", coupling, f"unit_{j}", 0, Order(rows.row_of_numbers(plan.blocks[j])))
        if coupling.links:
            enter(f"coupling_{place}", coupling, "unit", 0, Order(rows.row_of_numbers(plan.blocks[place])))
    return found


def pages_of(size: int, page: int) -> Iterator[tuple[Tensor, int]]:
    """Pages of exactly ``page`` rows, the last ones twice if need be; how many of each are new, its last."""
    for first in range(0, size, page):
        last = min(first + page, size)
        yield torch.arange(last - page, last, device="cpu"), last - first


class RowTables(nn.Module):
    """The messages of N rows: of each tensor of a page's map that has rows a table with a row for each.

    :param layer: the map of a page; its messages are those that the rows start with, again and again.
    :param size: N.
    """

    def __init__(self, layer: MessageMap, size: int) -> None:
        super().__init__()
        self.size, self.num_rows = size, size
        """Rows that have entries here, and N."""
        self.own: Tensor | None = None
        """Which those are, in order, where other ranks have the rest."""
        self.shapes = layer.shapes
        """The flows of the rows' noise, which all pages share."""
        for key, page in rows_of_params(layer).items():
            self.register_parameter(
                key, nn.Parameter(page[torch.arange(size, device=page.device) % len(page)].contiguous())
            )
        for name, param in _shared(layer).items():
            self.register_parameter(name, param)
        self.fixed: dict[str, Tensor] = {}
        """The fixed numbers of a frame; empty outside of one."""
        self.fixed_shared: dict[str, Tensor] = {}

    def table(self, key: str) -> nn.Parameter:
        """One of the tables, ``(N, *)``."""
        found: nn.Parameter = getattr(self, key)
        return found

    # -- ranks ---------------------------------------------------------------------------------

    def at(self, rows: Tensor) -> Tensor:
        """Where the entries of rows are.

        :raises RuntimeError: if they are on another rank.
        """
        if self.own is None:
            return rows
        rows = rows.to(self.own.device)
        found = torch.searchsorted(self.own, rows).clamp(max=max(len(self.own) - 1, 0))
        if not torch.equal(self.own[found], rows):
            raise RuntimeError(ELSEWHERE)
        return found

    @torch.no_grad()
    def keep(self, own: Tensor) -> None:
        """Keeps the entries of some rows, others being on other ranks."""
        self.own, self.size = own, len(own)
        for param in self.by_row():
            param.data = param.data[own].clone()
        self.fixed = {key: value[own].clone() for key, value in self.fixed.items()}

    @torch.no_grad()
    def gather(self, ranks: Ranks) -> None:
        """Brings the entries of all rows to all ranks.

        :raises RuntimeError: if the other ranks are gone.
        """
        if self.own is None:
            return
        if ranks.alone:
            raise RuntimeError(ELSEWHERE)
        owned = ranks.all(self.own)
        order, sizes = torch.cat(owned).argsort(), [len(rows) for rows in owned]
        for param in self.by_row():
            param.data = torch.cat(ranks.join(param.data, sizes))[order]
        self.fixed = {key: torch.cat(ranks.join(value, sizes))[order] for key, value in self.fixed.items()}
        self.own, self.size = None, self.num_rows

    def by_row(self) -> list[nn.Parameter]:
        """The tables: all parameters with an entry for each row."""
        return [param for key, param in self._parameters.items() if param is not None and key not in SHARED]

    # -- a page --------------------------------------------------------------------------------

    @contextmanager
    def given(self, layer: MessageMap, rows: Tensor) -> Iterator[None]:
        """A map with the messages of some rows, with gradients that go to the tables."""
        with gathered(layer, self.of_rows(layer, rows)):
            self._share(layer)
            self._fix(layer, rows)
            yield

    def of_rows(self, layer: MessageMap, rows: Tensor) -> dict[str, Tensor]:
        """The tables' entries of some rows."""
        at = self.at(rows)
        return {key: self.table(key)[at] for key in self._keys(layer)}

    def _keys(self, layer: MessageMap) -> list[str]:
        return [key for key in _places(layer) if key in self._parameters]

    def _share(self, layer: MessageMap) -> None:
        """Gives a map what all pages have in common."""
        layer.shapes = self.shapes
        for name in _shared(layer):
            layer._parameters[name] = self.table(name)

    def _fix(self, layer: MessageMap, rows: Tensor) -> None:
        at = self.at(rows)
        for key, (module, name, dim, order) in _places(layer).items():
            known = self.fixed.get(key)
            put_buffer(module, name, None if known is None else order.as_page(known[at], dim))
        for name in SHARED:
            put_buffer(layer, name, self.fixed_shared.get(name))

    @torch.no_grad()
    def load(self, layer: MessageMap, rows: Tensor) -> None:
        """Puts the messages of some rows into a map, whose tensors stay where they are."""
        self._share(layer)
        at = self.at(rows)
        for key, (module, name, dim, order) in _places(layer).items():
            if key in self._parameters:
                page = order.as_page(self.table(key)[at], dim)
                module._parameters[name].copy_(page)  # type: ignore[union-attr]
        self._fix(layer, rows)

    @torch.no_grad()
    def store(self, layer: MessageMap, rows: Tensor, fresh: Tensor) -> None:
        """Takes over a map's fixed numbers, of those rows of the page that are ``fresh``."""
        kept = fresh.bool().to(rows.device)
        at = self.at(rows[kept])
        for key, (module, name, dim, order) in _places(layer).items():
            value = module._buffers.get(f"fixed_{name}")
            if value is None:
                continue
            page = order.by_row(value, dim)
            if key not in self.fixed:
                self.fixed[key] = page.new_zeros(self.size, *page.shape[1:])
            self.fixed[key][at] = page[kept]
        for name in SHARED:
            value = layer._buffers.get(f"fixed_{name}")
            if value is not None:
                self.fixed_shared[name] = value.clone()

    @torch.no_grad()
    def know_nothing_of_others(self, layer: MessageMap, rows: Tensor) -> None:
        """Gives all other rows messages that say nothing, at the mean of the centres of some."""
        at = self.at(rows)
        others = torch.ones(self.size, dtype=torch.bool, device=at.device)
        others[at] = False
        for key, (_, name, *_) in _places(layer).items():
            known = self.fixed.get(key)
            if known is None:
                continue
            if name == "centre":
                known[others] = known[at].mean(0)
            elif name == "factor":
                known[others] = NOTHING * torch.eye(known.shape[-1]).to(known)
            elif name == "log_weight":
                known[others] = 2.0 * math.log(NOTHING)
            elif not name.startswith("unit"):
                known[others] = 0.0

    # -- frames --------------------------------------------------------------------------------

    def leave_idle_out(self, layer: MessageMap) -> None:
        """Leaves couplings out in which no row has a link, until the frame is left."""
        for place, coupling in enumerate(layer.all_couplings()):
            links = [self.fixed.get(f"coupling_{place}_link_{j}") for j in coupling.links]
            coupling.active = not self.fixed or any(link is not None and bool(link.any()) for link in links)

    @torch.no_grad()
    def zero(self, layer: MessageMap) -> None:
        """Makes the tables corrections that do nothing yet."""
        for key in self._keys(layer):
            self.table(key).zero_()
        for name in _shared(layer):
            self.table(name).zero_()

    @torch.no_grad()
    def forget_frame(self, kept: Mapping[str, Tensor]) -> None:
        """Leaves a frame without a trace of it: the parameters are as they were kept."""
        self.fixed, self.fixed_shared = {}, {}
        for name, param in self.named_parameters():
            param.copy_(kept[name])

    @torch.no_grad()
    def leave_frame(self, layer: MessageMap) -> None:
        """Makes the tables what they and the fixed numbers are together."""
        if not self.fixed:
            return
        places = {key: place for key, place in _places(layer).items() if key in self._parameters}
        found = {key: torch.empty_like(self.table(key)) for key in places}
        shared = {name: param.clone() for name, param in _shared(layer).items()}
        for at, _ in pages_of(self.size, layer.rows.num if layer.rows else self.size):
            rows = at if self.own is None else self.own[at]
            for name, value in shared.items():
                self.table(name).copy_(value)
            self.load(layer, rows)
            layer.leave_frame()
            for key, (module, name, dim, order) in places.items():
                param = module._parameters[name]
                assert param is not None
                found[key][at] = order.by_row(param, dim)
        for key, value in found.items():
            self.table(key).copy_(value)
        self.fixed, self.fixed_shared = {}, {}


SHARED = ("root_loc", "log_root_width")
"""Of the map's own numbers those that all rows share."""


def _shared(layer: MessageMap) -> dict[str, nn.Parameter]:
    return {name: param for name in SHARED if (param := layer._parameters.get(name)) is not None}


def put_buffer(module: Fixed, name: str, value: Tensor | None) -> None:
    """Sets fixed numbers, in the memory that they have already."""
    known = module._buffers[f"fixed_{name}"]
    if known is None or value is None or known.shape != value.shape:
        module._buffers[f"fixed_{name}"] = None if value is None else value.clone()
    else:
        known.copy_(value)


@contextmanager
def gathered(layer: MessageMap, values: dict[str, Tensor]) -> Iterator[None]:
    """A map with values ``(B, *)`` by row in place of its parameters."""
    places = _places(layer)
    for key, value in values.items():
        module, name, dim, order = places[key]
        module.__dict__[name] = order.as_page(value, dim)  # found before the parameter of the name
    try:
        yield
    finally:
        for key in values:
            del places[key].module.__dict__[places[key].name]


def rows_of_params(layer: MessageMap) -> dict[str, Tensor]:
    """A page's messages by row, ``(B, *)``, by the names of their tables."""
    return {
        key: order.by_row(param.detach(), dim)
        for key, (module, name, dim, order) in _places(layer).items()
        if (param := module._parameters.get(name)) is not None
    }


def moving_param(layer: MessageMap, key: str) -> nn.Parameter:
    """A page's part of a table, in its map."""
    module, name, *_ = _places(layer)[key]
    found = module._parameters[name]
    assert found is not None
    return found


def order_of(layer: MessageMap, key: str) -> tuple[int, Order]:
    """Along which dimension of :func:`moving_param` rows stand, and how."""
    place = _places(layer)[key]
    return place.dim, place.order


def fixed_of_rows(layer: MessageMap) -> list[Tensor]:
    """The fixed numbers of a page in its map."""
    found = (module._buffers.get(f"fixed_{name}") for module, name, *_ in _places(layer).values())
    return [value for value in found if value is not None]


def trained_in_frame(layer: MessageMap) -> list[str]:
    """The tables that are trained while their map is in a frame."""
    return [
        key
        for key, (module, name, *_) in _places(layer).items()
        if isinstance(module, (Coupling, JointMessages, MessageMap))
        and name in module._parameters
        and name != "centre"
        and not name.endswith("_by_root")
    ]
