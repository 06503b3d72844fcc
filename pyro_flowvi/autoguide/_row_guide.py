"""Guides that serve latents under a subsampled plate."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor, nn

from .._checks import check_dtype, check_positive_int
from .._program.rows import RowPlate
from .._types import AffineKind, InitFn, Program, StructureKind
from ..transforms import Compose
from ._amortised import AmortisedRows, find_data_plate, first_values, has_data_of, reads_rows
from ._encoder import Encoder
from ._fit_answers import FitAnswers
from ._message_map import MessageMap
from ._pages import Call, View
from ._row_draws import Rows
from ._row_tables import RowTables
from ._rows import find_rows
from ._structured import GuideStructure
from ._summaries import reference_normal

__all__ = ["RowGuide"]

_NO_ROWS = "with other models the model draws new rows itself: Predictive(model, posterior_samples=globals)"


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
        # Not a module of the guide: the flow has it.
        self._amortize: tuple[Any, ...] = () if amortize is None else (amortize,)
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
            plate, shown = find_data_plate(run, call, self._init_fn)
            return AmortisedRows(plate, by_prior, self._init_scale), shown
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
            flow.encoder = Encoder(self._amortize[0], layer, loc, values)
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
        known = rows.plate
        if found is None or _of_plate(found[0]) != _of_plate(known):
            raise ValueError(
                f"plate {known.name!r}: expected {known.size} rows, which the guide was set up with, got "
                f"{'none' if found is None else found[0].size}; build a guide for this data, or draw the "
                "latents of new rows with guide.sample_new_rows(num_samples, *args, **kwargs)"
            )
        plate, shown = found
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


def _of_plate(plate: RowPlate) -> tuple[str, int, int]:
    """What of a plate may not change."""
    return plate.name, plate.size, plate.dim
