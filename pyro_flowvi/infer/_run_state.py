"""The state of one run of :func:`pyro_flowvi.fit`: parameters, the best values so far, what went wrong."""

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.utils import _pytree as pytree

from .._compile.optimizers import meet
from .._noise import noise_state, set_noise_state
from .._program.log_density import REFUSALS
from .._program.log_weights import LogWeights
from .._program.pyro_private import get_traces
from .._ranks import ALONE, Ranks
from .._types import Program
from ._averaging import put_back, snapshot
from ._batches import Call
from ._flow_steps import FlowWeights
from ._guarded_optim import GuardedOptim

__all__ = ["Run", "is_worse"]

COMPARISON_DRAWS = 256
"""Draws on which two states of a guide are compared, with common random numbers."""
SMALL_BATCH = 16
COMPARISON_DRAWS_APART = 16
"""The same where the model cannot run them together."""
GAP_DRAWS = 8
"""Draws from which the distance to the posterior is estimated, as a multiple of those of a comparison."""
NOISE = 2.0
"""Standard errors of a weighted mean that are taken for chance."""
WATCHED = 4.0
"""How much more a movement counts of the latents that are watched, whose weights stand for all others too."""
MOST_MOVED = 0.05
"""How much the draws' weights may move a mean, in standard deviations, or a log scale, for a run to end."""
MOST_CHANGED = 0.03
"""Relative change of a standard deviation, noise included, that passes for none."""
OUTLIER = 10.0
"""Multiples of the median change of a log weight beyond which a fall counts as so much and no more."""


class Distance(NamedTuple):
    """How far a guide is from the posterior, as far as the weights of its draws tell."""

    gap: float
    """Nats by which the ELBO is below the evidence, the larger of two estimates: half the variance of the log
    weights, as of normal ones; the logarithm of their mean less the mean of the logarithms."""
    moved: float | None
    """By how much the weights move a latent: its mean in standard deviations, the logarithm of its standard
    deviation; the largest of all.  None where the draws are not known."""
    tells: bool = True
    """Whether the weights tell that the scales of positive latents, which may have long tails, are right, and
    those of each of several flows."""

    @property
    def is_known(self) -> bool:
        """Whether the gap is not all that there is to go by."""
        return self.moved is not None and self.tells

    @property
    def moves_little(self) -> bool:
        """Whether no latent is moved, as far as the draws are known."""
        return self.moved is None or self.moved < MOST_MOVED

    def is_within(self, tolerance: float) -> bool:
        """Whether a run may end here."""
        # In one dimension a scale may be off by a sixth within 0.03 nats.
        return self.gap < (tolerance if self.is_known else tolerance / 3.0) and self.moves_little


def _moved_by(z: Tensor, shares: Tensor, chance: float) -> float:
    """:attr:`Distance.moved` of draws with shares of the weight, beyond so many standard errors."""
    # Where few weights carry most, they move a mean by chance.
    noise = float((shares.square().sum() - 1.0 / len(shares)).clamp(min=0.0).sqrt())
    mean, sd = z.mean(0), z.std(0)
    weighted = shares @ z
    scale = (shares @ (z - weighted).square()).sqrt()
    moved = torch.stack([(weighted - mean) / sd, (scale / sd).log()])
    return max(0.0, float(moved.abs().nan_to_num(math.inf).max()) - chance * noise)


def _scales_are_right(x: Tensor, shares: Tensor) -> bool:
    """Whether weights change no sd of positive values, as far as the noise of these lets tell."""
    squares = (x - x.mean(0)).square()
    term, apart = 0.5 * squares / squares.mean(0), shares - 1.0 / len(shares)
    changes, noise = (apart @ term).abs(), (apart.square() @ (term - 0.5).square()).sqrt()
    return bool((changes + noise < MOST_CHANGED).all())


@dataclass
class Run:
    """One run: the pair, its data and the best state so far.

    :param judge: draws on whose weights states are compared: on validation data if there are any.
    :param ranked: whether states can be compared.
    :param comparison_draws: draws of a comparison.
    :param held_out: whether states are compared on data that they are not trained on.
    :param ranks: the processes that train together; what is compared is the same on all of them.
    """

    model: Program
    guide: Program
    loss: Any
    judge: LogWeights | FlowWeights
    optim: GuardedOptim
    ranked: bool
    comparison_draws: int = COMPARISON_DRAWS
    held_out: bool = False
    ranks: Ranks = ALONE
    losses: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_weights: Tensor = field(default_factory=lambda: torch.full((1,), -math.inf))

    def evaluate(self, multiple: int = 1, seed: int = 0) -> Tensor:
        """Log weights on draws that are the same at every call; their mean is the ELBO.

        A state that the model cannot evaluate has the ELBO minus infinity.

        :param multiple: how many times as many draws as in a comparison.
        :param seed: of the draws.
        """
        size = multiple * (self.comparison_draws if self.judge.vectorized else COMPARISON_DRAWS_APART)
        with torch.random.fork_rng(), pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            try:
                weights = self.judge.log_weights(size)
            except REFUSALS:
                parts = torch.arange(size).split(SMALL_BATCH)
                weights = torch.cat([self._few_weights(len(part)) for part in parts])
        weights = weights.nan_to_num(-math.inf, -math.inf, -math.inf)
        self.ranks.lead(weights)
        return weights

    def _few_weights(self, size: int) -> Tensor:
        """Log weights of a few draws, minus infinity if the model refuses one of them."""
        try:
            return self.judge.log_weights(size)
        except REFUSALS:
            return torch.full((size,), -math.inf)

    def distance(self, multiple: int = GAP_DRAWS, chance: float = NOISE) -> Distance:
        """An estimate of how far the guide is from the posterior, on draws of its own.

        :param multiple: how many times as many draws as in a comparison.
        :param chance: standard errors of a weighted mean that are taken for chance.
        """
        return self.ranks.same(self._distance(multiple, chance))  # type: ignore[no-any-return]

    def _distance(self, multiple: int, chance: float) -> Distance:
        weights = self.evaluate(multiple, seed=7).double()
        good = weights.isfinite()
        if int(good.sum()) < 2:
            return Distance(math.inf, None)
        kept = weights[good]
        bound = kept.logsumexp(0) - math.log(len(kept)) - kept.mean()
        gap = max(0.5 * float(kept.var()), float(bound))
        if not isinstance(self.judge, FlowWeights) or self.judge.last_draws is None:
            return Distance(gap, None)
        shares = kept.softmax(0)
        moved = _moved_by(self.judge.last_draws[good].double(), shares, chance)
        values = self.judge.last_values()
        tells = values is None or _scales_are_right(values[good].double(), shares)
        tells = tells and not self.judge.several
        return Distance(gap, WATCHED * moved if self.judge.watches else moved, tells)

    def keep_unless_worse(self) -> Tensor:
        """Keeps the present state as the best, unless an earlier one is better beyond its noise.

        :return: its log weights.
        """
        weights = self.evaluate()
        if not (self.best and self.ranked and is_worse(weights, self.best_weights)):
            self.best_weights = weights
            self.best = snapshot(self.optim.params)
        return weights

    def keep_start(self, params: list[Tensor] | None = None) -> None:
        """Makes the state before the first step the best so far.

        :param params: those that are stepped without the optimizer, all that there are.
        """
        if params is None:
            self.optim.meet_trained(self.judge.structure.params)
            meet(self.optim.optim, self.optim.params.values())
        else:
            self.optim.meet(params)
        self.keep_unless_worse()

    @contextmanager
    def best_in_place(self) -> Iterator[None]:
        """With the best state in place of the present one."""
        present = snapshot(self.optim.params)
        put_back(self.optim.params, self.best)
        try:
            yield
        finally:
            put_back(self.optim.params, present)

    @property
    def best_loss(self) -> float:
        return -float(self.best_weights.mean())

    def restore(self) -> None:
        """Puts the best state back; what it does not know yet goes back to where it started."""
        put_back(self.optim.params, self.optim.first | self.best)

    def has_float32(self, call: Call) -> bool:
        """Whether parameters or arguments of the model are float32."""
        leaves = [*self.optim.params.values(), *pytree.tree_leaves(call)]
        return any(isinstance(leaf, Tensor) and leaf.dtype == torch.float32 for leaf in leaves)

    def find_site(self, call: Call, noise: list[Tensor], cause: Exception | None) -> str | None:
        """The site at which a step failed, here or on another rank.

        :param call: the model's arguments.
        :param noise: where random numbers stood before the step.
        :param cause: what the model has raised, if it did.
        """
        own: str | None
        if cause is not None:
            named = re.search(r"at site '([^']+)'", str(cause))  # Pyro's validation names it
            own = named.group(1) if named else None
        else:
            after = noise_state()
            set_noise_state(noise)
            own = self.find_bad_site(*call)
            set_noise_state(after)
        return next((site for site in self.ranks.all(own) if site is not None), None)

    def find_bad_site(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The first site of the step just run that is not finite, in value, density or gradient."""
        with poutine.block(), pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for model_trace, guide_trace in get_traces(self.loss, self.model, self.guide, args, kwargs):
                for trace in (guide_trace, model_trace):
                    for name, site in trace.nodes.items():
                        if site["type"] == "sample" and _site_is_bad(site):
                            return str(name)
                    inputs = list(self.optim.params.values())
                    for name, site in trace.nodes.items():
                        if site["type"] == "sample" and _gradient_is_bad(site, inputs):
                            return str(name)
        return None


def is_worse(weights: Tensor, best: Tensor) -> bool:
    """Whether the mean of paired log weights fell, beyond twice its standard error.

    Also where it falls although the worst draws are counted for less: a few far out, whose weights differ by
    many orders of magnitude, have a standard error as large as the mean, behind which any fall would hide.
    """
    now, before = weights.isfinite(), best.isfinite()
    if int(now.sum()) != int(before.sum()):  # draws without a density decide
        return bool(now.sum() < before.sum())
    gain = (weights - best)[now & before].double()
    if len(gain) < 2:
        return False
    held = gain.clamp(min=-OUTLIER * float(gain.abs().median()))  # its mean is no less than that of all
    return any(bool(g.mean() < -2.0 * g.std() / math.sqrt(len(g))) for g in (gain, held))


def _site_is_bad(site: dict[str, Any]) -> bool:
    value, log_prob = site["value"], site.get("log_prob", torch.zeros(()))
    return not bool(value.isfinite().all() and torch.as_tensor(log_prob).isfinite().all())


def _gradient_is_bad(site: dict[str, Any], inputs: list[Tensor]) -> bool:
    log_prob = site.get("log_prob")
    if not isinstance(log_prob, Tensor) or not log_prob.requires_grad:
        return False
    gradients = torch.autograd.grad(log_prob.sum(), inputs, retain_graph=True, allow_unused=True)
    return any(g is not None and not bool(g.isfinite().all()) for g in gradients)
