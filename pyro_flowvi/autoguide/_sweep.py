"""Passes over all rows of a subsampled plate, page by page, and what is summed over them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._program.log_density import REFUSALS
from .._ranks import ALONE, Ranks
from ..init.gaussians import normal_noise
from ._pages import LOG_2_PI, Call, View, padded
from ._row_draws import Rows
from ._row_tables import RowTables, pages_of

__all__ = ["Shown", "Sweep", "pull_back"]

FIRST_NUMBERS = 500
"""Latents of a page from which the search for the roots can begin."""
PAGE_NUMBERS = 10_000
"""Latents of a page, where it may be longer than the model's own."""
PAGE_DATA = 100_000
"""Numbers of the largest site of such a page."""


class Shown(NamedTuple):
    """A page that a view shows."""

    view: View
    rows: Tensor
    fresh: Tensor
    """Which of them the pass has not shown before, 1 or 0, ``(B,)``."""


class Sweep:
    """All rows, in pages: longer ones than the model's where it lets the guide choose rows.

    :param guide: a guide that is set up.
    :param rows: its rows.
    :param calls: the model's arguments: one, or those of an epoch of batches.
    :param ranks: the processes, each of which has rows of its own; sums are over all of them.
    :raises ValueError: if the ranks have too few rows, or have some in common.
    """

    def __init__(self, guide: Any, rows: Rows, calls: Sequence[Call], ranks: Ranks = ALONE) -> None:
        self.guide, self.rows, self.calls, self.ranks = guide, rows, calls, ranks
        self.size, self.weight = rows.plate.size, 1.0
        """Rows of a pass, and how much each counts: more than one where the calls show a part of them."""
        self.share = 1.0
        """Of the rows of a pass, those of this rank."""
        self.own = torch.arange(self.size, device="cpu")
        """The rows of this rank."""
        self.seen = torch.ones(self.size, dtype=torch.bool, device="cpu")
        """Rows that have messages: those that a pass shows, and what steps have shown since."""
        self._pages: list[tuple[View, Tensor, Tensor, Call]] = []
        if not ranks.alone:
            self._divide()
        if rows.chooses(calls[0]):
            self._by_choice()
        else:
            self._by_batch()

    def _divide(self) -> None:
        """Finds the rows of this rank: those in its batches, or a part of those that the guide chooses."""
        ranks, plate, size = self.ranks, self.rows.plate, self.size
        if plate.given:
            seen = torch.zeros(size, dtype=torch.long, device="cpu")
            for call in self.calls:
                seen[self.rows.rows_of(self.guide, call).cpu()] = 1
        else:
            part = ranks.part(size)
            seen = torch.zeros(size, dtype=torch.long, device="cpu")
            seen[part.start : part.stop] = 1
        total = ranks.sum(seen)
        fewest = min(ranks.all(int(seen.sum())))
        if bool((total > 1).any()):
            twice = (total > 1).nonzero().flatten().tolist()
            raise ValueError(
                f"batches: expected each row of the plate {plate.name!r} on one rank, got {len(twice)} "
                f"on several, as row {twice[0]}; give batches as a list or a DataLoader, which are divided "
                "among the ranks"
            )
        if fewest < plate.shown:
            raise ValueError(
                f"plate {plate.name!r}: expected at least {plate.shown} rows, as many as a step shows, on "
                f"each of {ranks.size} ranks, got {fewest} of {size}; use fewer ranks, or a smaller "
                "subsample_size"
            )
        unseen = (total == 0).nonzero().flatten()
        part = ranks.part(len(unseen))
        self.own = torch.cat([seen.nonzero().flatten(), unseen[part.start : part.stop]]).sort().values
        self.share = float(seen.sum() / total.sum())

    def _by_choice(self) -> None:
        call, own = self.calls[0], self.rows.first_view()
        assert own.density is not None
        most = min(PAGE_NUMBERS // max(1, own.numbers_each), PAGE_DATA * own.size // own.density.largest)
        length = min(len(self.own), max(own.size, most))
        view = own
        if length > own.size:
            with suppress(ValueError, RuntimeError, IndexError):  # a model that is written for its own length
                rows = self.own[:length]
                view = self.rows.view(self.guide, self.rows.call_with(call, rows), rows)
        for places, new in pages_of(len(self.own), view.size):
            page = self.own[places]
            fresh = torch.zeros_like(view.page.weights)
            fresh[-new:] = 1.0
            self._pages.append((view, page, fresh, self.rows.call_with(call, page)))

    def _by_batch(self) -> None:
        seen, view = self.seen.zero_(), self.rows.first_view()
        for call in self.calls:
            page, call, real = self.filled(call)
            fresh = (~seen[page] & real).to(view.page.weights)
            seen[page[real]] = True
            self._pages.append((view, page, fresh, call))
        self.size = int(self.ranks.sum(seen.sum()))
        self.weight = len(seen) / self.size

    def filled(self, call: Call) -> tuple[Tensor, Call, Tensor]:
        """The rows of a batch, filled up to the length of a page; its arguments so; which rows are real.

        :raises ValueError: if the batch is longer, or of another form.
        """
        page, view = self.rows.rows_of(self.guide, call).cpu(), self.rows.first_view()
        count, real = len(page), torch.arange(view.size, device="cpu") < len(page)
        if count < view.size:
            call = padded(call, count, view.size)
            page = torch.cat([page, page[:1].expand(view.size - count)])
        if not self.rows.fits(call):
            raise ValueError(
                "batches: expected as many rows in each as in the first, or fewer, and data of the same "
                f"form, got {count} after {view.size}"
            )
        return page, call, real

    def keep_own(self) -> None:
        """Leaves the messages of other rows to the ranks that have these."""
        if not self.ranks.alone:
            self.tables.keep(self.own)

    @property
    def tables(self) -> RowTables:
        """The messages of all rows."""
        return self.rows.tables(self.guide)

    @property
    def whole(self) -> bool:
        """Whether a pass shows all rows."""
        return self.size == self.rows.plate.size

    @property
    def num_latents(self) -> int:
        """Latents of all rows, and outside."""
        view = self.rows.first_view()
        return len(view.root_places) + view.numbers_each * self.rows.plate.size

    def names_of_roots(self) -> list[str]:
        """A name for each number of the latents outside of the plate."""
        view = self.rows.first_view()
        names = view.packing.names()
        return [names[place] for place in view.root_places]

    @property
    def num_pages(self) -> int:
        return len(self._pages)

    def views(self) -> list[View]:
        """The views of the pages, each once."""
        return list({id(view): view for view, *_ in self._pages}.values())

    def first(self) -> Shown:
        """The only page, or one that is long enough to begin with."""
        own = self.rows.first_view()
        count = own.packing.dim - len(own.root_places)
        if self.num_pages == 1 or count < FIRST_NUMBERS or not self.rows.chooses(self.calls[0]):
            return next(self.pages(weighted=False))
        rows = self.own[: own.size]
        own.page.turn_to(rows, self.rows.call_with(self.calls[0], rows))
        self.tables.load(own.layer, rows)
        return Shown(own, rows, torch.ones_like(own.page.weights))

    def pages(self, weighted: bool) -> Iterator[Shown]:
        """All pages, each with its messages in the map, until the next one.

        :param weighted: whether rows that the pass has shown before count nothing.
        """
        for view, page, fresh, call in self._pages:
            view.page.turn_to(page, call, self.weight * fresh if weighted else 1.0)
            self.tables.load(view.layer, page)
            yield Shown(view, page, fresh)

    def nothing(self) -> View:
        """The first page with rows that count nothing: what the latents outside have of their own."""
        view, page, fresh, call = self._pages[0]
        view.page.turn_to(page, call, 0.0 * fresh)
        return view

    # -- sums ----------------------------------------------------------------------------------

    def total(self, roots: Tensor, width: int, seed: int, num: int = 1) -> tuple[Tensor, Tensor]:
        """Mean over draws of the rows' latents of log p(roots, z, data) - log q(z | roots), and its slope.

        :param roots: ``(P, R)``.
        :param width: points at once.
        :param seed: of the draws, which are the same for all points.
        :param num: draws.
        """
        points = roots.repeat_interleave(num, 0)
        nothing = points.new_full(points.shape[:1], torch.nan), torch.full_like(points, torch.nan)
        outside = self.ranks.attempt(
            lambda: pull_back(self.nothing(), points, None, width), nothing, REFUSALS
        )

        def of_rows() -> tuple[Tensor, Tensor]:
            value, slope = (torch.zeros_like(part) for part in outside)
            for i, (view, *_) in enumerate(self.pages(weighted=True)):
                own_seed = seed + self.ranks.numbered(i)
                noise = normal_noise(num, view.packing.dim, points, seed=own_seed).repeat(len(roots), 1)
                more = pull_back(view, points, noise, width)
                value, slope = value + (more[0] - outside[0]), slope + (more[1] - outside[1])
            return value, slope

        value, slope = self._over_ranks(of_rows, *outside)
        return value.reshape(len(roots), num).mean(1), slope.reshape(len(roots), num, -1).mean(1)

    def _over_ranks(
        self, of_rows: Callable[[], tuple[Tensor, Tensor]], value: Tensor, slope: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is known outside of the rows, and the sum of theirs over all ranks."""
        nothing = torch.full_like(value, torch.nan), torch.full_like(slope, torch.nan)
        more, steeper = self.ranks.sum_both(of_rows, nothing, REFUSALS)
        value, slope = value + more, slope + steeper
        self.ranks.lead(value, slope)  # each has what is known outside by itself
        return value, slope

    @torch.no_grad()
    def log_weights(self, num: int, width: int) -> tuple[Tensor, Tensor]:
        """Draws of the roots, ``(num, R)``, and log p(x, z) - log q(z) of them with latents of all rows."""
        roots, log_q = self.guide.draw_roots_and_log_prob(num)
        view = self.nothing()
        still = view.with_roots(roots, roots.new_zeros(num, view.packing.dim))
        outside = view.narrow_graph(width)(view.layer.forward_and_log_det(still)[0])[0]

        def of_rows() -> tuple[Tensor, Tensor]:
            total = torch.zeros_like(outside)
            for view, *_ in self.pages(weighted=True):
                x = torch.randn(num, view.packing.dim).to(roots)
                z, log_det = view.layer.forward_and_log_det(view.with_roots(roots, x))
                rows = view.layer.rows
                assert rows is not None
                weights = rows.noise_weights(view.packing).to(x).index_fill(0, view.root_places, 0.0)
                normal = -0.5 * ((x.square() + LOG_2_PI) * weights).sum(-1)
                total = total + (view.narrow_graph(width)(z)[0] - outside - (normal - log_det))
            return total, roots.new_zeros(num, 0)

        with self.ranks.parted_noise():
            return roots, self._over_ranks(of_rows, outside - log_q, roots.new_zeros(num, 0))[0]


def pull_back(view: View, roots: Tensor, noise: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """log p + log |det| of a page's latents of given noise, and the gradient by the roots."""
    graph = view.narrow_graph(width)
    with torch.enable_grad():
        at = roots.detach().requires_grad_()
        x = at.new_zeros(len(at), view.packing.dim) if noise is None else noise
        z, log_det = view.layer.forward_and_log_det(view.with_roots(at, x))
        value, gradient = graph(z.detach())
        (slope,) = torch.autograd.grad((z * gradient).sum() + log_det.sum(), at)
    return value + log_det.detach(), slope
