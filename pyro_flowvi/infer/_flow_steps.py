"""The steps and comparisons of a fit without Pyro: where a guide is a flow of standard normal noise, and the
model a density that can be recorded."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor
from torch.utils import _pytree as pytree

from .._compile.flow_step import FlowStep
from .._compile.log_density import TracedDensity, traced
from .._compile.parts_density import WholeDensity
from .._compile.places import PLAIN
from .._compile.policy import Mode
from .._compile.preflight import generators
from .._compile.reached_state import ReachedState
from .._compile.step import StepStats
from .._program.call import is_handler
from .._program.log_density import UnconstrainedModel
from .._program.log_weights import LogWeights
from .._program.pyro_private import PYRO_STACK
from .._program.scoring import Scoring
from ..autoguide._protocol import FitGuide

__all__ = ["FlowSteps", "FlowWeights", "has_scores", "objects_in", "steady_graph", "trains_flow"]

MANY_LATENTS = 500
"""Latents from which roots are nearly normal, and steps cost more."""


def _sources() -> tuple[Any, ...]:
    """The states of all generators that a program may draw from."""
    return torch.get_rng_state().tolist(), *generators()


def steady_graph(density: UnconstrainedModel, width: int, programs: Sequence[Any]) -> TracedDensity | None:
    """The graph of a density, of a program that is the same at every call; None where there is none.

    :param density: the model.
    :param width: points at once.
    :param programs: the model, and arguments that are objects.
    """
    if PYRO_STACK or torch.is_autocast_enabled("cpu"):
        return None  # what a handler or a mode does to the model is for eager Pyro to say
    graph = traced(density, width)
    if not graph.holds:
        return None
    reached = ReachedState(*(p for p in programs if not isinstance(p, Tensor)))
    point, before = density.start.unsqueeze(0), _sources()
    one, other = (density.value_and_grad(point) for _ in "12")
    same = all(torch.allclose(a, b, equal_nan=True) for a, b in zip(one, other, strict=True))
    if not same or _sources() != before or reached.settle():
        return None
    return graph


def has_scores(guide: Any, args: Any, kwargs: Any) -> bool:
    """Whether a guide of flows can carry scores forward: a foreign transform may have no inverse.

    Not one of Pyro's handlers, which path gradients do not take.
    """
    if is_handler(guide):
        return False
    with torch.random.fork_rng(), poutine.block(), Scoring():
        try:
            poutine.trace(guide).get_trace(*args, **kwargs)
        except NotImplementedError:
            return False
    return True


def trains_flow(
    options: Mapping[str, Any], pair: LogWeights, answers: FitGuide, density: UnconstrainedModel
) -> bool:
    """Whether a flow can be trained outside Pyro.

    Not where the user asks for an objective, an optimizer or other data for comparisons, the model has
    parameters, or the guide is neither a flow of standard normal noise over all latents nor several.
    """
    own = (options[name] is None for name in ("loss", "optim", "validation"))
    if not all(own) or options["compile"] != "auto" or pair.structure.model_params:
        return False
    if set(pair.structure.latents) != set(density.packing.latents):
        return False
    model = options["model"]
    return answers.trained_map(model) is not None and has_scores(pair.guide, pair.args, pair.kwargs)


class FlowWeights:
    """Log weights of draws of a guide, by the graph of its model's density.

    Stands in for :class:`LogWeights` where states are compared.

    :param pair: model and guide.
    :param guide: the guide's answers.
    :param density: the graph.
    """

    vectorized = True

    def __init__(self, pair: LogWeights, guide: FitGuide, density: TracedDensity | WholeDensity) -> None:
        self.structure = pair.structure
        self.last_draws: Tensor | None = None
        """What is watched of the draws of the last weights, ``(num_samples, D)``."""
        self._guide, self._density = guide, density
        self.watches = guide.watched() is not None
        """Whether these are some of the latents only."""
        self.several = guide.fit_options().num_components > 1
        """Whether moments are those of several flows together, which say little of each."""

    @property
    def patient(self) -> bool:
        """Whether a run has to take its last round: roots have long tails, of which weights say little."""
        few = self.watches and self._density.density.dim < MANY_LATENTS
        return few and self._guide.has_long_tails()

    @torch.no_grad()
    def log_weights(self, num_samples: int) -> Tensor:
        """log p(x, z) - log q(z) of independent draws, shape ``(num_samples,)``."""
        drawn = self._guide.draw_latent(num_samples)
        assert drawn is not None
        z, log_q = drawn
        watched = self._guide.watched()
        self.last_draws = z if watched is None else z[:, watched]
        return self._density(z)[0] - log_q

    def last_values(self) -> Tensor | None:
        """Of the last draws the positive latents themselves, ``(num_samples, P)``; None if unknown.

        A tail that is short of logarithms may be long of them.
        """
        if self.last_draws is None:
            return None
        logarithms, watched = self._density.density.packing.logarithms(), self._guide.watched()
        of_these = logarithms if watched is None else logarithms[watched]
        return self.last_draws[:, of_these.to(self.last_draws.device)].exp()


class FlowSteps:
    """Takes the steps of a fit by a :class:`FlowStep`, as a stepper does.

    :param step: the step.
    """

    mode: Mode = "flow"

    def __init__(self, step: FlowStep) -> None:
        self._step = step
        self.started = False
        self.rate = math.nan
        """The learning rate of the next steps."""

    @property
    def compared(self) -> list[Tensor]:
        """The parameters by which states differ that are compared and averaged."""
        return self._step.params

    def resume(self, mode: Mode | None) -> None:
        """Goes on from a checkpoint.

        :raises ValueError: if that run took its steps another way.
        """
        if mode != self.mode:
            raise ValueError(f"checkpoint: expected steps of the kind {self.mode!r}, got {mode!r}")
        self.started = True

    def take(self, svi: SVI, args: Any, kwargs: Any, count: int, left: int | None) -> list[StepStats]:
        """Takes up to ``count`` steps; stops after a loss that is not finite."""
        self.started, found = True, list[StepStats]()
        for _ in range(count):
            found.append(self._step(self.rate))
            if not math.isfinite(found[-1].loss):
                break
        return found

    def forget(self) -> None:
        """Sets the optimizer's moments to zero."""
        self._step.forget()

    def leave(self) -> None:
        """Gives the parameters back their own memory."""
        self._step.leave()

    def state(self) -> dict[str, Any]:
        """The optimizer's moments and the place in the data, for a checkpoint."""
        return self._step.kept()

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self._step.go_on(state)

    def rows(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of the rows of this rank; None without any."""
        return None

    def load_rows(self, state: dict[str, Any]) -> None:
        """Takes over the rows of a checkpoint, of which there are none."""


def objects_in(args: Any, kwargs: Any) -> list[Any]:
    """Arguments that are neither tensors nor plain values."""
    leaves = pytree.tree_leaves((args, kwargs))
    return [leaf for leaf in leaves if not isinstance(leaf, (Tensor, *PLAIN))]
