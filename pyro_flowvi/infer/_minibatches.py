"""Fits to minibatches where no latent stands under the plate: start and comparisons know all data."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._compile.log_density import traced
from .._compile.parts_density import MinibatchDensity, WholeDensity
from .._program.data_in_parts import DataInParts, in_batches, in_rows, row_plate
from .._program.log_density import UnconstrainedModel
from .._program.log_weights import LogWeights
from .._ranks import Ranks
from ..autoguide._protocol import FitGuide
from ..init import Effort, Gaussian, find_gaussian
from ..init.from_all_data import effort_of, find_in_frame
from ._batches import Supply, as_call_with
from ._flow_steps import objects_in, steady_graph, trains_flow

__all__ = ["AllData", "all_data"]

ROWS = 2000
"""Rows of a part, where the model sees as many as it is told: with fewer, a step costs hardly less."""
MOST_NUMBERS = 2**23
"""Numbers of a part that 64 draws make at each of its sites, at most."""
FEW = 62_500
"""Numbers in all data up to which a search reads all of them for every point."""


class AllData:
    """All data of a model of which each step sees a part.

    :param parts: what a step sees, and a pass reads one after another; those of this rank.
    :param numbers: in all data, as far as the model's sites tell.
    :param ranks: the processes that have the rest.
    """

    def __init__(self, parts: DataInParts, numbers: int, ranks: Ranks) -> None:
        self._parts, self.numbers = parts, numbers
        self.whole = WholeDensity(parts, ranks)
        self.density = parts.densities[parts.put(0)]
        """The first part as if it stood for all; its search goes on with the others."""
        self.density.search = self._search

    def _search(self, effort: Effort) -> Gaussian:
        """The best Gaussian for all data."""
        start, dim = self.density.start, self.density.dim
        if self.numbers <= FEW:
            return find_gaussian(self.whole, start, Effort.within(self.numbers, dim))
        self._parts.put(0)
        rough = find_gaussian(traced(self.density, effort.starts), start, replace(effort, refinements=(0, 0)))
        rough = self.whole.ranks.same(rough)  # each has found that of its own first part
        return find_in_frame(self.whole, rough, effort_of(self.numbers * dim))

    @torch.no_grad()
    def minibatches(self, flow: Any, width: int) -> MinibatchDensity:
        """The density that steps see, with the flow's centre as the point at which all data are known."""
        center: Tensor = flow(self.density.start.new_zeros(1, self.density.dim))
        return MinibatchDensity(self._parts, self.whole, center[0], width)


def all_data(
    options: Mapping[str, Any],
    pair: LogWeights,
    answers: FitGuide,
    density: UnconstrainedModel | None,
    supply: Supply,
    ranks: Ranks,
) -> AllData | None:
    """The data of a model that sees its rows in parts; None where a pass over all of them cannot be made.

    :param options: of :func:`pyro_flowvi.fit`.
    :param supply: of the model's arguments.
    :param ranks: the processes, each of which reads a part.
    """
    changing = options["batches"] is not None
    if density is None or not (changing or pair.structure.subsampled) or not answers.can_move():
        return None
    if answers.pushforward(options["model"]) is None or not trains_flow(options, pair, answers, density):
        return None
    model, args, kwargs = options["model"], pair.args, pair.kwargs
    numbers = pair.structure.largest
    parts: DataInParts | None = None
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same order of a loader at every call
        if changing:
            parts = in_batches(density, model, supply.part(), partial(as_call_with, supply.kwargs))
            numbers *= 0 if parts is None else len(parts) * ranks.size
        elif (plate := row_plate(model, args, kwargs)) is not None:
            per_row = -(-numbers // plate.shown)
            size = min(ROWS, MOST_NUMBERS // (64 * per_row))
            own = ranks.part(plate.size)
            if len(own):
                parts = in_rows(density, model, plate, size, own)
            numbers = per_row * plate.size
    if parts is not None:
        first = parts.densities[parts.put(0)]
        if steady_graph(first, 1, [model, *objects_in(args, kwargs)]) is None:
            parts = None
    if not ranks.every(parts is not None) or parts is None:
        return None
    parts.divide(ranks)
    return AllData(parts, ranks.same(numbers), ranks)
