"""Guides that serve latents under a subsampled plate."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor, nn

from .._checks import check_dtype
from .._types import AffineKind, InitFn, Program, StructureKind
from ..transforms import Compose
from ._affine import FramedAffine, enter_frame, frame_of, leave_frame, set_affine
from ._fit_answers import FitAnswers
from ._message_map import MessageMap
from ._on_roots import OnRoots
from ._pages import Call, View
from ._protocol import FitOptions, Frame
from ._row_start import place_rows
from ._row_tables import RowTables
from ._rows import Rows, find_rows
from ._structured import GuideStructure
from ._summaries import reference_normal
from ._sweep import Sweep

__all__ = ["RowGuide"]

PARTICLES, RATE = 16, 5e-3
"""Draws a step, and the learning rate: a page of rows says less of the roots than their start does."""


class RowGuide(FitAnswers):
    """A guide whose flow is one of the latents outside of a subsampled plate, where latents stand under one.

    Those of the plate's rows are drawn by the model's priors and messages of their own: tables with a row for
    each, of which a step reads and trains those that the model shows.
    """

    serves_rows: ClassVar[bool] = True
    """Whether latents under a subsampled plate are served."""

    def __init__(
        self, model: Program, init_loc_fn: InitFn, name: str | None, structure: StructureKind
    ) -> None:
        super().__init__(model, init_loc_fn, name, structure)
        self._rows: Rows | None = None

    _init_scale: float
    _affine: AffineKind | None

    def _parts(self, layer: MessageMap | None) -> list[Any]:
        raise NotImplementedError

    def _start_at(self, affine: Any, loc: Tensor) -> None:
        raise NotImplementedError

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    # -- set-up --------------------------------------------------------------------------------

    def _serve_rows(self, run: Callable[..., Any], args: Any, kwargs: Any) -> bool:
        found = find_rows(run, (args, kwargs), self._init_fn) if self.serves_rows else None
        if found is None:
            return False
        plate, shown = found
        rows = Rows(plate, self._structure_kind is not None, self._init_scale)
        try:
            view = rows.view(self, (args, kwargs), shown)
            if plate.given:
                rows.find_place((args, kwargs), shown)
            AutoContinuous._setup_prototype(self, *args, **kwargs)
            if self.master is None:
                rows.plates_of(self, args, kwargs)
            self._rows, self._packing = rows, view.packing
            self.latent_dim = len(view.root_places)
            why = view.why_not or f"latents under the subsampled plate {plate.name!r}"
            self._structure = GuideStructure(
                view.structure, True, f"{why}, {plate.shown} of {plate.size} rows at a time"
            )
            self._build_row_flow(rows)
        except BaseException:
            self.prototype_trace, self._rows = None, None
            raise
        return True

    def _build_row_flow(self, rows: Rows) -> None:
        view = rows.first_view()
        assert view.density is not None
        layer, loc = view.layer, view.density.start
        device, dtype = self._placement
        loc = loc.to(device=device, dtype=dtype)
        check_dtype("dtype of the latents", loc.dtype)
        layer.centre_at(loc)
        self._flow_dim = self.latent_dim
        if self._flow_dim:
            parts = self._parts(layer)
            if self._affine is not None:
                self._start_at(parts[-1], loc[view.root_places])
            flow: nn.Module = Compose(parts, dim=self._flow_dim)
        else:
            flow = nn.Module()  # all latents are those of rows
        flow.rows = RowTables(layer, rows.plate.size)
        flow = flow.to(device=loc.device, dtype=loc.dtype)
        for param in flow.parameters():
            param.data = param.data.contiguous()
        self._modules["flow"] = flow
        if self._pending_state:
            state, self._pending_state = self._pending_state, {}
            flow.load_state_dict(state)

    def _trace_again(self, args: Any, kwargs: Any) -> None:
        rows = self._rows
        if rows is None:
            super()._trace_again(args, kwargs)
            return
        found = find_rows(self._require_model(), (args, kwargs), self._init_fn)
        plate, shown = (None, None) if found is None else found
        known = rows.plate
        if plate is None or shown is None or (plate.name, plate.size, plate.dim) != (
            known.name,
            known.size,
            known.dim,
        ):
            raise ValueError(
                f"plate {known.name!r}: expected {known.size} rows, which the guide was set up with, got "
                f"{'none' if plate is None else plate.size}; build a guide for this data, or draw the "
                "latents of new rows with guide.sample_new_rows(num_samples, *args, **kwargs)"
            )
        rows.forget_views()
        rows.view(self, (args, kwargs), shown)
        self._stale = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._rows is not None:
            self._rows.apply(fn)
        return self

    # -- calls and draws -----------------------------------------------------------------------

    def draw_roots(self, num: int, fixed: bool = False) -> Tensor:
        """Unconstrained latents outside of the plate, ``(num, R)``; ``fixed``: the same at every call."""
        like = next(self._flow.parameters())
        if not self.latent_dim:
            return like.new_zeros(num, 0)
        if fixed:
            drawn: Tensor = self._flow(reference_normal(num, self.latent_dim).to(like))
        else:
            drawn = self.get_posterior().sample((num,))
        return drawn

    def draw_roots_and_log_prob(self, num: int) -> tuple[Tensor, Tensor]:
        """Draws of the same, and their log densities, ``(num,)``."""
        if not self.latent_dim:
            roots = self.draw_roots(num)
            return roots, roots.new_zeros(num)
        drawn: tuple[Tensor, Tensor] = self.get_posterior().rsample_and_log_prob((num,))
        return drawn

    # -- what fit asks -------------------------------------------------------------------------

    def can_move(self) -> bool:
        return self._rows is None and super().can_move()

    def fit_options(self) -> FitOptions:
        if self._rows is None:
            return super().fit_options()
        return FitOptions(lr=RATE, num_particles=PARTICLES, settings={"flow": repr(self._flow)})

    def frame(self) -> Frame | None:
        if self._rows is None:
            return super().frame()
        tables = self._rows.tables(self)
        if not tables.fixed:
            return None
        own = (None, None) if self.affine is None else frame_of(self.affine) or (None, None)
        return *own, dict(tables.fixed), dict(tables.fixed_shared), self._rows.first_view().layer.shaped

    def set_frame(self, frame: Frame | None) -> None:
        if self._rows is None:
            super().set_frame(frame)
            return
        tables = self._rows.tables(self)
        loc, scale, fixed, shared, shaped = frame or (None, None, {}, {}, True)
        if isinstance(self.affine, FramedAffine):
            self.affine.set_frame(loc, scale)
        tables.fixed, tables.fixed_shared = dict(fixed), dict(shared)
        self._rows.set_shaped(shaped)

    def leave_frame(self) -> None:
        if self._rows is None:
            super().leave_frame()
            return
        if self.affine is not None:
            leave_frame(self.affine)
        self._rows.tables(self).leave_frame(self._rows.first_view().layer)

    def sweep(self, calls: Sequence[Call]) -> Sweep | None:
        """Passes over all rows of data; None where there are none."""
        return None if self._rows is None else Sweep(self, self._rows, calls)

    def start_rows(self, sweep: Sweep, width: int) -> str | None:
        """Moves roots and rows to where they start, into a frame; None if no such place was found.

        :param width: points of the model at once.
        """
        tables, layer = sweep.tables, sweep.rows.first_view().layer
        kept = {name: param.detach().clone() for name, param in tables.named_parameters()}
        tables.zero(layer)
        found = place_rows(sweep, width)
        if found is None:
            tables.fixed, tables.fixed_shared = {}, {}
            with torch.no_grad():
                for name, param in tables.named_parameters():
                    param.copy_(kept[name])
            return None
        if self.affine is not None and not enter_frame(self.affine, *found):
            set_affine(self.affine, *found)
        return "program"

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
