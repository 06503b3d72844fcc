"""Steps and comparisons of a fit whose guide has messages of rows: a page a step, full passes in between."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer import SVI
from torch import Tensor

from .._compile.flow_step import FlowStep
from .._compile.step import StepStats
from .._program.log_density import REFUSALS
from .._program.log_weights import LogWeights
from .._ranks import Ranks
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

RowState = dict[str, Any]
"""What a checkpoint keeps of rows: which they are; numbers of each, by name; the rest."""
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

    watches, patient, several = True, False, False

    def __init__(self, pair: LogWeights, sweep: Sweep, width: int) -> None:
        self.structure = pair.structure
        self.last_draws: Tensor | None = None
        self._sweep, self._width = sweep, width

    @torch.no_grad()
    def log_weights(self, num_samples: int) -> Tensor:
        """log p(x, z) - log q(z) of independent draws of all latents, shape ``(num_samples,)``."""
        self.last_draws, weights = self._sweep.log_weights(num_samples, self._width)
        return weights

    def last_values(self) -> None:
        """Unknown: where the model sees rows, they are not looked at."""


def row_sweep(
    options: Mapping[str, Any], pair: LogWeights, answers: FitGuide, supply: Supply, width: int, ranks: Ranks
) -> Sweep | None:
    """Passes over the rows by which a guide is trained outside Pyro; None where Pyro has to take the steps.

    Of several ranks each keeps the messages of its rows alone.

    That is where the guide has no rows, the user asks for an objective or an optimizer, the model has
    parameters or enumerates, or it cannot be recorded.
    """
    own = (options[name] is None for name in ("loss", "optim", "validation"))
    if not all(own) or options["compile"] != "auto" or pair.structure.model_params:
        return None
    return _passes(pair, answers, supply, width, ranks)


def steps_of(sweep: Sweep) -> int:
    """Steps of a fit where the user does not say."""
    return MORE_STEPS if sweep.num_latents <= FEW_LATENTS else NUM_STEPS


def start_by_passes(
    pair: LogWeights, answers: FitGuide, supply: Supply, width: int, ranks: Ranks
) -> str | None:
    """Moves a guide of rows to where it starts, of a model whose steps are Pyro's.

    :return: the kind of start; None where there is none.
    """
    if not pair.structure.model_params:
        return None
    sweep = _passes(pair, answers, supply, width, ranks)
    kind: str | None = None
    if sweep is not None:
        sweep.keep_own()
        kind = sweep.guide.start_rows(sweep, width)
    answers.leave_frame()
    if sweep is not None:
        sweep.tables.gather(ranks)
    return kind


def _passes(pair: LogWeights, answers: FitGuide, supply: Supply, width: int, ranks: Ranks) -> Sweep | None:
    """Passes over the rows of a model that can be recorded."""
    if pair.structure.enumerated:
        return None
    sweep: Sweep | None = answers.sweep(supply.epoch, ranks)
    if sweep is None:
        return None
    held = all(view.narrow_graph(width).holds for view in sweep.views())
    return sweep if ranks.every(held and sweep.rows.first_view().graph(width).holds) else None


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
        self.ranks = sweep.ranks
        self._turn(*self._first_rows(), 1.0)
        self._shown, self._weight = view.page.rows.cpu(), view.page.weights
        self._real = torch.ones_like(self._shown, dtype=torch.bool)
        self._keys = [key for key in trained_in_frame(layer) if key in dict(self._tables.named_parameters())]
        self._own = [moving_param(layer, key) for key in self._keys]
        self._orders = [order_of(layer, key) for key in self._keys]
        self._first = [torch.zeros_like(self._tables.table(key)) for key in self._keys]
        self._second = [torch.zeros_like(self._tables.table(key)) for key in self._keys]
        self._drawn = torch.zeros(self._tables.size, dtype=torch.long, device="cpu")
        self._shares = sweep.ranks.size * sweep.share
        """How much a row of this rank counts in the mean over the ranks."""
        self._page: Tensor | None = None
        self._pages = [] if self._rows.plate.given else self._deal()
        self._order, self._position = torch.zeros(0, dtype=torch.long, device="cpu"), 0
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
            sweep.ranks,
        )
        self._centre = sweep.guide.draw_roots(64, fixed=True).mean(0)
        self._control = self._slopes()

    def _first_rows(self) -> tuple[Tensor, Call | None]:
        """Rows of this rank to begin with, and their data where these come with the rows."""
        if self.ranks.alone:
            return self._view.page.rows.clone(), None
        if self._rows.plate.given:
            return self._sweep.filled(self._sweep.calls[0])[:2]
        return self._sweep.own[: self._view.size], None

    def _deal(self) -> list[tuple[Tensor, Tensor]]:
        """Pages of rows, and how much each row counts there: those that fill the last page count half."""
        own, count = self._sweep.own, self._view.size
        size = len(own)
        with torch.random.fork_rng():
            torch.manual_seed(size)
            order = own[torch.randperm(size, device="cpu")]
        num = -(-size // count)
        extra = num * count - size
        dealt = torch.cat([order, order[:extra]])
        each = float(self.ranks.size * num)
        weights = self._view.page.weights.new_full((num * count,), each)
        if extra:
            weights[:extra] = weights[-extra:] = 0.5 * each
        return list(zip(dealt.split(count), weights.split(count), strict=True))

    def _slopes(self) -> Tensor:
        """Of each page what its slope at the roots' centre lacks to the mean of all."""
        centre, width = self._centre, self._width
        if not len(centre) or not self._pages:
            zeros: Tensor = centre.new_zeros(0, len(centre))
            return zeros
        view, found = self._view, []
        noise = normal_noise(CONTROL_DRAWS, view.packing.dim, centre, seed=3)
        points = centre.expand(CONTROL_DRAWS, -1)
        for rows, weights in self._pages:
            self._turn(rows, None, weights)
            found.append(pull_back(view, points, noise, width)[1].mean(0))
        slopes = torch.stack(found)
        return slopes.mean(0) - slopes

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
                self._order, self._position = torch.randperm(len(self._pages), device="cpu"), 0
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
        each = self._shares * self._rows.plate.size / int(real.sum())
        self._turn(page, call, torch.where(real, each, 0.0).to(self._view.page.weights))
        self._shown, self._real, self._weight = page[real], real, self._view.page.weights[real]

    def _average(self, grad: Tensor) -> Tensor:
        shared = grad[: self._count_shared]
        mean, self._loss, self._dropped = self.ranks.average(shared, self._loss, self._dropped)
        shared.copy_(mean)
        return grad

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
        rows, real = self._tables.at(self._shown), self._real
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

    def kept(self) -> dict[str, Any]:
        shared = slice(self._count_shared)  # whatever the rows of a page, and how many
        found = super().kept()
        return {**found, "moments": [moment[shared] for moment in found["moments"]]}

    def go_on(self, kept: Mapping[str, Any]) -> None:
        moments = [torch.zeros_like(own) for own in self.moments]
        for own, saved in zip(moments, kept["moments"], strict=True):
            own[: self._count_shared] = saved
        super().go_on({**kept, "moments": moments})

    def state(self) -> RowState:
        """What a checkpoint keeps of the rows of this rank."""
        own = {
            f"{kind}.{key}": value
            for i, key in enumerate(self._keys)
            for kind, value in self._by_key(i, key).items()
        }
        rest = {
            "seen": self._sweep.seen,
            "order": self._order,
            "position": self._position,
            "centre": self._centre,
            "control": self._control,
        }
        return {"rows": self._sweep.own, "by_row": {**own, "drawn": self._drawn}, "rest": rest}

    def _by_key(self, i: int, key: str) -> dict[str, Tensor]:
        table = self._tables.table(key).detach().clone()
        return {"table": table, "first": self._first[i], "second": self._second[i]}

    @torch.no_grad()
    def load(self, state: RowState) -> None:
        """Takes over the rows of a checkpoint; of one of other ranks, all but the place in the epoch."""
        by_row, rest = state["by_row"], state["rest"]
        for i, key in enumerate(self._keys):
            self._tables.table(key).copy_(by_row[f"table.{key}"])
            self._first[i].copy_(by_row[f"first.{key}"])
            self._second[i].copy_(by_row[f"second.{key}"])
        self._drawn.copy_(by_row["drawn"])
        self._sweep.seen.copy_(rest["seen"])
        self._centre = rest["centre"]
        if "control" in rest:
            self._order, self._position, self._control = rest["order"], rest["position"], rest["control"]
        else:
            self._control = self._slopes()


class RowSteps(FlowSteps):
    """Takes the steps of a fit by a :class:`RowStep`, as a stepper does."""

    _step: RowStep

    @property
    def compared(self) -> list[Tensor]:
        return self._step.shared

    def take(self, svi: SVI, args: Any, kwargs: Any, count: int, left: int | None) -> list[StepStats]:
        self.started, found = True, list[StepStats]()
        for _ in range(count):
            try:
                self._step.turn(args, kwargs)
            except REFUSALS:
                if self._step.ranks.alone:
                    raise
                found.append(self._step.give_up())
                break
            found.append(self._step(self.rate))
            if not math.isfinite(found[-1].loss):
                break
        return found

    def rows(self) -> RowState:
        return self._step.state()

    def load_rows(self, state: RowState) -> None:
        self._step.load(state)
