"""Guides that serve latents under a subsampled plate."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Self

import torch
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor, nn

from .._checks import check_dtype, check_positive_int
from .._program.log_density import UnconstrainedModel
from .._program.rows import showing
from .._types import AffineKind, InitFn, Program, StructureKind
from ..transforms import Compose
from ._affine import FramedAffine, enter_frame, frame_of, leave_frame, set_affine
from ._amortised import AmortisedRows, find_data_plate, first_values, has_data_of, reads_rows
from ._encoder import Encoder
from ._fit_answers import TOLERANCE, TOLERANCE_EACH, FitAnswers
from ._message_map import MessageMap
from ._on_roots import OnRoots
from ._pages import Call, View
from ._protocol import FitOptions, Frame, Taken
from ._row_start import place_rows
from ._row_tables import RowTables
from ._rows import Rows, find_rows
from ._structured import GuideStructure
from ._summaries import reference_normal
from ._sweep import Sweep
from ._take_over import check_previous, copy_flow, moments

__all__ = ["RowGuide"]

_NO_ROWS = (
    "with other models the model draws new rows itself: Predictive(model, posterior_samples=globals)"
)
PREVIOUS_DRAWS = 4096
"""Draws that tell the moments of an earlier guide."""
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
        self,
        model: Program,
        init_loc_fn: InitFn,
        name: str | None,
        structure: StructureKind,
        amortize: Any = None,
    ) -> None:
        super().__init__(model, init_loc_fn, name, structure)
        self._rows: Rows | None = None
        self._known: tuple[Tensor, Tensor] | None = None
        """Mean of the roots of an earlier guide, and lower factor of their covariance, to start from."""
        self._continues = False
        """Whether the flow is that guide's."""
        self._amortize = () if amortize is None else (amortize,)  # not a module of the guide: the flow has it
        self._wants_rows = amortize is not None

    _init_scale: float
    _affine: AffineKind | None

    def _parts(self, layer: MessageMap | None) -> list[Any]:
        raise NotImplementedError

    def _start_at(self, affine: Any, loc: Tensor) -> None:
        raise NotImplementedError

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    # -- set-up --------------------------------------------------------------------------------

    def _rows_of_model(self, run: Callable[..., Any], call: Call) -> tuple[Rows, Tensor] | None:
        """The rows of a model, and some to begin with; None if it has none."""
        by_prior = self._structure_kind is not None
        if self._amortize:
            plate = find_data_plate(run, call, self._init_fn)
            amortised = AmortisedRows(plate, by_prior, self._init_scale)
            known = amortised.rows_of(self, call) if plate.given else torch.arange(plate.shown)
            return amortised, known
        found = find_rows(run, call, self._init_fn) if self.serves_rows else None
        if found is None:
            return None
        plate, shown = found
        if not plate.given and not reads_rows(run, call, self._init_fn, plate) and has_data_of(call, plate):
            raise ValueError(
                f"plate {plate.name!r}: expected data that its rows index, as in `obs=y[rows]`, got the data "
                "of a batch, of which nobody knows which rows they are; give the plate their indices, "
                f"`pyro.plate({plate.name!r}, {plate.size}, subsample=rows)`, or let a network read the "
                "latents off the data, with amortize='auto'"
            )
        return Rows(plate, by_prior, self._init_scale), shown

    def _serve_rows(self, run: Callable[..., Any], args: Any, kwargs: Any) -> bool:
        call: Call = (args, kwargs)
        found = self._rows_of_model(run, call)
        if found is None:
            return False
        rows, shown = found
        plate = rows.plate
        try:
            view = rows.view(self, call, shown)
            if plate.given:
                rows.find_place(call, shown)
            AutoContinuous._setup_prototype(self, *args, **kwargs)
            if self.master is None:
                rows.plates_of(self, args, kwargs)
            self._rows, self._packing = rows, view.packing
            self.latent_dim = len(view.root_places)
            self._structure = GuideStructure(view.structure, True, self._told(rows, view))
            self._build_row_flow(rows, call, shown)
        except BaseException:
            self.prototype_trace, self._rows = None, None
            raise
        return True

    def _told(self, rows: Rows, view: View) -> str:
        """What is said of the rows, in words."""
        plate = rows.plate
        why = view.why_not or f"latents under the plate {plate.name!r}"
        if isinstance(rows, AmortisedRows):
            own = "and corrections by index" if plate.known else "alone"
            return f"{why}, with messages by a network {own}"
        return f"{why}, {plate.shown} of {plate.size} rows at a time"

    def _build_row_flow(self, rows: Rows, call: Call, shown: Tensor) -> None:
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
        if isinstance(rows, AmortisedRows):
            values = first_values(rows, self, call, None if rows.plate.given else shown)
            flow.encoder = Encoder(*self._amortize, layer, loc, values)
        if rows.plate.known:
            flow.rows = RowTables(layer, rows.plate.size)
            if isinstance(rows, AmortisedRows):
                flow.rows.zero(layer)  # corrections
        else:
            flow.shapes = layer.shapes
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
        if isinstance(rows, AmortisedRows) and not rows.plate.known:
            with self._apart():
                rows.show(self, (args, kwargs))  # any data will do
            self._stale = False
            return
        found = find_rows(self._require_model(), (args, kwargs), self._init_fn)
        plate, shown = (None, None) if found is None else found
        known = rows.plate
        if (
            plate is None
            or shown is None
            or (plate.name, plate.size, plate.dim)
            != (
                known.name,
                known.size,
                known.dim,
            )
        ):
            raise ValueError(
                f"plate {known.name!r}: expected {known.size} rows, which the guide was set up with, got "
                f"{'none' if plate is None else plate.size}; build a guide for this data, or draw the "
                "latents of new rows with guide.sample_new_rows(num_samples, *args, **kwargs)"
            )
        rows.forget_views()
        self._packing = rows.view(self, (args, kwargs), shown).packing
        if plate.shown != known.shown:
            rows.plate, roots = plate, self.latent_dim
            with self._apart():
                AutoContinuous._setup_prototype(self, *args, **kwargs)
            self.latent_dim = roots
        self._stale = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._rows is not None:
            self._rows.apply(fn)
        return self

    # -- calls and draws -----------------------------------------------------------------------

    def draw_roots(self, num: int, fixed: bool = False) -> Tensor:
        """Unconstrained latents outside of the plate, ``(num, R)``; ``fixed``: the same at every call."""
        like: Tensor = next(self._flow.parameters())
        if not self.latent_dim:
            return like.new_zeros(num, 0)
        drawn: Tensor
        if fixed:
            drawn = self._flow(reference_normal(num, self.latent_dim).to(like))
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

    @torch.no_grad()
    def sample_new_rows(
        self,
        num_samples: int,
        *args: Any,
        sites: Sequence[str] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Draws of all latents, those of rows of other data that the guide was not trained on among them.

        Nothing is trained: the rows' messages are read off the data by the network of ``amortize``, or found
        as the modes of their densities given the other latents (Newton's method).

        :param num_samples: number of draws.
        :param args: the model's arguments, with the new rows' data: all rows of its plate are drawn, or with
            ``subsample=`` those that it says.
        :param sites: names of the sites that are wanted; None for all.
        :param model_kwargs: keyword arguments of the model whose names this function has.
        :param kwargs: the model's keyword arguments.
        :return: site name -> ``(num_samples,) + site shape``, as long as the new data are.
        :raises RuntimeError: if the guide has no rows, or lost its model in a pickle.
        :raises ValueError: for unknown sites, or data without the plate.

        Example::

            >>> def model(y):
            ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("groups", len(y), subsample_size=2) as rows:
            ...         theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            ...         pyro.sample("y", dist.Normal(theta, 1.0), obs=y[rows])
            >>> guide = pyro_flowvi.AutoRealNVP(model).materialize(torch.randn(10))
            >>> guide.sample_new_rows(100, torch.randn(3))["theta"].shape
            torch.Size([100, 3])
        """
        if self._rows is None:
            raise RuntimeError(f"{self.name}: expected latents in the rows of a plate, got none; {_NO_ROWS}")
        self._require_model()
        call: Call = (args, {**kwargs, **(model_kwargs or {})})
        return self._rows.sample_new(self, check_positive_int("num_samples", num_samples), call, sites)

    # -- what fit asks -------------------------------------------------------------------------

    @property
    def amortised(self) -> bool:
        return isinstance(self._rows, AmortisedRows)

    def can_move(self) -> bool:
        return self._rows is None and super().can_move()

    def fit_options(self) -> FitOptions:
        if self._rows is None:
            return super().fit_options()
        view, plate = self._rows.first_view(), self._rows.plate
        messages = (view.packing.dim - len(view.root_places)) // view.size * plate.size
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
        self._continues = whole
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

    def sweep(self, epoch: Callable[[int], Sequence[Call]]) -> Sweep | None:
        """Passes over all rows; None where there are none, or a network reads their data.

        :param epoch: from how many batches there are at most to the arguments of one pass.
        """
        if self._rows is None or isinstance(self._rows, AmortisedRows):
            return None
        plate = self._rows.plate
        return Sweep(self, self._rows, epoch(2 * -(-plate.size // plate.shown)))

    def whole(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Program, Program, Call] | None:
        """Model and guide of all rows at once, and the arguments; None where there is none.

        None too where a network reads the rows' data, or other rows come with other arguments.
        """
        rows = self._rows
        if rows is None or isinstance(rows, AmortisedRows) or not rows.chooses((args, kwargs)):
            return None
        every = torch.arange(rows.plate.size)

        def guide(*args: Any, **kwargs: Any) -> Any:
            with rows.showing_all():
                return self(*args, **kwargs)

        model = showing(self._require_model(), rows.plate, None if rows.plate.given else every, None)
        return model, guide, rows.call_with((args, kwargs), every)

    def start_rows(self, sweep: Sweep, width: int) -> str | None:
        """Moves roots and rows to where they start, into a frame; None if no such place was found.

        :param width: points of the model at once.
        """
        tables, layer = sweep.tables, sweep.rows.first_view().layer
        kept = {name: param.detach().clone() for name, param in tables.named_parameters()}
        tables.zero(layer)
        known, self._known = self._known, None
        found = place_rows(sweep, width, known)
        if found is None:
            tables.fixed, tables.fixed_shared = {}, {}
            with torch.no_grad():
                for name, param in tables.named_parameters():
                    param.copy_(kept[name])
            return None
        if self.affine is not None and known is not None and self._continues:
            found = self._carried(known, found)
        if self.affine is not None and not enter_frame(self.affine, *found):
            set_affine(self.affine, *found)
        return "program" if known is None else "previous"

    def _carried(
        self, known: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The affine map that gives the flow of an earlier guide, with known moments, those that were found."""
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
