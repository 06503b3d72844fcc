"""What fit asks of a guide with rows."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import torch
from pyro import poutine
from torch import Tensor

from .._launch import find_ranks
from .._program.log_density import REFUSALS, UnconstrainedModel
from .._program.rows import showing
from .._ranks import ALONE, Ranks
from .._types import Program
from ..init.gaussians import normal_noise
from ..transforms import Compose
from ..transforms.base import forward_and_log_det
from ._affine import FramedAffine, enter_frame, frame_of, leave_frame, set_affine
from ._amortised import AmortisedRows
from ._fit_answers import TOLERANCE, TOLERANCE_EACH, FitAnswers
from ._on_roots import OnRoots
from ._pages import Call, View
from ._protocol import FitOptions, Frame, Taken
from ._row_guide import RowGuide
from ._row_start import place_rows
from ._sweep import Sweep
from ._take_over import check_previous, copy_flow, moments

__all__ = ["RowFit"]

PREVIOUS_DRAWS = 4096
"""Draws that tell the moments of an earlier guide."""
PARTICLES, RATE = 16, 5e-3
"""Draws a step, and the learning rate: a page of rows says less of the roots than their start does."""


class RowFit(RowGuide):
    """The answers of :class:`FitGuide` where latents stand under a subsampled plate."""

    @property
    def amortised(self) -> bool:
        return isinstance(self._rows, AmortisedRows)

    def can_move(self) -> bool:
        return self._rows is None and super().can_move()

    def fit_options(self) -> FitOptions:
        if self._rows is None:
            return super().fit_options()
        if isinstance(self._rows, AmortisedRows):
            return FitOptions(settings={"flow": repr(self._flow)})
        messages = self._rows.first_view().numbers_each * self._rows.plate.size
        return FitOptions(
            lr=RATE,
            num_particles=PARTICLES,
            tolerance=TOLERANCE + TOLERANCE_EACH * messages,
            settings={"flow": repr(self._flow)},
        )

    def frame(self) -> Frame | None:
        if self._rows is None:
            return super().frame()
        if isinstance(self._rows, AmortisedRows):
            return None
        tables = self._rows.tables(self)
        if not tables.fixed:
            return None
        own = (None, None) if self.affine is None else frame_of(self.affine) or (None, None)
        return *own, dict(tables.fixed), dict(tables.fixed_shared), self._rows.first_view().layer.shaped

    def set_frame(self, frame: Frame | None) -> None:
        if self._rows is None:
            super().set_frame(frame)
        if self._rows is None or isinstance(self._rows, AmortisedRows):
            return
        tables = self._rows.tables(self)
        loc, scale, fixed, shared, shaped = frame or (None, None, {}, {}, True)
        if isinstance(self.affine, FramedAffine):
            self.affine.set_frame(loc, scale)
        tables.fixed, tables.fixed_shared = dict(fixed), dict(shared)
        self._rows.set_active(self, shaped)

    def leave_frame(self) -> None:
        if self._rows is None:
            super().leave_frame()
            return
        if isinstance(self._rows, AmortisedRows):
            return
        if self.affine is not None:
            leave_frame(self.affine)
        self._rows.tables(self).leave_frame(self._rows.first_view().layer)

    def density(self, *args: Any, **kwargs: Any) -> UnconstrainedModel:
        """As of any guide; of rows that a network reads, those of any data."""
        if self.amortised:
            return self._density_of(self._require_model(), args, kwargs)
        return super().density(*args, **kwargs)

    def density_of(self, model: Program, args: Any, kwargs: Any) -> UnconstrainedModel:
        """Of rows, which are pages of the guide's own model, that one's."""
        if self._rows is not None:
            return self.density(*args, **kwargs)
        return super().density_of(model, args, kwargs)

    def draw_latent(self, size: int) -> tuple[Tensor, Tensor] | None:  # type: ignore[override]
        """None of rows, whose latents are drawn in the plates of a call."""
        return None if self._rows is not None else super().draw_latent(size)

    def take_over(self, previous: Any, density: UnconstrainedModel | None, all_data: bool) -> Taken:
        if self._rows is None:
            return super().take_over(previous, density, all_data)
        if not isinstance(previous, FitAnswers):
            raise ValueError(f"init: expected a fitted guide of this package, got {previous!r}")
        check_previous(self, previous)
        view, roots = self._rows.first_view(), list(self._rows.first_view().structure.roots)
        known = {site: latent.free_shape for site, latent in previous._packing.latents.items()}
        if any(known.get(site) != view.packing.latents[site].free_shape for site in roots):
            raise ValueError(f"init: expected a guide with the latents {roots}, got {list(known)}")
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            drawn = previous.sample_posterior(PREVIOUS_DRAWS, sites=roots)
        free = [view.packing.latents[site].unconstrain(drawn[site])[0] for site in roots]
        whole = previous is self or (
            isinstance(previous, RowGuide) and previous._rows is not None and self._copy(previous)
        )
        self._known = moments(torch.cat(free, -1)) if free else None
        return Taken(near=True, whole=whole)

    def _copy(self, previous: "RowGuide") -> bool:
        """Gives the guide the flow of another one with rows, if it has the same layers."""
        if not self.latent_dim or not copy_flow(self._flow, previous._flow):
            return False
        rows, others = self._rows, previous._rows
        if rows is not None and others is not None and rows.plate.known and others.plate.known:
            own, other = rows.tables(self), others.tables(previous)
            with suppress(RuntimeError):  # of other levels
                own.shapes.load_state_dict(other.shapes.state_dict())
        return True

    @property
    def rows_by_batch(self) -> bool:
        known = self._rows is not None and not isinstance(self._rows, AmortisedRows)
        return known and self._rows.plate.given  # type: ignore[union-attr]

    def gather_rows(self) -> Self:
        if self._rows is not None and self._rows.plate.known:
            tables = self._rows.tables(self)
            if tables.own is not None:
                tables.gather(find_ranks("auto", next(tables.parameters()).device))
                self._rows.set_active(self, self._rows.first_view().layer.shaped)
        return self

    def sweep(self, epoch: Callable[[int], Sequence[Call]], ranks: Ranks = ALONE) -> Sweep | None:
        """Passes over all rows; None where there are none, or a network reads their data.

        :param epoch: from how many batches there are at most to the arguments of one pass.
        :param ranks: the processes that have rows of their own.
        """
        if self._rows is None or isinstance(self._rows, AmortisedRows):
            return None
        plate = self._rows.plate
        return Sweep(self, self._rows, epoch(2 * -(-plate.size // plate.shown)), ranks)

    def whole(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Program, Program, Call] | None:
        """Model and guide of all rows at once, and the arguments; None where there is none.

        None too where a network reads the rows' data, or other rows come with other arguments.
        """
        rows = self._rows
        if rows is None or isinstance(rows, AmortisedRows) or not rows.chooses((args, kwargs)):
            return None
        every = torch.arange(rows.plate.size)

        def guide(*args: Any, **kwargs: Any) -> Any:
            # The model's plate consists of these rows, and draws none.
            with rows.showing_all(), poutine.block(hide=[rows.plate.name]):
                return self(*args, **kwargs)

        model = showing(self._require_model(), rows.plate, None if rows.plate.given else every, None)
        return model, guide, rows.call_with((args, kwargs), every)

    @torch.no_grad()
    def whole_map(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[UnconstrainedModel, Compose]:
        """The density of all rows' latents at once, and the map from noise to them.

        :param args: as :meth:`whole` gives them.
        """
        rows = self._rows
        assert rows is not None
        every = torch.arange(rows.plate.size)
        view = rows.view(self, (args, dict(kwargs)), every)
        view.page.turn_to(every, (args, dict(kwargs)))
        rows.tables(self).load(view.layer, every)
        assert view.density is not None
        return view.density, self.page_flow(view)

    def start_rows(self, sweep: Sweep, width: int) -> str | None:
        """Moves roots and rows to where they start, into a frame; None if no such place was found.

        :param width: points of the model at once.
        """
        tables, layer = sweep.tables, sweep.rows.first_view().layer
        kept = {name: param.detach().clone() for name, param in tables.named_parameters()}
        tables.zero(layer)
        known, self._known = self._known, None
        trained = moments(self.draw_roots(PREVIOUS_DRAWS, fixed=True)) if self._has_bends() else None
        found = None
        try:
            with suppress(*REFUSALS):  # where the model has no density, or its Hessian no factor
                found = place_rows(sweep, width, known)
        finally:
            if found is None:
                tables.forget_frame(kept)
        if found is None:
            return None
        if self.affine is not None and trained is not None:
            found = self._carried(trained, found)
        if self.affine is not None and not enter_frame(self.affine, *found):
            set_affine(self.affine, *found)
        return "program" if known is None else "previous"

    def _has_bends(self) -> bool:
        """Whether the flow is more than its affine map, as one that was trained before."""
        if not self.latent_dim or self.affine is None:
            return False
        x = normal_noise(8, self.latent_dim, next(self._flow.parameters()), seed=2)
        y = x
        for part in [*self._flow][:-1]:
            y = forward_and_log_det(part, y)[0]
        return not torch.allclose(x, y, atol=1e-3)

    def _carried(self, known: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The affine map that turns the moments of a flow that was trained into those that were found."""
        (mean, factor), (loc, scale) = known, found
        enter_frame(self.affine)
        frame = frame_of(self.affine)
        if frame is None or frame[1].dim() < 2:
            return found
        turn = scale @ torch.linalg.solve_triangular(factor, torch.eye(len(loc)).to(loc), upper=False)
        return loc + turn @ (frame[0].to(loc) - mean), turn @ frame[1].to(loc)

    def page_flow(self, view: View) -> Compose:
        """The map from noise to all latents of a page."""
        dim, places = view.packing.dim, view.root_places
        on_roots = [OnRoots(part, places, dim) for part in self._flow] if self.latent_dim else []
        return Compose([*on_roots, view.layer], dim=dim)

    def params_of_page(self, view: View) -> list[Tensor]:
        """What is trained of that map but the messages of rows."""
        shapes = list(view.layer.shapes.parameters()) if view.layer.shaped else []
        return [*self.params_of_roots(), *(param for param in shapes if param.requires_grad)]

    def params_of_roots(self) -> list[Tensor]:
        """What is trained of the flow of the latents outside of the plate."""
        own = [param for part in self._flow for param in part.parameters()] if self.latent_dim else []
        return [param for param in own if param.requires_grad]
