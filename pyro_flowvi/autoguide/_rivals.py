"""A short training of a guide, to see which of two forms of it is the better one."""

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .._compile.errors import CannotCompile
from .._compile.flow_step import FlowStep
from .._compile.log_density import traced
from .._program.log_density import UnconstrainedModel
from ..init import Effort

__all__ = ["falls_behind", "trained_weights", "weights_of"]

NUM_DRAWS = 512
WARM_UP, FINAL_RATE = 10, 0.05
"""Steps over which the learning rate rises, and the share of it that is left in the end."""
UNCERTAIN = 100.0
"""The standard error of an ELBO above which a few draws rule it."""


@torch.no_grad()
def weights_of(guide: Any, density: UnconstrainedModel) -> Tensor:
    """Log weights of draws, of the same noise at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z, log_q = guide.draw_latent(NUM_DRAWS)
    weights: Tensor = traced(density, guide.fit_options().num_particles)(z)[0] - log_q
    return weights


def trained_weights(guide: Any, density: UnconstrainedModel, effort: Effort, num_steps: int) -> Tensor:
    """Log weights after a search for a start and a number of steps; the guide keeps what it has learned."""
    guide.move_to_start(density, effort)
    options, flow = guide.fit_options(), guide.pushforward(guide._raw_model[0])
    params = [] if flow is None else [param for param in flow.parameters() if param.requires_grad]
    step = None  # without one the start alone is compared
    with suppress(CannotCompile):
        step = None if flow is None else FlowStep(flow, params, traced(density, options.num_particles))
    if step is not None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for i in range(num_steps):
                fall = FINAL_RATE + (1.0 - FINAL_RATE) * 0.5 * (1.0 + math.cos(math.pi * i / num_steps))
                step(options.lr * fall * min(1.0, (i + 1) / WARM_UP))
        step.leave()
    guide.leave_frame()
    return weights_of(guide, density)


def falls_behind(weights: Tensor, others: Tensor) -> bool:
    """Whether the mean of log weights is lower than that of others, beyond twice its standard error.

    One draw that lies farther off than all others together makes the error as large as the gap, however large
    that is: a mean that is told to no better than :data:`UNCERTAIN` nats, unlike the other one, falls behind.
    """
    own, other = weights.isfinite(), others.isfinite()
    if int(own.sum()) != int(other.sum()):
        return bool(own.sum() < other.sum())
    gap = others[other].mean() - weights[own].mean()
    errors = torch.stack([weights[own].var(), others[other].var()]).sqrt() / math.sqrt(max(1, int(own.sum())))
    unknown = errors[0] > UNCERTAIN > errors[1]
    return bool(gap > (0.0 if unknown else 2.0 * errors.square().sum().sqrt()))
