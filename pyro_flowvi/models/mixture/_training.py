"""Maximum likelihood for mixtures of flows: the training that the estimator and its warm starts share."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ..._compile.errors import CannotCompile
from ..._compile.optimizers import Rule, flatten
from ..._compile.run_by_operation import by_operation
from ..._compile.trace import trace
from ...infer._averaging import WeightAverage, put_back, snapshot
from ...infer._schedule import CosineSchedule
from .vmonf import VMoNF

__all__ = ["CHUNK", "MixtureTrainer", "TrainingResult", "TrainingRows", "noise_share"]

TRACED_FROM: Final = 150
"""Steps, of all runs of a trainer, from which tracing one, half a second, pays."""
ADAM: Final = Rule()
CLIP: Final = 5.0
AVERAGE_DECAY, AVERAGE_EARLY, AVERAGE_LAG = 0.99, 9.0, 9.0
"""Of the average of the weights: see :class:`~pyro_flowvi.infer._averaging.WeightAverage`."""
COMPLETE, BLENDED = 0.15, 0.3
"""Up to the first share of the steps the start's partition is learnt; from the second on, the likelihood."""
QUIET_FROM: Final = 0.7
"""The share of the steps after which the noise has come down to its floor."""
CHECKS: Final = 20
"""How often the held-out rows are scored, unless that is more often than every so many steps."""
LEAST_BETWEEN_CHECKS: Final = 25
PATIENCE: Final = 4
"""Checks in a row that are no better than the best, with the noise at its floor, that end a run."""
LEAST_EACH: Final = 8
"""Rows of a component in a step, at least."""
POOL_BATCHES: Final = 2
"""Rows whose responsibilities are found at once, in batches."""
POOLS, LEAST_POOL_STEPS, MOST_POOL_STEPS = 20, 10, 25
"""How often they are found in a run, unless there are too few steps or too many in between."""
CERTAIN: Final = 0.99
"""A responsibility from which a row is that component's, whatever the noise."""
NEGLIGIBLE: Final = 1e-12
"""A responsibility that draws nothing, unless a component has no others."""
CHUNK: Final = 2**13
"""Rows that are scored at once."""
MAX_BAD: Final = 10
"""Steps in a row without a finite gradient that end a run."""


def noise_share(done: float) -> float:
    """What is left of the noise at first, after a share of the steps."""
    return max(0.0, 1.0 - done / QUIET_FROM) ** 2


@dataclass(frozen=True)
class TrainingRows:
    """Rows of data on the device of the model.

    :param x: shape ``(N, D)``.
    :param allowed: which components may have made a row, shape ``(N, K)``.
    :param parts: the start's component of each row, shape ``(N,)``.
    :param counts: how often each row counts, shape ``(N,)``; once each if None.

    Example::

        >>> allowed, parts = torch.ones(8, 3, dtype=torch.bool), torch.zeros(8, dtype=torch.long)
        >>> rows = TrainingRows(torch.randn(8, 2), allowed, parts)
        >>> len(rows)
        8
    """

    x: Tensor
    allowed: Tensor
    parts: Tensor
    counts: Tensor | None = None

    @classmethod
    def free(cls, x: Tensor, num: int) -> "TrainingRows":
        """Rows that any of ``num`` components may have made, without a start."""
        allowed = torch.ones(len(x), num, dtype=torch.bool, device=x.device)
        return cls(x, allowed, torch.zeros(len(x), dtype=torch.long, device=x.device))

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    :param nll: the mean negative log likelihood of the held-out rows, or of the data without such, at the
        parameters that were kept.
    :param losses: of each step.
    :param checks: the same of the averaged parameters after every twentieth of the steps, if rows were held
        out.
    :param diverged: whether it stopped because nothing was finite any more.

    Example::

        >>> TrainingResult(1.5, [2.0, 1.6], [], False).diverged
        False
    """

    nll: float
    losses: list[float]
    checks: list[float]
    diverged: bool


class MixtureTrainer:
    r"""Adam on the exact likelihood of a :class:`VMoNF`, started from a partition of the rows.

    A row counts with :math:`-\log \sum_k \pi_k p_k(x)` over the components that it may be of.  The first
    steps take the start's partition for known instead; then the one turns into the other linearly.
    Noise on the rows starts wide and comes down, so that thin densities are approached from outside.  Of the
    averaged parameters those are kept, as a copy, that are best on the held-out rows.

    Each component sees as many rows of a step, drawn by its responsibilities, which are found for some steps
    at once: the gradient has the expectation of that of the likelihood (generalised EM; Neal and Hinton, *A
    View of the EM Algorithm that Justifies Incremental, Sparse, and Other Variants*, 1998), and a component
    is not run on rows that are not its own.

    :param model: trained in place.
    :param batch_size: rows of a step, shared among the components.
    :param lr: Adam's rate at the start; it falls to zero along a cosine.
    :param weight_decay: of the weights of networks, decoupled.
    :param noise: standard deviations of the noise, at the start above the floor, and the floor.
    :param seed: of batches and noise.

    Example::

        >>> x = torch.cat([torch.randn(50, 2) - 3, torch.randn(50, 2) + 3])
        >>> parts = torch.arange(2).repeat_interleave(50)
        >>> rows = TrainingRows(x, torch.ones(100, 2, dtype=torch.bool), parts)
        >>> trainer = MixtureTrainer(VMoNF(2, 2, num_layers=2, hidden=(8,)))
        >>> len(trainer.run(rows, 20).losses)
        20
    """

    def __init__(
        self,
        model: VMoNF,
        *,
        batch_size: int = 256,
        lr: float = 4e-3,
        weight_decay: float = 0.05,
        noise: tuple[float, float] = (0.15, 0.005),
        seed: int = 0,
    ) -> None:
        self.model, self.batch_size, self.lr, self.noise, self.seed = model, batch_size, lr, noise, seed
        self.params = [p for p in model.parameters() if p.requires_grad]
        flat = flatten(p.detach() for p in self.params)
        self.flat = flat
        """All parameters end to end; those of the model are views of it until :meth:`release`."""
        decay, start = torch.zeros_like(flat), 0
        for name, param in model.named_parameters():
            if not param.requires_grad:
                continue
            end = start + param.numel()
            param.data = flat[start:end].view_as(param)
            if name.endswith("weight"):
                decay[start:end] = weight_decay
            start = end
        self.initial = flat.clone()
        """The parameters as they came."""
        self.decay = decay if weight_decay else None
        self._graphs: dict[int, Callable[..., Any]] = {}
        self._steps_taken = 0

    def release(self) -> None:
        """Gives the model's parameters memory of their own."""
        for param in self.params:
            param.data = param.data.clone()

    # -- the objective ------------------------------------------------------------------------------

    def _objective(self, x: Tensor, shares: Tensor) -> tuple[Tensor, ...]:
        mixture = self.model.mixture()
        loss = -(shares * (mixture.logits + mixture.matched_log_prob(x).mean(0))).sum()
        return loss.detach().clone(), *torch.autograd.grad(loss, self.params)

    @torch.no_grad()
    def responsibilities(self, x: Tensor, allowed: Tensor) -> Tensor:
        """Those of the components that are allowed, shape ``(N, K)``."""
        return torch.cat([joint.softmax(-1) for joint in self._joint(x, allowed)])

    def _joint(self, x: Tensor, allowed: Tensor) -> Iterator[Tensor]:
        for part, own in zip(x.split(CHUNK), allowed.split(CHUNK), strict=True):
            yield torch.where(own, self.model.joint_log_prob(part), -math.inf)

    def _program(self, args: list[Tensor], steps: int) -> Callable[..., Any]:
        """The loss and its gradients; traced where there are enough steps, and kept for later runs."""
        size = len(args[0])
        if size not in self._graphs:
            if self._steps_taken + steps < TRACED_FROM:
                return self._objective
            try:
                traced = trace(self._objective, self.params, args)
            except CannotCompile:
                self._graphs[size] = self._objective
            else:
                held = [*(p.detach() for p in self.params), *traced.constants]
                self._graphs[size] = torch.no_grad()(by_operation(traced.graph, held, args))
        return self._graphs[size]

    @torch.no_grad()
    def log_prob(self, rows: TrainingRows) -> Tensor:
        """The log likelihood of each row, shape ``(N,)``."""
        return torch.cat([joint.logsumexp(-1).double() for joint in self._joint(rows.x, rows.allowed)])

    def nll(self, rows: TrainingRows) -> float:
        """The mean negative log likelihood."""
        log_prob = self.log_prob(rows)
        if rows.counts is None:
            return -float(log_prob.mean())
        counts = rows.counts.to(log_prob)
        return -float((log_prob * counts).sum() / counts.sum())

    # -- training -----------------------------------------------------------------------------------

    def run(
        self,
        rows: TrainingRows,
        steps: int,
        held_out: TrainingRows | None = None,
        *,
        from_start: bool = True,
        progress: Callable[[], Any] | None = None,
        stop: Callable[[float, int, float], bool] | None = None,
    ) -> TrainingResult:
        """Trains, and leaves the best parameters in the model.

        :param rows: the data.
        :param steps: how many.
        :param held_out: rows to choose the parameters by; without any, the last averaged ones are kept.
        :param from_start: begins with the partition; otherwise the likelihood is maximised from the first
            step.
        :param progress: called after every step.
        :param stop: told the share of the steps that is done, the number of each check and the best value so
            far, ends the run by returning True.
        """
        weights = {"flat": self.flat}
        generator = torch.Generator(self.flat.device).manual_seed(self.seed)
        batches = _Batches(rows, self.batch_size, steps, self.noise, generator)
        moments, schedule = (torch.zeros_like(self.flat), torch.zeros_like(self.flat)), CosineSchedule(steps)
        average = WeightAverage(AVERAGE_DECAY, early=AVERAGE_EARLY, lag=AVERAGE_LAG)
        average.update(weights, 0)
        initial = good = snapshot(weights)
        best, bad, losses, checks = math.inf, 0, list[float](), list[float]()
        every = max(1, min(max(LEAST_BETWEEN_CHECKS, steps // CHECKS), steps // 2))
        for step in range(steps):
            done = step / steps
            if not batches.left:
                batches.refill(done, _blend(done if from_start else 1.0), self.responsibilities)
            args = batches.draw()
            loss, *grads = self._program(args, steps)(*args)
            rate = schedule.rate(step, self.lr)
            bad = 0 if self._step(loss, grads, moments, step + 1, rate) else bad + 1
            losses.append(loss.item() - batches.entropy)
            average.update(weights, step + 1)
            if progress is not None:
                progress()
            if bad == MAX_BAD:
                break
            if (step + 1) % every and step < steps - 1:
                continue
            if held_out is None:
                good = snapshot(average.values) if bad == 0 else good
                continue
            with average.in_place(weights):
                checks.append(self.nll(held_out))
            if checks[-1] < best:
                best, good = checks[-1], snapshot(average.values)
            if stop is not None and stop(done, len(checks) - 1, best):
                break
            if done > QUIET_FROM and min(checks[-PATIENCE:]) > best:
                break
        self._steps_taken += len(losses)
        put_back(weights, good)
        diverged, scored = bad == MAX_BAD, rows if held_out is None else held_out
        nll = self.nll(scored)
        if not math.isfinite(nll):
            put_back(weights, initial)
            diverged, nll = True, self.nll(scored)
        return TrainingResult(nll, losses, checks, diverged)

    def _step(
        self, loss: Tensor, grads: list[Tensor], moments: tuple[Tensor, Tensor], count: int, rate: float
    ) -> bool:
        """A step along a gradient of bounded norm; False, and nothing moved, if not finite."""
        grad = flatten(grads)
        norm = float(torch.linalg.vector_norm(grad))
        if not math.isfinite(norm) or not math.isfinite(loss.item()):
            return False
        if norm > CLIP:
            grad *= CLIP / norm
        if self.decay is not None:
            self.flat.addcmul_(self.flat, self.decay, value=-rate)
        self.flat.add_(ADAM.change(grad, *moments, count, rate))
        return True


def _blend(done: float) -> float:
    """How much the likelihood counts, and not the partition, after a share of the steps."""
    return min(max((done - COMPLETE) / (BLENDED - COMPLETE), 0.0), 1.0)


class _Batches:
    """Rows with noise, for each component as many, drawn by its responsibilities."""

    def __init__(
        self,
        rows: TrainingRows,
        batch_size: int,
        steps: int,
        noise: tuple[float, float],
        generator: torch.Generator,
    ) -> None:
        self.rows, self.noise, self.generator = rows, noise, generator
        self.num = rows.allowed.shape[-1]
        self.each = max(LEAST_EACH, -(-batch_size // self.num))
        self.steps = min(max(steps // POOLS, LEAST_POOL_STEPS), MOST_POOL_STEPS)
        self.order = _Order(rows, generator)
        self.size = min(self.order.count, POOL_BATCHES * batch_size)
        self.left, self.entropy = 0, 0.0

    def refill(self, done: float, blend: float, responsibilities: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Draws the rows of the next steps, from some with their responsibilities at this point."""
        index = self.order.next(self.size)
        start, floor = self.noise
        scale = floor + start * noise_share(done)
        x, allowed = self.rows.x[index], self.rows.allowed[index]
        options: Any = {"generator": self.generator, "device": x.device}
        noisy = torch.add(x, torch.randn(x.shape, dtype=x.dtype, **options), alpha=scale)
        known = torch.nn.functional.one_hot(self.rows.parts[index], self.num).to(x)
        found = responsibilities(noisy, allowed).to(x) if blend else known
        shares = torch.lerp(known, found, blend)
        self.shares = shares.mean(0)
        self.entropy = float(torch.special.entr(shares).sum(-1).mean())
        # Systematic sampling; a component without rows is run on any, and its share of the loss is none.
        edges = shares.clamp_min(NEGLIGIBLE).cumsum(0).mT.contiguous()
        count = self.steps * self.each
        offset = torch.rand((self.num, 1), dtype=x.dtype, **options)
        level = (torch.arange(count, device=x.device) + offset) / count * edges[:, -1:]
        chosen = torch.searchsorted(edges, level, right=True).clamp_max(len(x) - 1)
        chosen = chosen.gather(1, torch.rand(chosen.shape, dtype=x.dtype, **options).argsort(-1)).mT
        # Rows that are between components keep the noise with which that was found; others have new noise.
        certain = (shares.amax(-1, keepdim=True) > CERTAIN).to(x)
        middle = torch.lerp(noisy, x, certain)[chosen]
        noise = torch.randn(middle.shape, dtype=x.dtype, **options)
        drawn = torch.addcmul(middle, certain[chosen], noise, value=scale)
        self.drawn = drawn.unflatten(0, (self.steps, self.each))
        self.left = self.steps

    def draw(self) -> list[Tensor]:
        """Vectors of each component, shape ``(B, K, D)``, and what share of all rows each component has."""
        self.left -= 1
        return [self.drawn[self.left].contiguous(), self.shares]


class _Order:
    """Rows in random order, again and again, each as often as it counts."""

    def __init__(self, rows: TrainingRows, generator: torch.Generator) -> None:
        self.generator, self.device = generator, rows.x.device
        self.edges = None if rows.counts is None else rows.counts.double().cumsum(0)
        self.count = len(rows) if self.edges is None else max(1, round(float(self.edges[-1])))
        self.left = torch.empty(0, dtype=torch.long, device=self.device)

    def next(self, size: int) -> Tensor:
        """The indices of so many rows."""
        while len(self.left) < size:
            order = torch.randperm(self.count, generator=self.generator, device=self.device)
            if self.edges is not None:
                level = (order + 0.5) / self.count * self.edges[-1]
                order = torch.searchsorted(self.edges, level, right=True).clamp_max(len(self.edges) - 1)
            self.left = torch.cat([self.left, order])
        index, self.left = self.left[:size], self.left[size:]
        return index
