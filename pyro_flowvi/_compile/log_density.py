"""A model's log density and gradient as a recorded graph: many points a call, without Pyro's own time."""

import functools
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from .._program.batching import in_parts
from .._program.log_density import REFUSALS, UnconstrainedModel
from .errors import CannotCompile, CompileWarning, users_level
from .run_by_operation import by_operation
from .simplify import copy, mutated, shared_memory
from .torch_private import private
from .trace import Traced, trace

__all__ = ["TracedDensity", "ValueAndGrad", "batch_memory", "log_densities", "record_batch", "traced"]

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Points, shape ``(P, D)``, to log densities ``(P,)`` and their gradients ``(P, D)``."""
WIDTH = 128
"""Points that a graph takes at once; fewer are filled up, more are taken in parts."""
NEAR = 1e-3
"""How much nearer to the start points are where the model refused some of those that it was recorded at."""
_REMEDY = (
    "; write the model so that it broadcasts over dimensions to the left of its own, as `a[..., group]` in "
    "place of `a[group]`, or write the operation another way"
)


class _Blame(fx.Interpreter):
    """Runs a graph and remembers the operation that failed."""

    failed: fx.Node | None = None

    def run_node(self, node: fx.Node) -> Any:
        try:
            return super().run_node(node)
        except Exception:
            self.failed = self.failed or node
            raise


def _unguarded(density: UnconstrainedModel) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """``density.value_and_grad``, of one point or many, that raises what the model raises."""

    def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = density.log_density(z)
            return value.detach(), torch.autograd.grad(value.sum(), z)[0]

    return value_and_grad


def _record_many(density: UnconstrainedModel, points: Tensor) -> Traced:
    """The graph of a batch of points, of a model that takes one at a time: that of one, under ``vmap``.

    :raises CannotCompile: naming the operation that has no batched form, and its line.
    """
    return record_batch(density, _unguarded(density), points)


def record_batch(density: UnconstrainedModel, function: Callable[..., Any], points: Tensor) -> Traced:
    """The graph of a function of one point of a model, ``(D,)``, to tensors, for a batch of points.

    :raises CannotCompile: naming the operation that has no batched form, and its line.
    """
    changing = density.changing
    one = trace(function, changing, [density.start])
    if one.pinned_args:
        raise CannotCompile("what the model does depends on the values of its latents", one.read_at)
    run = _Blame(batch_memory(one.graph)).run

    def many(z: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.vmap(functools.partial(run, *changing, *one.constants))(z)
        return found

    warn = private("_set_vmap_fallback_warning_enabled")
    try:
        warn(False)
        batch = trace(many, changing, [points])
    except CannotCompile as error:
        failed: fx.Node | None = run.__self__.failed  # type: ignore[attr-defined]
        if failed is None:
            raise
        line = _line_of(density, function, failed)
        raise CannotCompile(f"torch.vmap refuses {failed.target}", line) from error
    finally:
        warn(True)
    batch.pinned += one.pinned
    return batch


def _in_batches(value: Tensor, z: Tensor) -> Tensor:
    return value + torch.zeros_like(z.reshape(-1)[0]).to(value.dtype)


def batch_memory(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with one piece of memory for each point wherever it writes: vmap refuses to write many values
    where there was one."""
    nodes = copy(graph.graph)
    *_, z = nodes.find_nodes(op="placeholder")
    bases = set()
    for node in mutated(nodes):
        while (memory := shared_memory(node)) and not (
            node.target is operator.getitem and not shared_memory(memory[0])
        ):
            node = memory[0]
        bases.add(node)
    for node in bases:
        if node.op == "call_function":
            with nodes.inserting_after(node):
                own = nodes.call_function(_in_batches, (node, z))
            for user in [user for user in node.users if user is not own]:
                user.replace_input_with(node, own)
    return fx.GraphModule(torch.nn.Module(), nodes)


def _line_of(density: UnconstrainedModel, function: Callable[..., Any], node: fx.Node) -> str | None:
    """The user's line that made an operation, found by recording the graph once more."""
    again = trace(function, [], [density.start], lines=True)
    return next((n.meta.get("line") for n in again.graph.graph.nodes if n.name == node.name), None)


def _refused(error: BaseException | None) -> bool:
    """Whether a recording failed at a point where the model has no density."""
    while error is not None and not isinstance(error, REFUSALS):
        error = error.__cause__
    return error is not None


class TracedDensity:
    """``density.value_and_grad``, recorded once where that is possible.

    Before a graph is used it is compared with the model on points that it has not seen.  It holds for the
    very constants that the model reached then: where one was changed in place, the model itself is run.
    ``density.changing`` are none of them: the graph reads them at every call.

    :param density: the model.
    :param width: points that the graph takes at once.
    """

    def __init__(self, density: UnconstrainedModel, width: int = WIDTH) -> None:
        self.density, self.width = density, width
        self.size = 0
        """Operations of the graph; 0 without one."""
        self.cause: CannotCompile | None = None
        """Why there is no graph."""
        self._graph: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        self._pinned: list[tuple[Tensor, int]] = []
        offsets = torch.linspace(-1.0, 1.0, width, dtype=torch.float64).unsqueeze(-1)
        waves = torch.cos(torch.arange(density.dim, dtype=torch.float64))
        points = density.start + 0.5 * (offsets * waves).to(density.start)
        if density.subsampled:
            self.cause = CannotCompile("the model sees a random part of its data")
            return
        try:
            try:
                self._record(points)
            except CannotCompile as cause:
                if not _refused(cause):
                    raise
                self._record(density.start + NEAR * (points - density.start))
            self._compare(density.start + 0.3 * (offsets * waves.flip(0)).to(density.start))
        except CannotCompile as cause:
            self._graph, self.cause = None, cause

    @property
    def remedy(self) -> str:
        """What a user can do about a model that is run draw by draw, in words."""
        return _REMEDY if self.cause is not None and self.cause.line is not None else ""

    @property
    def batched(self) -> bool:
        """Whether many points take one run."""
        return self._graph is not None or self.density.batched

    def _record(self, points: Tensor) -> None:
        density = self.density
        many = _unguarded(density)
        changing = density.changing
        graph = trace(many, changing, [points]) if density.batched else _record_many(density, points)
        if graph.pinned_args:
            raise CannotCompile("what the model does depends on the values of its latents", graph.read_at)
        constants = graph.constants
        static = [*changing, *constants]
        self._graph = by_operation(graph.graph, static, [points], frozen=len(constants))
        self.size = graph.size
        self._pinned = [*graph.pinned, *((value, value._version) for value in constants)]

    def _compare(self, fresh: Tensor) -> None:
        """Holds the graph against the model: at all points together, or at a few that are run one by one."""
        if not self.density.batched:
            fresh = fresh[:: max(1, self.width // 4)]
        tolerance = 1e-6 if fresh.dtype == torch.float64 else 1e-3
        for one, other in zip(self(fresh), self.by_model(fresh), strict=True):
            if not torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True):
                raise CannotCompile("the graph's log densities differ from the model's")

    @property
    def holds(self) -> bool:
        """Whether there is a graph, and the constants are what they were."""
        return self._graph is not None and all(value._version == version for value, version in self._pinned)

    def by_model(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The same by the model itself."""
        return in_parts(self.density.value_and_grad, z, self.width)

    def exactly(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Of exactly ``width`` points, by a graph that holds."""
        assert self._graph is not None
        try:
            return self._graph(z.contiguous())
        except REFUSALS:
            return self.density.value_and_grad(z)

    def _fill_and_run(self, part: Tensor) -> tuple[Tensor, Tensor]:
        if len(part) == self.width:
            return self.exactly(part)
        filled = part.new_zeros(self.width, part.shape[1]) + part[:1]
        filled[: len(part)] = part
        value, gradient = self.exactly(filled)
        return value[: len(part)], gradient[: len(part)]

    @torch.no_grad()
    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities and gradients of points of shape ``(P, D)``."""
        return in_parts(self._fill_and_run, z, self.width) if self.holds else self.by_model(z)


def log_densities(density: UnconstrainedModel, z: Tensor) -> Tensor:
    """Log densities of points ``(P, D)``, shape ``(P,)``: in one run of the model, or by its graph."""
    return density.log_density(z) if density.batched else traced(density)(z)[0]


def traced(density: UnconstrainedModel, width: int = WIDTH) -> TracedDensity:
    """The graph of a density, made at the first call for a width.

    Warns where a model has to be run point by point.

    :param density: the model.
    :param width: points that the graph takes at once.
    """
    known = density.graphs.get(width)
    if known is None:
        known = density.graphs[width] = TracedDensity(density, width)
        if not known.batched and len(density.graphs) == 1:
            what = f"the model is run draw by draw, which takes long: {known.cause}{known.remedy}"
            warnings.warn(what, CompileWarning, stacklevel=users_level())
    return known
