"""A gradient step of a flow on a model's density, without Pyro.

Draws with their score, the model's graph at the draws, the flow's path gradient, Adam on flat parameters.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .._program.log_density import REFUSALS
from .._ranks import ALONE, Ranks
from ..distributions.flow import standard_normal_log_prob
from ..transforms._fused import pass_through
from ..transforms.base import forward_with_score, vector_jacobian
from .errors import CannotCompile
from .log_density import TracedDensity
from .optimizers import Rule, flatten
from .parts_density import MinibatchDensity
from .run_by_operation import as_function, without_repetition
from .step import StepStats
from .trace import trace

__all__ = ["FlowStep", "call_between"]

TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
"""How far the graph's results may be from the modules', relative to their norm."""
PERTURBATION = 1e-2
WIDTHS = 1.0, 0.1
LOG_2_PI = math.log(2.0 * math.pi)
_ADAM = Rule()


Weights = Callable[[], Tensor | None]
"""How much the density of each number of the noise counts, ``(D,)``; None for all alike."""


def _alike() -> None:
    """The weights of numbers that count alike."""


def _log_prob_and_score(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The log density of noise, and its gradient."""
    if weights is None:
        return standard_normal_log_prob(x), -x
    return -0.5 * ((x.square() + LOG_2_PI) * weights).sum(-1), -x * weights


def _draw_and_pull_back(
    transform: Any, params: Sequence[Tensor], weights: Weights, x: Tensor, slope: Tensor
) -> tuple[Tensor, ...]:
    """Images of noise, their log densities and scores, and the gradient of ``(slope * z).sum()``."""
    log_prob, score = _log_prob_and_score(x, weights())
    flow = pass_through(transform, x, score)
    log_q = log_prob - flow.log_det
    grads = flow.pull(slope)[1]
    return flow.image, log_q, flow.score, flatten(grads.get(p, torch.zeros_like(p)) for p in params)


def _by_autograd(
    transform: Any, params: Sequence[Tensor], weights: Weights, x: Tensor, slope: Tensor
) -> tuple[Tensor, ...]:
    """The same as the modules have it."""
    log_prob, score = _log_prob_and_score(x, weights())
    with torch.enable_grad():
        rows = x.detach().requires_grad_()
        z, log_det, score = forward_with_score(transform, rows, score)
        log_q = log_prob - log_det
        grads = vector_jacobian([z], [slope], params)
    known = (torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True))
    return z.detach(), log_q.detach(), score.detach(), flatten(known)


class FlowStep:
    """Steps of Adam on the path gradient of the ELBO of a flow of standard normal noise.

    The estimator of :class:`~pyro_flowvi.objectives.TraceSTL_ELBO` (Roeder, Wu and Duvenaud 2017, equation 6;
    the score along the forward pass by Vaitl et al. 2024), of which the flow is run once a step.

    :param transform: from noise to the model's unconstrained latents.
    :param params: its parameters that are trained.
    :param density: the model, whose width is the number of particles.
    :param limits: two norms: a gradient above the first is scaled down to it, one above the second, or not
        finite, moves nothing.
    :param changing: tensors that flow and model reach whose numbers are replaced in place between steps.
    :param noise_weights: how much the density of each number of the noise counts.
    :param ranks: the processes over which gradients are averaged.
    :raises CannotCompile: if the flow does what a graph cannot hold, or the graph differs from it.
    """

    def __init__(
        self,
        transform: Any,
        params: list[Tensor],
        density: TracedDensity | MinibatchDensity,
        limits: Tensor | None = None,
        changing: Sequence[Tensor] = (),
        noise_weights: Weights = _alike,
        ranks: Ranks = ALONE,
    ) -> None:
        self._transform, self.params, self._density, self.ranks = transform, params, density, ranks
        self._changing, self._weights = list(changing), noise_weights
        self._limits = torch.full((2,), math.inf, dtype=torch.float64) if limits is None else limits
        self._homes = [param.data for param in params]
        self._values = flatten(params).detach().clone()
        parts = self._values.split([param.numel() for param in params])
        for param, part in zip(params, parts, strict=True):
            param.data = part.view(param.shape)
        self.moments: tuple[Tensor, Tensor] = (torch.zeros_like(self._values), torch.zeros_like(self._values))
        self.count = 0
        """Steps that the moments are of."""
        self._loss, self._dropped = math.nan, 0
        self._noise: dict[str, Any]
        self._slope: dict[str, Any]
        self._live = params
        """The parameters that a graph reads."""
        self._set_up(params[0])
        try:
            self._run = self._record()
            self._check()
        except BaseException:
            self.leave()
            raise

    def _set_up(self, like: Tensor) -> None:
        """What the noise of a step is like, and the slope of its loss at the draws."""
        size = (self._density.width, self._density.density.dim)
        self._noise = self._slope = {"size": size, "dtype": like.dtype, "device": like.device}

    @torch.no_grad()
    def leave(self) -> None:
        """Gives the parameters back the memory that they had, with their present values."""
        for param, home in zip(self.params, self._homes, strict=True):
            if param.data_ptr() != home.data_ptr():
                home.copy_(param)
                param.data = home

    def kept(self) -> dict[str, Any]:
        """The optimizer's moments and the place in the data, for a checkpoint."""
        density = self._density
        data = density.state() if isinstance(density, MinibatchDensity) else None
        return {"moments": [m.clone() for m in self.moments], "count": self.count, "data": data}

    def go_on(self, kept: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        for own, saved in zip(self.moments, kept["moments"], strict=True):
            own.copy_(saved)
        self.count = kept["count"]
        if isinstance(self._density, MinibatchDensity):
            self._density.load(kept["data"])

    def forget(self) -> None:
        """Sets the moments to zero."""
        self.count = 0
        for moment in self.moments:
            moment.zero_()

    def _pass(self, x: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
        """Draws, their log densities and scores, and the gradient of a loss of that slope: as recorded."""
        return _draw_and_pull_back(self._transform, self._live, self._weights, x, slope)

    def _reference(self, x: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
        """The same as the modules have it."""
        return _by_autograd(self._transform, self._live, self._weights, x, slope)

    def _record(self) -> Any:
        x, slope = torch.randn(**self._noise), torch.randn(**self._slope)
        graph = trace(self._pass, [*self._live, *self._changing], [x, slope])
        if graph.pinned_args:
            raise CannotCompile("what the flow does depends on the values of its noise")
        static = [*(p.detach() for p in self._live), *self._changing, *graph.constants]
        nodes, held = without_repetition(graph.graph, static, [x, slope], frozen=len(graph.constants))
        call_between(nodes, len(static), self._weigh)
        self.size = sum(node.op == "call_function" for node in nodes.nodes)
        return as_function(nodes, static, held)

    def _model_at(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The model's log densities of draws, and their gradients."""
        return self._density.exactly(z) if self._density.holds else self._density(z)

    def _weigh(self, z: Tensor, log_q: Tensor, score: Tensor) -> Tensor:
        """The model at draws: keeps loss and number of dropped draws; the slope of the loss at each."""
        value, gradient = self._model_at(z)
        weights = value - log_q
        slope = (score - gradient).mul_(1.0 / len(z))
        loss = -weights.mean().item()
        self._dropped = 0
        if not (math.isfinite(loss) and math.isfinite(slope.sum().item())):
            good = weights.isfinite() & slope.isfinite().all(-1)
            count = int(good.sum())
            self._dropped = len(z) - count
            slope = torch.where(good.unsqueeze(-1), slope, 0.0).mul_(len(z) / max(count, 1))
            loss = -float(weights[good].mean()) if count else math.nan
        self._loss = loss
        return slope.to(z.dtype)

    def _check(self) -> None:
        """Holds the graph against the modules at other noise and, for a moment, other parameters.

        :raises CannotCompile: if they differ, at noise close to zero as well, where no draw is so far out
            that the two round apart.
        """
        if not any(self._agrees(width) for width in WIDTHS):
            raise CannotCompile("the flow's graph differs from the flow")

    def _agrees(self, width: float) -> bool:
        """Whether graph and modules give the same gradient at noise of a standard deviation."""
        kept = self._values.clone()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            x = width * torch.randn(**self._noise)
            self._values += PERTURBATION * (1.0 + kept.abs()) * torch.randn_like(kept)
            try:
                found = self._run(x)[0].clone()
                z, log_q, score, _ = self._reference(x, torch.zeros(**self._slope))
                if isinstance(self._density, MinibatchDensity):
                    self._density.repeat()
                slope = self._weigh(z, log_q, score)
                expected = self._reference(x, slope)[-1]
            finally:
                self._values.copy_(kept)
        finite = expected.isfinite()
        gap, size = (float(value[finite].norm()) for value in (found - expected, expected))
        tolerance = TOLERANCE.get(x.dtype, 5e-2)
        return torch.equal(finite, found.isfinite()) and gap <= tolerance * (1.0 + size)

    @torch.no_grad()
    def __call__(self, lr: float) -> StepStats:
        """Takes a step at a learning rate."""
        grad = self._gradient()
        norm = self._norm(grad)
        clip, skip = self._limits.tolist()
        if not math.isfinite(norm):
            return StepStats(math.nan, self._dropped, norm)
        if math.isfinite(self._loss) and norm <= skip:
            self.count += 1
            self._move(grad.mul_(clip / norm) if norm > clip else grad, lr)
        return StepStats(self._loss, self._dropped, norm)

    def _gradient(self) -> Tensor:
        """The gradient of the loss at new noise, averaged over the ranks; keeps the loss."""
        noise = torch.randn(**self._noise)
        if self.ranks.alone:
            found: Tensor = self._run(noise)[0]
            return found
        try:
            grad = self._run(noise)[0]
        except Exception as error:
            grad = self._without_gradient()
            if not isinstance(error, REFUSALS):
                raise
            return grad
        return self._average(grad)

    def give_up(self) -> StepStats:
        """A step that this rank cannot take."""
        self._without_gradient()
        return StepStats(math.nan, self._dropped, math.nan)

    def _without_gradient(self) -> Tensor:
        """Tells the others, who wait, that there is none."""
        self._loss = math.nan
        return self._average(torch.full_like(self._values, math.nan))

    def _average(self, grad: Tensor) -> Tensor:
        """The mean of the ranks' gradients; keeps that of their losses."""
        grad, self._loss, self._dropped = self.ranks.average(grad, self._loss, self._dropped)
        return grad

    def _norm(self, grad: Tensor) -> float:
        """The norm that is held against the limits."""
        return float(torch.linalg.vector_norm(grad))

    def _move(self, grad: Tensor, lr: float) -> None:
        """Changes the values by a gradient."""
        self._values += _ADAM.change(grad, *self.moments, self.count, lr)


def call_between(nodes: fx.Graph, num_static: int, weigh: Any) -> None:
    """Replaces a graph's second argument by what a function makes of its first three results.

    These stay no results: the graph gives the gradient alone.
    """
    placeholders = list(nodes.find_nodes(op="placeholder"))
    slope = placeholders[num_static + 1]
    output = next(iter(nodes.find_nodes(op="output")))
    z, log_q, score, grad = output.args[0]
    needed, pending = set[fx.Node](), [z, log_q, score]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    if slope in needed:
        raise CannotCompile("the flow's draws depend on what is done with them")
    # As it was recorded: what depends on the slope comes later.
    with nodes.inserting_after(max(needed - set(placeholders))):
        weighed = nodes.call_function(weigh, (z, log_q, score))
    slope.replace_all_uses_with(weighed)
    nodes.erase_node(slope)
    output.args = ((grad,),)
    nodes.lint()
