"""Steps and comparisons of a fit whose guide has messages of rows: a page a step, full passes in between."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer import SVI
from torch import Tensor

from .._compile.flow_step import FlowStep
from .._compile.step import StepStats
from .._program.log_weights import LogWeights
from ..autoguide._pages import Call, View
from ..autoguide._protocol import FitGuide
from ..autoguide._row_start import place_new_rows
from ..autoguide._row_tables import fixed_of_rows, moving_param, order_of, trained_in_frame
from ..autoguide._sweep import Sweep, pull_back
from ..init.gaussians import normal_noise
from ._batches import Supply
from ._flow_steps import FlowSteps, FlowWeights

__all__ = ["RowStep", "RowSteps", "RowWeights", "row_sweep", "start_by_passes", "steps_of"]

NUM_STEPS, CHECKS = 500, 4
"""Steps of a fit by default, which only correct what the start missed; full passes on the way."""
FEW_LATENTS, MORE_STEPS = 1000, 1500
"""Latents of all rows up to which passes cost next to nothing: a run has rounds, until nothing is gained."""
WITHOUT_CONTROL = 0.3
"""Factor on the rate of the roots where no control variate takes the minibatches' noise away."""
CONTROL_DRAWS = 8
"""Draws of a page's rows on which its slope at the start is taken."""
COMPARISON_DRAWS = 32
"""Draws of all rows on which states are compared."""

BETAS, EPS = (0.9, 0.99), 0.2
"""Of Adam for the rows' messages, each of which is seen few times.  Slopes are in the posterior's units:
a message that is right to a hundredth of a standard deviation is not moved by the sign of what is left."""


class RowWeights(FlowWeights):
    """Log weights of draws over all rows, by full passes.

    Stands in for :class:`LogWeights` where states are compared.

    :param pair: model and guide.
    :param sweep: the pages.
    :param width: points of the model at once.
    """

    watches, patient = True, False

    def __init__(self, pair: LogWeights, sweep: Sweep, width: int) -> None:
        self.structure = pair.structure
        self.last_draws: Tensor | None = None
        self._sweep, self._width = sweep, width

    @torch.no_grad()
    def log_weights(self, num_samples: int) -> Tensor:
        """log p(x, z) - log q(z) of independent draws of all latents, shape ``(num_samples,)``."""
        self.last_draws, weights = self._sweep.log_weights(num_samples, self._width)
        return weights


def row_sweep(
    options: Mapping[str, Any], pair: LogWeights, answers: FitGuide, supply: Supply, width: int
) -> Sweep | None:
    """Passes over the rows by which a guide is trained outside Pyro; None where Pyro has to take the steps.

    That is where the guide has no rows, the user asks for an objective or an optimizer, the model has
    parameters or enumerates, or it cannot be recorded.
    """
    own = (options[name] is None for name in ("loss", "optim", "validation"))
    if not all(own) or options["compile"] != "auto" or pair.structure.model_params:
        return None
    return _passes(pair, answers, supply, width)


def steps_of(sweep: Sweep) -> int:
    """Steps of a fit where the user does not say."""
    return MORE_STEPS if sweep.num_latents <= FEW_LATENTS else NUM_STEPS


def start_by_passes(pair: LogWeights, answers: FitGuide, supply: Supply, width: int) -> str | None:
    """Moves a guide of rows to where it starts, of a model whose steps are Pyro's.

    :return: the kind of start; None where there is none.
    """
    if not pair.structure.model_params:
        return None
    sweep = _passes(pair, answers, supply, width)
    kind: str | None = None if sweep is None else sweep.guide.start_rows(sweep, width)
    answers.leave_frame()
    return kind


def _passes(pair: LogWeights, answers: FitGuide, supply: Supply, width: int) -> Sweep | None:
    """Passes over the rows of a model that can be recorded."""
    if pair.structure.enumerated:
        return None
    sweep: Sweep | None = answers.sweep(supply.epoch)
    if sweep is None:
        return None
    held = all(view.graph(width).holds for view in [*sweep.views(), sweep.rows.first_view()])
    return sweep if held else None


class RowStep(FlowStep):
    """A step on a page of rows.

    What all rows share moves by Adam on the flow's path gradient, with the page's rows counted N / B times.
    Rows move by an Adam of their own that knows how often each was drawn; one that is not drawn does not
    move.

    Where the plate draws its rows, they are dealt into pages once, and an epoch shows these in a shuffled
    order.  The slope of a page at the roots' start, less the mean of all pages, is then a control variate: a
    page alone locates the roots to the root of N / B of their standard deviations, and it takes most of that
    noise away (Johnson and Zhang 2013, at one point).

    :param sweep: the pages.
    :param width: draws a step.
    :param limits: as of :class:`FlowStep`.
    """

    def __init__(self, sweep: Sweep, width: int, limits: Tensor) -> None:
        self._sweep, self._rows, self._width = sweep, sweep.rows, width
        self._spare: View | None = None
        """Where rows get their messages that no pass has shown."""
        self._view = view = self._rows.first_view()
        self._tables, layer = sweep.tables, view.layer
        self._turn(view.page.rows.clone(), None, 1.0)
        self._shown, self._weight = view.page.rows, view.page.weights
        self._real = torch.ones_like(self._shown, dtype=torch.bool)
        self._keys = [key for key in trained_in_frame(layer) if key in dict(self._tables.named_parameters())]
        self._own = [moving_param(layer, key) for key in self._keys]
        self._orders = [order_of(layer, key) for key in self._keys]
        self._first = [torch.zeros_like(self._tables.table(key)) for key in self._keys]
        self._second = [torch.zeros_like(self._tables.table(key)) for key in self._keys]
        self._drawn = torch.zeros(self._tables.size, dtype=torch.long)
        self._page: Tensor | None = None
        self._pages = [] if self._rows.plate.given else self._deal()
        self._order, self._position = torch.zeros(0, dtype=torch.long), 0
        self.shared: list[Tensor] = sweep.guide.params_of_page(view)
        """What is compared and averaged: all that is trained but the rows."""
        self._count_shared = sum(param.numel() for param in self.shared)
        self._count_roots = sum(param.numel() for param in sweep.guide.params_of_roots())
        rows = layer.rows
        assert rows is not None
        super().__init__(
            sweep.guide.page_flow(view),
            [*self.shared, *self._own],
            view.graph(width),
            limits,
            [*view.page.tensors, *fixed_of_rows(layer)],
            lambda: rows.noise_weights(view.packing),
        )
        self._centre, self._control = self._slopes(width)

    def _deal(self) -> list[tuple[Tensor, Tensor]]:
        """Pages of rows, and how much each row counts there: those that fill the last page count half."""
        size, count = self._rows.plate.size, self._view.size
        with torch.random.fork_rng():
            torch.manual_seed(size)
            order = torch.randperm(size)
        num = -(-size // count)
        extra = num * count - size
        dealt = torch.cat([order, order[:extra]])
        weights = self._view.page.weights.new_full((num * count,), float(num))
        if extra:
            weights[:extra] = weights[-extra:] = 0.5 * num
        return list(zip(dealt.split(count), weights.split(count), strict=True))

    def _slopes(self, width: int) -> tuple[Tensor, Tensor]:
        """Where the roots are, and of each page what its slope there lacks to the mean of all."""
        centre = self._sweep.guide.draw_roots(64, fixed=True).mean(0)
        if not len(centre) or not self._pages:
            return centre, centre.new_zeros(0, len(centre))
        view, found = self._view, []
        noise = normal_noise(CONTROL_DRAWS, view.packing.dim, centre, seed=3)
        points = centre.expand(CONTROL_DRAWS, -1)
        for rows, weights in self._pages:
            self._turn(rows, None, weights)
            found.append(pull_back(view, points, noise, width)[1].mean(0))
        slopes = torch.stack(found)
        return centre, slopes.mean(0) - slopes

    def _model_at(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = super()._model_at(z)
        if self._page is None or not len(self._control):
            return value, gradient
        lacking, places = self._control[self._page], self._view.root_places
        value = value + (z[:, places] - self._centre) @ lacking
        return value, gradient.index_add(1, places, lacking.expand(len(z), -1))

    def _turn(self, rows: Tensor, call: Call | None, weights: float | Tensor) -> None:
        self._view.page.turn_to(rows, call, weights)
        self._tables.load(self._view.layer, rows)

    def turn(self, args: Any, kwargs: Any) -> None:
        """Shows the rows of the next step: those of a batch, or the next page of a shuffled epoch."""
        if self._pages:
            if self._position == len(self._order):
                self._order, self._position = torch.randperm(len(self._pages)), 0
            self._page = self._order[self._position]
            self._position += 1
            page, weights = self._pages[self._page]
            self._turn(page, None, weights)
            self._shown, self._real, self._weight = page, torch.ones_like(page, dtype=torch.bool), weights
            return
        page, call, real = self._sweep.filled((args, kwargs))
        new = real & ~self._sweep.seen[page]
        if bool(new.any()):
            if self._spare is None:
                self._spare = self._rows.new_view(self._sweep.guide, call, page)
            place_new_rows(self._sweep, self._spare, self._width, page, call, new)
        each = self._rows.plate.size / int(real.sum())
        self._turn(page, call, torch.where(real, each, 0.0).to(self._view.page.weights))
        self._shown, self._real, self._weight = page[real], real, self._view.page.weights[real]

    def _norm(self, grad: Tensor) -> float:
        return float(torch.linalg.vector_norm(grad[: self._count_shared]))

    def _move(self, grad: Tensor, lr: float) -> None:
        shared, *own = grad.split([self._count_shared, *(param.numel() for param in self._own)])
        kept = self._values[self._count_shared :].clone()
        moved = torch.zeros_like(grad)
        moved[: self._count_shared] = shared
        roots = self._values[: self._count_roots]
        before = roots.clone()
        super()._move(moved, lr)
        if not self._pages:  # each minibatch pulls them to a place of its own
            roots.lerp_(before, 1.0 - WITHOUT_CONTROL)
        self._values[self._count_shared :] = kept
        rows, real = self._shown, self._real
        self._drawn[rows] += 1
        for i, (key, part, param) in enumerate(zip(self._keys, own, self._own, strict=True)):
            dim, order = self._orders[i]
            slope = order.by_row(part.view(param.shape), dim)[real]
            one_each = (-1, *[1] * (slope.dim() - 1))
            slope = slope.nan_to_num(0.0, 0.0, 0.0) / self._weight.to(slope).reshape(one_each)
            times = self._drawn[rows].to(slope).reshape(one_each)
            first = self._first[i][rows].lerp_(slope, 1.0 - BETAS[0])
            second = self._second[i][rows].lerp_(slope.square(), 1.0 - BETAS[1])
            self._first[i][rows], self._second[i][rows] = first, second
            step = first / (1.0 - BETAS[0] ** times)
            step = step / ((second / (1.0 - BETAS[1] ** times)).sqrt() + EPS)
            self._tables.table(key).data[rows] -= lr * step

    def forget(self) -> None:
        super().forget()
        self._drawn.zero_()
        for moment in (*self._first, *self._second):
            moment.zero_()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the rows."""
        return {
            "tables": {key: self._tables.table(key).detach().clone() for key in self._keys},
            "first": self._first,
            "second": self._second,
            "drawn": self._drawn,
            "seen": self._sweep.seen,
            "order": self._order,
            "position": self._position,
            "control": (self._centre, self._control),
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over the rows of a checkpoint."""
        for key in self._keys:
            self._tables.table(key).copy_(state["tables"][key])
        for own, saved in zip(
            (*self._first, *self._second), (*state["first"], *state["second"]), strict=True
        ):
            own.copy_(saved)
        self._drawn.copy_(state["drawn"])
        self._sweep.seen.copy_(state["seen"])
        self._order, self._position = state["order"], state["position"]
        self._centre, self._control = state["control"]


class RowSteps(FlowSteps):
    """Takes the steps of a fit by a :class:`RowStep`, as a stepper does."""

    _step: RowStep

    @property
    def compared(self) -> list[Tensor]:
        return self._step.shared

    def take(self, svi: SVI, args: Any, kwargs: Any, count: int, left: int | None) -> list[StepStats]:
        self.started, found = True, list[StepStats]()
        for _ in range(count):
            self._step.turn(args, kwargs)
            found.append(self._step(self.rate))
            if not math.isfinite(found[-1].loss):
                break
        return found

    def state(self) -> dict[str, Any]:
        return {**super().state(), "rows": self._step.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self._step.load(state["rows"])
