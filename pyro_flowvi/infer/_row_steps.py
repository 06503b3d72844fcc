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
from ..autoguide._pages import Call
from ..autoguide._row_tables import fixed_of_rows, moving_param, order_of, trained_in_frame
from ..autoguide._sweep import Sweep
from ..autoguide._protocol import FitGuide
from ._batches import Supply
from ._flow_steps import FlowSteps

__all__ = ["RowStep", "RowSteps", "RowWeights", "row_sweep"]

NUM_STEPS, CHECKS = 500, 4
"""Steps of a fit by default, which only correct what the start missed; full passes on the way."""
COMPARISON_DRAWS = 32
"""Draws of all rows on which states are compared."""

BETAS, EPS = (0.9, 0.99), 1e-8
"""Of Adam for the rows' messages, each of which is seen few times."""


class RowWeights:
    """Log weights of draws over all rows, by full passes.

    Stands in for :class:`LogWeights` where states are compared.

    :param pair: model and guide.
    :param sweep: the pages.
    :param width: points of the model at once.
    """

    vectorized = True
    last_draws: Tensor | None = None

    def __init__(self, pair: LogWeights, sweep: Sweep, width: int) -> None:
        self.structure = pair.structure
        self._sweep, self._width = sweep, width

    @torch.no_grad()
    def log_weights(self, num_samples: int) -> Tensor:
        """log p(x, z) - log q(z) of independent draws of all latents, shape ``(num_samples,)``."""
        guide, sweep = self._sweep.guide, self._sweep
        roots, log_q = guide.draw_roots_and_log_prob(num_samples)
        view = sweep.nothing()
        z = view.layer.forward_and_log_det(view.with_roots(roots, roots.new_zeros(len(roots), view.packing.dim)))[0]
        outside = view.graph(self._width)(z)[0]
        total = outside - log_q
        for view, *_ in sweep.pages(weighted=True):
            x = torch.randn(len(roots), view.packing.dim).to(roots)
            z, log_det = view.layer.forward_and_log_det(view.with_roots(roots, x))
            rows = view.layer.rows
            assert rows is not None
            weights = rows.noise_weights(view.packing).to(x).index_fill(0, view.root_places, 0.0)
            normal = -0.5 * ((x.square() + math.log(2.0 * math.pi)) * weights).sum(-1)
            total = total + view.graph(self._width)(z)[0] - outside - (normal - log_det)
        return total


def row_sweep(
    options: Mapping[str, Any], pair: LogWeights, answers: FitGuide, supply: Supply, width: int
) -> Sweep | None:
    """Passes over the rows by which a guide is trained outside Pyro; None where Pyro has to take the steps.

    That is where the guide has no rows, the user asks for an objective or an optimizer, the model has
    parameters or enumerates, or it cannot be recorded.
    """
    own = (options[name] is None for name in ("loss", "optim", "validation"))
    if not all(own) or options["compile"] != "auto" or pair.structure.model_params or pair.structure.enumerated:
        return None
    sweep: Sweep | None = answers.sweep(supply.epoch())
    if sweep is None:
        return None
    held = all(view.graph(width).holds for view in [*sweep.views(), sweep.rows.first_view()])
    return sweep if held else None


class RowStep(FlowStep):
    """A step on a page of rows.

    What all rows share moves by Adam on the flow's path gradient, with the page's rows counted N / B times.
    Rows move by an Adam of their own that knows how often each was drawn; one that is not drawn does not
    move.

    :param sweep: the pages.
    :param width: draws a step.
    :param limits: as of :class:`FlowStep`.
    """

    def __init__(self, sweep: Sweep, width: int, limits: Tensor) -> None:
        self._sweep, self._rows = sweep, sweep.rows
        self._view = view = self._rows.first_view()
        self._tables, layer = sweep.tables, view.layer
        self._turn(view.page.rows.clone(), None)
        self._keys = [key for key in trained_in_frame(layer) if key in dict(self._tables.named_parameters())]
        self._own = [moving_param(layer, key) for key in self._keys]
        self._orders = [order_of(layer, key) for key in self._keys]
        self._first = [torch.zeros_like(self._tables.table(key)) for key in self._keys]
        self._second = [torch.zeros_like(self._tables.table(key)) for key in self._keys]
        self._drawn = torch.zeros(self._tables.size, dtype=torch.long)
        self._epoch, self._position = torch.zeros(0, dtype=torch.long), 0
        self.shared: list[Tensor] = sweep.guide.params_of_page(view)
        """What is compared and averaged: all that is trained but the rows."""
        self._count_shared = sum(param.numel() for param in self.shared)
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

    def _turn(self, rows: Tensor, call: Call | None, real: Tensor | None = None) -> None:
        size = self._rows.plate.size
        weights: float | Tensor = size / len(rows)
        if real is not None and not bool(real.all()):
            weights = torch.where(real, size / float(real.sum()), 0.0)
        self._view.page.turn_to(rows, call, weights)
        self._tables.load(self._view.layer, rows)

    def turn(self, args: Any, kwargs: Any) -> None:
        """Shows the rows of the next step: those of a batch, or the next ones of a shuffled epoch."""
        if self._rows.plate.given:
            page, call, real = self._sweep.filled((args, kwargs))
            self._turn(page, call, real)
            self._shown = page[real]
            self._real = real
            return
        size, count = self._rows.plate.size, self._view.size
        if self._position + count > len(self._epoch):
            self._epoch, self._position = torch.randperm(size), 0
        self._shown = self._epoch[self._position : self._position + count]
        self._real = torch.ones(count, dtype=torch.bool)
        self._position += count
        self._turn(self._shown, None)

    def _move(self, grad: Tensor, lr: float) -> None:
        shared, *own = grad.split([self._count_shared, *(param.numel() for param in self._own)])
        kept = self._values[self._count_shared :].clone()
        moved = torch.zeros_like(grad)
        moved[: self._count_shared] = shared
        super()._move(moved, lr)
        self._values[self._count_shared :] = kept
        rows, real = self._shown, self._real
        self._drawn[rows] += 1
        weight = self._rows.plate.size / len(rows)
        for i, (key, part, param) in enumerate(zip(self._keys, own, self._own, strict=True)):
            dim, order = self._orders[i]
            slope = order.by_row(part.view(param.shape), dim)[real] / weight
            times = self._drawn[rows].to(slope).reshape(-1, *[1] * (slope.dim() - 1))
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
            "epoch": self._epoch,
            "position": self._position,
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over the rows of a checkpoint."""
        for key in self._keys:
            self._tables.table(key).copy_(state["tables"][key])
        for own, saved in zip((*self._first, *self._second), (*state["first"], *state["second"]), strict=True):
            own.copy_(saved)
        self._drawn.copy_(state["drawn"])
        self._epoch, self._position = state["epoch"], state["position"]


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
