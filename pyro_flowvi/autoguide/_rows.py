"""What a guide draws where its model has latents under a subsampled plate: messages, by indices."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from .._program.rows import RowPlate, find_row_plate, noting_plates, rows_in, rows_said
from .._shapes import broadcast_shapes
from .._types import Program
from ._pages import Call, Page, View, rows_that_see_others, same_shapes
from ._message_start import NEWTON_STEPS, Starter
from ._row_tables import RowTables, pages_of
from ._summaries import reference_normal, sample_quantiles

__all__ = ["Rows", "find_rows"]

MOST_NUMBERS = 1_000_000
"""Numbers of all draws of a page at once."""
QUANTILE_DRAWS = 2048
NEW_NUMBERS = 10_000
"""Latents of new rows for which messages are found at once."""


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


class Rows:
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
        page = Page(model, plate, call, rows, dtype)
        assert page.program is not None
        density = UnconstrainedModel(page.program, *page.call, guide._init_fn, changing=page.tensors)
        if density.packing.left_out:
            site = next(iter(density.packing.left_out))
            raise ValueError(
                f"site {site!r}: expected latents that a density touches under the subsampled plate "
                f"{plate.name!r}, got masked ones; mask the observations alone"
            )
        view = View(
            page, plate, density, self._by_prior, self._scale, self.follows_roots, guide._placement
        )
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
        return all(not isinstance(leaf, Tensor) or self.plate.shown not in leaf.shape[:1] for leaf in others)

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
        rows = self.rows_of(guide, (args, kwargs))
        guide.create_plates = lambda *_, **__: pyro.plate(
            self.plate.name, self.plate.size, subsample=rows, dim=self.plate.dim
        )
        try:
            return guide._create_plates(*args, **kwargs)
        finally:
            guide.create_plates = None

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
            rows, own = torch.arange(self.plate.size), guide.create_plates
            guide.create_plates = lambda *_, **__: pyro.plate(self.plate.name, len(rows), dim=self.plate.dim)
            try:
                return guide._create_plates(*call[0], **call[1]), self.view(guide, call, rows), rows
            finally:
                guide.create_plates = own
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
            density = -log_det
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

    # -- draws ---------------------------------------------------------------------------------

    def check_rows(self, rows: Any) -> Tensor:
        """Indices of rows as a tensor, all of them with None.

        :raises ValueError: if they are no whole numbers from 0 to N - 1.
        """
        if rows is None:
            return torch.arange(self.plate.size)
        found = torch.as_tensor(list(rows) if isinstance(rows, range) else rows)
        whole = not found.is_floating_point() and found.dtype != torch.bool and found.dim() <= 1
        found = found.long().reshape(-1)
        if not whole or bool(((found < 0) | (found >= self.plate.size)).any()):
            raise ValueError(
                f"rows: expected whole numbers from 0 to {self.plate.size - 1}, the rows of the plate "
                f"{self.plate.name!r}, got {rows!r}; for rows that the guide has not seen, sample_new_rows"
            )
        return found

    def check_sites(self, sites: Sequence[str] | None) -> list[str]:
        """Names of latent sites, all of them with None.

        :raises ValueError: if one is unknown.
        """
        known = list(self.first_view().packing.latents)
        wanted = known if sites is None else [sites] if isinstance(sites, str) else list(sites)
        if unknown := sorted(set(wanted) - set(known)):
            raise ValueError(f"sites: expected some of {known}, got {unknown}")
        return [site for site in known if site in wanted]

    def parts(self, guide: Any, rows: Tensor) -> Iterator[tuple[View, int, Tensor]]:
        """Pages of rows with their messages in the view's map; how many of each are wanted, its first."""
        view = self.first_view()
        if self.plate.given and view.depends_on_data:
            raise RuntimeError(
                f"plate {self.plate.name!r}: the priors of its latents depend on data that come with each "
                "batch, which are not known here; draw with the batch, `guide(*batch)`"
            )
        for some in rows.split(view.size):
            page = torch.cat([some, some[:1].expand(view.size - len(some))])
            view.page.turn_to(page)
            with self.messages(guide, view, page):
                yield view, len(some), page

    @torch.no_grad()
    def sample(
        self,
        guide: Any,
        shape: tuple[int, ...],
        sites: Sequence[str] | None = None,
        rows: Any = None,
    ) -> dict[str, Tensor]:
        """Draws of sites in their constrained spaces, of some rows or all, page by page."""
        wanted, indices = self.check_sites(sites), self.check_rows(rows)
        num = math.prod(shape)
        view = self.first_view()
        roots = guide.draw_roots(num)
        values = {site: [value] for site, value in view.constrained_roots(roots).items()}
        local = [site for site in wanted if site not in values]
        for page, count, _ in self.parts(guide, indices) if local else ():
            found: dict[str, list[Tensor]] = {site: [] for site in local}
            for some in roots.split(max(1, MOST_NUMBERS // page.packing.dim)):
                drawn = page.draw_rows(some, torch.randn(len(some), page.packing.dim).to(some))
                for site in local:
                    found[site].append(page.packing.latents[site].constrain(drawn[site][0])[0])
            for site in local:
                whole = torch.cat(found[site])
                values.setdefault(site, []).append(whole.narrow(1 + page.axis[site], 0, count))
        return {
            site: torch.cat(values[site], 1 + view.axis.get(site, -1)).unflatten(0, shape)
            if shape
            else torch.cat(values[site], 1 + view.axis.get(site, -1))[0]
            for site in wanted
        }

    @torch.no_grad()
    def sample_new(self, guide: Any, num: int, call: Call, sites: Sequence[str] | None) -> dict[str, Tensor]:
        """Draws of the roots, and of the latents of rows that no table knows: their messages are found at the
        modes given the roots, and move with these."""
        wanted, roots = self.check_sites(sites), guide.draw_roots(num)
        centre, sds = roots.mean(0), roots.std(0) if num > 1 else guide.draw_roots(64, fixed=True).std(0)
        first = self.first_view()
        values = {site: [value] for site, value in first.constrained_roots(roots).items()}
        count = self.count_rows(guide, call)
        most = max(1, NEW_NUMBERS * first.size // first.packing.dim)
        length = count if self.plate.given else min(count, most)
        view = self.new_view(guide, call, torch.arange(length))
        view.layer.shapes, view.layer.shaped = first.layer.shapes, first.layer.shaped
        starter = Starter(view.layer, view.graph(max(1, 2 * len(centre))))
        assert view.density is not None
        for page, new in pages_of(count, length):
            view.page.turn_to(page)
            z = view.density.start.index_copy(0, view.root_places, centre.to(view.density.start))
            modes, factors = starter.given.newton(z.unsqueeze(0), NEWTON_STEPS)
            if factors[0] is None:
                raise RuntimeError("no mode was found of the latents of new rows given the others")
            starter.put(modes[0], factors[0], sds)
            drawn = view.draw_rows(roots, torch.randn(num, view.packing.dim).to(roots))
            for site in wanted:
                if site in drawn:
                    whole = view.packing.latents[site].constrain(drawn[site][0])[0]
                    part = whole.narrow(1 + view.axis[site], length - new, new)
                    values.setdefault(site, []).append(part)
        return {site: torch.cat(values[site], 1 + view.axis.get(site, -1)) for site in wanted}

    def count_rows(self, guide: Any, call: Call) -> int:
        """How many rows other data have.

        :raises ValueError: if they do not have the plate.
        """
        leaves = pytree.tree_leaves((tuple(call[0]), dict(call[1])))
        lengths = {
            len(new)
            for old, new in zip(self._leaves[0], leaves, strict=False)
            if isinstance(old, Tensor) and isinstance(new, Tensor) and self.plate.size in old.shape[:1]
        }
        if len(lengths) == 1 and not self.plate.given:  # fewer rows, maybe, than a page of the model has
            return lengths.pop()
        with torch.random.fork_rng(), guide._apart():
            init = InitMessenger(guide._init_fn)(guide._require_model())
            nodes = poutine.trace(init).get_trace(*call[0], **call[1]).nodes
        frames = {
            frame.name: frame
            for node in nodes.values()
            if node["type"] == "sample"
            for frame in node["cond_indep_stack"]
        }
        if self.plate.name not in frames:
            raise ValueError(f"expected data with the plate {self.plate.name!r}, got plates {sorted(frames)}")
        frame = frames[self.plate.name]
        return int(frame.size if self.plate.given else frame.full_size or frame.size)

    @torch.no_grad()
    def quantile(self, guide: Any, probs: Tensor) -> dict[str, Tensor]:
        """Marginal quantiles of every site, of all rows, ``probs.shape + site shape``."""
        view = self.first_view()
        roots = guide.draw_roots(QUANTILE_DRAWS, fixed=True)
        probs = probs.to(roots)

        def bijection(site: str) -> Any:
            return view.packing.latents[site].bijection

        found = {
            site: [value]
            for site, value in sample_quantiles(view.split_roots(roots), probs, bijection).items()
        }
        x = reference_normal(QUANTILE_DRAWS, view.packing.dim).to(roots)
        for page, count, _ in self.parts(guide, torch.arange(self.plate.size)):
            points = {site: free for site, (free, _) in page.draw_rows(roots, x).items()}
            for site, value in sample_quantiles(points, probs, bijection).items():
                part = value.narrow(probs.dim() + page.axis[site], 0, count)
                found.setdefault(site, []).append(part)
        return {
            site: torch.cat(found[site], probs.dim() + view.axis.get(site, -1))
            if site in view.axis
            else value[0]
            for site, value in ((site, found[site]) for site in view.packing.latents)
        }

    def log_prob(self, guide: Any, samples: Mapping[str, Tensor]) -> Tensor:
        """Log density of values of all sites, of all rows, shape ``S``; -inf outside the support.

        :raises ValueError: if a site is missing, unknown, of another shape, or NaN.
        """
        view, like = self.first_view(), next(guide._flow.parameters())
        for site in view.axis:
            value, latent = samples.get(site), view.packing.latents[site]
            axis = view.axis[site] - len(latent.shape)
            if value is not None and (value.dim() < -axis or value.shape[axis] != self.plate.size):
                shape = list(latent.shape)
                shape[axis] = self.plate.size
                raise ValueError(
                    f"samples[{site!r}]: expected shape (*, {', '.join(map(str, shape))}), got "
                    f"{tuple(value.shape)}"
                )
        total: Any = 0.0
        inside: Any = True
        for page, count, rows in self.parts(guide, torch.arange(self.plate.size)):
            shown = {
                site: value.index_select(page.axis[site] - len(page.packing.latents[site].shape), rows)
                if site in page.axis
                else value
                for site, value in samples.items()
            }
            z, _, valid = page.packing.pack(shown, like)
            flat = z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
            values, densities = page.packing.split(flat), page.log_q_of_rows(flat)
            for site in densities:
                densities[site] = densities[site] - page.packing.latents[site].constrain(values[site])[1]
            total = total + page.by_row(densities)[:, :count].sum(-1).reshape(z.shape[:-1])
            inside = inside & valid
            outside = z
        roots = outside[..., view.root_places]
        free = view.split_roots(roots.reshape(math.prod(roots.shape[:-1]), roots.shape[-1]))
        for site, value in free.items():
            log_det = view.packing.latents[site].constrain(value)[1].reshape(len(value), -1).sum(-1)
            total = total - log_det.reshape(roots.shape[:-1])
        if len(view.root_places):
            total = total + guide.get_posterior().log_prob(roots)
        return torch.where(inside, total, -torch.inf)
