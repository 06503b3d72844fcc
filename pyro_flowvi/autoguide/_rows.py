"""What a guide draws where its model has latents under a subsampled plate: messages, by indices."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.utils import _pytree as pytree

from .._program.log_density import UnconstrainedModel
from .._program.rows import RowPlate, find_row_plate, noting_plates, rows_in, rows_said, showing
from .._program.sites import latent_sites
from .._shapes import broadcast_shapes
from .._types import Program
from ._pages import Call, Page, View, rows_that_see_others, same_shapes
from ._row_tables import RowTables

__all__ = ["RowPages", "find_rows"]


def find_rows(model: Program, call: Call, init: Any) -> tuple[RowPlate, Tensor] | None:
    """The subsampled plate under which a model has latents, and rows of it; None if there is none.

    :raises ValueError: where no guide can serve it, with the way out.
    """

    def run() -> tuple[Any, dict[str, bool]]:
        with noting_plates() as told:
            return poutine.trace(InitMessenger(init)(model)).get_trace(*call[0], **call[1]), told

    with torch.random.fork_rng(), poutine.block(), torch.no_grad():
        trace, told = run()
        plate = find_row_plate(trace, told)
        if plate is None:
            return None
        shown = rows_in(trace, plate)
        if not plate.given:
            return plate, shown
        torch.manual_seed(1)
        again, _ = run()
    if torch.equal(shown, rows_in(again, plate)):
        return plate, shown
    raise ValueError(
        f"plate {plate.name!r}: expected the indices of `subsample=` from the model's arguments, got other "
        "ones at each run, which the guide cannot know; let the plate draw them, with `with pyro.plate("
        f"{plate.name!r}, {plate.size}, subsample_size={plate.shown}) as rows`"
    )


def _device_of_latents(model: Program, call: Call, init: Any) -> torch.device | None:
    with torch.random.fork_rng(), poutine.block(), torch.no_grad():
        trace = poutine.trace(InitMessenger(init)(model)).get_trace(*call[0], **call[1])
    return next((site["value"].device for _, site in latent_sites(trace)), None)


class RowPages:
    """The rows of a guide's subsampled plate.

    :param plate: the plate.
    :param by_prior: whether rows are drawn by the model's priors.
    :param scale: standard deviation that a message alone has at first.
    """

    follows_roots: ClassVar[bool] = True
    """Whether messages may move with the roots."""
    rows_may_meet: ClassVar[bool] = False
    """Whether a row may depend on the data of others in its page, as by a batch norm."""

    def __init__(self, plate: RowPlate, by_prior: bool, scale: float) -> None:
        self.plate, self._by_prior, self._scale = plate, by_prior, scale
        self._views: list[View] = []
        self._leaves: list[list[Any]] = []
        """The arguments that each view was made with."""
        self._place: int | None = None
        """Which of the arguments' leaves is the rows, if one is."""
        self._shows_all = False
        self._last: Tensor | None = None
        """The rows of the last call."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": self._views[:1], "_leaves": [[]]}

    # -- pages ---------------------------------------------------------------------------------

    def forget_views(self) -> None:
        """Drops what is known of the model at the arguments so far."""
        self._views, self._leaves = [], []

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves the maps to another device or dtype."""
        for view in self._views:
            view.layer._apply(fn)

    def set_active(self, guide: Any, shaped: bool) -> None:
        """Says of all maps whether noise of rows goes through flows of its own, and leaves idle links out."""
        for view in self._views:
            view.layer.shaped = shaped
            self.tables(guide).leave_idle_out(view.layer)

    def first_view(self) -> View:
        """That of set-up, by which rows are drawn later."""
        return self._views[0]

    def view(self, guide: Any, call: Call, rows: Tensor) -> View:
        """That of pages of so many rows and such arguments, which is made where there is none yet."""
        leaves = pytree.tree_leaves((tuple(call[0]), dict(call[1])))
        for known, view in zip(self._leaves, self._views, strict=True):
            if view.size == len(rows) and (not self.plate.data_change or same_shapes(known, leaves)):
                return view
        made = self.new_view(guide, call, rows)
        self._views.append(made)
        self._leaves.append(leaves)
        return made

    def fits(self, call: Call) -> bool:
        """Whether the view of set-up can show a batch."""
        leaves = pytree.tree_leaves((tuple(call[0]), dict(call[1])))
        return same_shapes(self._leaves[0], leaves)

    def new_view(self, guide: Any, call: Call, rows: Tensor) -> View:
        """A view beside those that are there."""
        dtype = guide._placement[1] or torch.get_default_dtype()
        model, plate = guide._require_model(), self.plate
        if self._views:
            first = self.first_view().page
            device, rows = first.weights.device, rows.to(first.rows.device)
        else:
            shown = showing(model, plate, None if plate.given else rows, None)
            device = _device_of_latents(shown, call, guide._init_fn) or rows.device
        page = Page(model, plate, call, rows, dtype, device)
        assert page.program is not None
        density = UnconstrainedModel(page.program, *page.call, guide._init_fn, changing=page.tensors)
        if density.packing.left_out:
            site = next(iter(density.packing.left_out))
            raise ValueError(
                f"site {site!r}: expected latents that a density touches under the subsampled plate "
                f"{plate.name!r}, got masked ones; mask the observations alone"
            )
        view = View(page, plate, density, self._by_prior, self._scale, self.follows_roots, guide._placement)
        if not self.rows_may_meet and not self._views and rows_that_see_others(view):
            raise ValueError(
                f"plate {plate.name!r}: expected rows that are independent given the latents outside, got "
                "latents or data that depend on other rows of the plate, which a part of them does not "
                "show; write the plate without subsampling, or with whole groups as its rows"
            )
        return view

    def chooses(self, call: Call) -> bool:
        """Whether all rows can be shown, of any order: the arguments tell which, and hold the data of all."""
        if not self.plate.given:
            return True
        if self._place is None:
            return False
        leaves = pytree.tree_leaves((tuple(call[0]), dict(call[1])))
        others = (leaf for i, leaf in enumerate(leaves) if i != self._place)
        shown = len(leaves[self._place])
        return all(not isinstance(leaf, Tensor) or shown not in leaf.shape[:1] for leaf in others)

    def call_with(self, call: Call, rows: Tensor) -> Call:
        """The arguments that tell other rows."""
        if not self.plate.given or self._place is None:
            return call
        leaves, spec = pytree.tree_flatten((tuple(call[0]), dict(call[1])))
        leaves[self._place] = rows.to(leaves[self._place])
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return args, kwargs

    def find_place(self, call: Call, rows: Tensor) -> None:
        """Finds the argument that is the rows."""
        for i, leaf in enumerate(pytree.tree_leaves((tuple(call[0]), dict(call[1])))):
            if isinstance(leaf, Tensor) and leaf.shape == rows.shape and torch.equal(leaf.long(), rows):
                self._place = i
                return

    def rows_of(self, guide: Any, call: Call) -> Tensor:
        """The rows that the model says itself, or those of the last call where it cannot run."""
        if self._place is not None:
            leaves = pytree.tree_leaves((tuple(call[0]), dict(call[1])))
            if len(leaves) > self._place and isinstance(leaves[self._place], Tensor):
                told: Tensor = leaves[self._place].long()
                return told
        try:
            with guide._apart():
                nodes = guide.prototype_trace.nodes
                outside = {site: nodes[site]["value"] for site in self.first_view().structure.roots}
                model = poutine.condition(guide._require_model(), data=outside)  # draws no random numbers
                found = rows_said(model, self.plate, *call[0], **call[1])
        except Exception:
            if self._last is None or call[0] or call[1]:
                raise
            return self._last
        return found

    # -- a call of the guide -------------------------------------------------------------------

    def plates_of(self, guide: Any, args: Any, kwargs: Any) -> Any:
        """The guide's plates, with the rows that the model shows in this step."""
        ours = guide.master is None and self.plate.given and guide.create_plates is None
        if not ours:
            return guide._create_plates(*args, **kwargs)
        call: Call = (args, kwargs)
        return self.plates_with(guide, call, self.plate.size, subsample=self.rows_of(guide, call))

    def plates_with(self, guide: Any, call: Call, size: int, **options: Any) -> Any:
        """The guide's plates, with one of a size and options in the place of the rows'."""
        own = guide.create_plates
        guide.create_plates = lambda *_, **__: pyro.plate(
            self.plate.name, size, dim=self.plate.dim, **options
        )
        try:
            return guide._create_plates(*call[0], **call[1])
        finally:
            guide.create_plates = own

    @contextmanager
    def showing_all(self) -> Iterator[None]:
        """Within it a call of the guide draws all rows, in a plate that is not subsampled."""
        self._shows_all = True
        try:
            yield
        finally:
            self._shows_all = False

    def show(self, guide: Any, call: Call) -> tuple[Any, View, Tensor]:
        """The guide's plates in a step, the view of its page, and the rows that it shows."""
        if self._shows_all:
            rows = torch.arange(self.plate.size)
            return self.plates_with(guide, call, len(rows)), self.view(guide, call, rows), rows
        plates = self.plates_of(guide, *call)
        rows = torch.as_tensor(plates[self.plate.name].indices).long()
        self._last = rows
        # Without arguments, or with rows that the guide chooses, any page of so many rows will do.
        fitting = (view for view in self._views if view.size == len(rows))
        known = None if self.plate.given and (call[0] or call[1]) else next(fitting, None)
        view = known or self.view(guide, call, rows)
        view.page.turn_to(rows, call)
        return plates, view, rows

    def messages(self, guide: Any, view: View, rows: Tensor) -> AbstractContextManager[None]:
        """A context in which a page's map has the messages of some rows."""
        return self.tables(guide).given(view.layer, rows)

    def scale_of(self, site: str) -> float | Tensor:
        """By how much the model scales a row's latents, beside what its plate does."""
        return 1.0

    def call(self, guide: Any, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Draws the latents outside and those of the rows of this step, as sites of Pyro."""
        plates, view, rows = self.show(guide, (args, kwargs))
        latent = guide.sample_latent(*args, **kwargs)
        batch = latent.shape[:-1]
        roots = latent[..., : len(view.root_places)].reshape(math.prod(batch), -1)
        with self.messages(guide, view, rows):
            x = torch.randn(len(roots), view.packing.dim).to(roots)
            local = view.draw_rows(roots, x)
        outside = view.split_roots(roots)
        drawn = {}
        mask = poutine.get_mask()
        for site, known in view.packing.latents.items():
            free, log_q = local[site] if site in local else (outside[site], None)
            batch_dim = len(known.shape) - known.fn.event_dim
            shape = known.free_shape
            event = [1] * (len(shape) - batch_dim)
            free = free.reshape(broadcast_shapes(shape, (*batch, *event)))
            value, log_det = known.constrain(free)
            density: Tensor | float = -log_det
            if log_q is not None:
                density = density + log_q.reshape(broadcast_shapes(shape[:batch_dim], batch))
            with ExitStack() as stack:
                for frame in guide._cond_indep_stacks[site]:
                    stack.enter_context(plates[frame.name])
                if site in local:
                    stack.enter_context(poutine.scale(scale=self.scale_of(site)))
                density = 0.0 if mask is False else density
                drawn[site] = pyro.sample(
                    site, dist.Delta(value, log_density=density, event_dim=known.fn.event_dim)
                )
        return drawn

    def tables(self, guide: Any) -> RowTables:
        """The messages of all rows."""
        found: RowTables = guide._flow.rows
        return found
