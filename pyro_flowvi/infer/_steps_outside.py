"""Steps taken outside Pyro: those of a flow, or of pages of rows, where model and flow are graphs."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from .._compile.errors import CannotCompile
from .._compile.flow_step import FlowStep
from .._compile.indexed_step import IndexedStep
from .._compile.log_density import TracedDensity
from .._compile.mixture_step import MixtureStep, SingleStep
from .._compile.policy import MACHINE_CODE_FROM
from .._program.log_density import UnconstrainedModel
from .._program.log_weights import LogWeights
from .._types import Program
from ..autoguide._protocol import FitGuide
from ..autoguide._sweep import Sweep
from ..autoguide.flow_mixture import WeightedStack
from ..transforms import IndexedCompose
from ._flow_steps import FlowSteps, objects_in, steady_graph, trains_flow
from ._minibatches import AllData
from ._row_steps import RowStep, RowSteps
from ._run_state import Run

__all__ = ["recorded", "steps_outside", "trained_outside"]

RECORDED_FROM = 50
"""Steps from which a flow is recorded: it takes as long as some tens of eager ones."""


def recorded(
    options: Mapping[str, Any], pair: LogWeights, answers: FitGuide, density: UnconstrainedModel | None
) -> TracedDensity | None:
    """The graph by which a flow is trained outside Pyro; None where Pyro has to take the steps."""
    if density is None or options["batches"] is not None or pair.structure.subsampled:
        return None
    if pair.vectorized and not RECORDED_FROM <= options["num_steps"] <= MACHINE_CODE_FROM:
        return None  # a few steps cost less than a graph, and for very many machine code pays
    if not trains_flow(options, pair, answers, density):
        return None
    default = answers.fit_options()
    draws = (options["num_particles"] or default.num_particles) * default.num_components
    return steady_graph(density, draws, [options["model"], *objects_in(pair.args, pair.kwargs)])


def steps_outside(
    graph: TracedDensity | None,
    data: AllData | None,
    sweep: Sweep | None,
    answers: FitGuide,
    run: Run,
    width: int,
) -> FlowSteps | None:
    """The steps of a flow in the place where it is now; None where a rank cannot take them so."""
    steps: FlowSteps | None = None
    with suppress(CannotCompile):
        if sweep is not None:
            steps = RowSteps(RowStep(sweep, width, run.optim.limits))
        else:
            params = trained_outside(graph or data, None, answers, run.model)
            flow = answers.trained_map(run.model)
            seen = graph if data is None else data.minibatches(flow, width)
            if seen and params:
                steps = FlowSteps(_kind_of(flow)(flow, params, seen, run.optim.limits, ranks=run.ranks))
    if run.ranks.every(steps is not None):
        return steps
    if steps is not None:
        steps.leave()
    if sweep is not None:
        sweep.tables.gather(run.ranks)
    return None


def _kind_of(flow: Any) -> type[FlowStep]:
    """The kind of step that a flow takes, or several."""
    if isinstance(flow, IndexedCompose):
        return IndexedStep
    if not isinstance(flow, WeightedStack):
        return FlowStep
    return MixtureStep if len(flow.logits) > 1 else SingleStep


def trained_outside(
    graph: TracedDensity | AllData | None, sweep: Sweep | None, answers: FitGuide, model: Program
) -> list[Tensor]:
    """The parameters that are trained outside Pyro; none where it takes the steps."""
    if sweep is not None:
        found: list[Tensor] = sweep.guide.params_of_page(sweep.rows.first_view())
        return found
    flow = None if graph is None else answers.trained_map(model)
    return [] if flow is None else [param for param in flow.parameters() if param.requires_grad]
