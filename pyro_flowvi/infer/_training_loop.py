"""The loop of :func:`pyro_flowvi.fit`: rounds of steps, checks, recovery."""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.infer import SVI
from torch import Tensor

from .._compile.stepper import Stepper
from .._program.feasible import is_refusal
from .._program.log_density import REFUSALS
from .._ranks import LostRank
from .._types import CompileMode
from ._averaging import WeightAverage
from ._batches import Call, Supply
from ._fit_bar import Bar
from ._flow_steps import FlowSteps, FlowWeights
from ._gradient_average import GradientAverage
from ._guarded_optim import NotFinite
from ._progress import Progress
from ._result import FitDiverged
from ._run_state import Run, is_worse
from ._schedule import PATIENCE, PLATEAU_FACTOR, CosineSchedule, is_rising, round_lengths

__all__ = ["CHECKS", "ENOUGH_STEPS", "TrainingLoop"]

CHECKS, CHECKS_SHORT = 30, 10
"""How often in a run the state is compared with the best and kept, and in one that starts near its end."""
FINAL_RATE = 1e-2
"""The learning rate ends at this fraction of its start."""
WARM_UP = 100
AVERAGE_EVERY, AVERAGE_DECAY = 10, 0.99
"""The weights are averaged every so many steps, exponentially with this decay a step."""
ENOUGH_STEPS = 1000
"""Shorter runs have one round, and nothing but equal weights ends them."""
EARLIEST_STOP = 0.2
"""Fraction of the steps before which no plateau is looked for."""
SETTLED_SD = 0.05
"""Standard deviation of the log weights, nats, at which the guide cannot be told from the posterior near its
draws: half its square is the divergence, and no mean is off by more of a standard deviation."""
TOLERANCE, TOLERANCE_EACH = 0.03, 0.004
"""How far below the evidence, nats, an ELBO may be for a run to end; for each latent where there are few."""
CHANCE = 3.0
"""Standard errors by which few draws may be moved where a start is the end."""
LEAST_GAIN = 0.02
"""Gain in ELBO, nats, in a later round, below which there is no further one."""
RECOVERABLE: tuple[type[Exception], ...] = (NotFinite, *REFUSALS)
MAX_FAILURES = 5
RECOVERY_STEPS = 50
"""Good steps after which a failure is no longer in a row with the next."""
MAX_SKIPS = 20
"""Steps left out one after another that count as a failure."""


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered NaN")  # it is an error here, or counted
        yield


class TrainingLoop:
    """Takes the steps of a run.

    :param run: the run.
    :param num_steps: steps at most.
    :param lr: the learning rate to start from; None leaves rates to the optimizer's own schedule.
    :param compile: as in :class:`CompiledSVI`.
    :param arguments: the model's arguments step by step.
    :param fresh_data: whether they differ from step to step.
    :param may_settle: whether equal weights of all draws mean that there is nothing left to train.
    :param bar: shows what is going on.
    :param tolerance: estimate of the distance to the evidence, nats, at which a run ends.
    :param short: whether the run starts near its end.
    """

    def __init__(
        self,
        run: Run,
        num_steps: int,
        lr: float | None,
        compile: CompileMode,
        arguments: Supply,
        fresh_data: bool = False,
        may_settle: bool = True,
        bar: Bar | None = None,
        tolerance: float = TOLERANCE,
        short: bool = False,
    ) -> None:
        self.bar = bar or Bar()
        self.run, self.num_steps, self.arguments = run, num_steps, arguments
        self.fresh_data = fresh_data
        # A schedule of the objective's own has to run to its end.
        early = run.ranked and not hasattr(run.loss, "advance")
        self.stops_early = early and (short or num_steps >= ENOUGH_STEPS)
        self.may_settle, self.tolerance = may_settle, tolerance
        self.progress = Progress(lr=lr)
        in_rounds = self.stops_early and lr is not None and not run.held_out
        self.rounds = round_lengths(num_steps, AVERAGE_EVERY) if in_rounds else [num_steps]
        """The steps of each round, which begins at the best state with a rate that rises and falls."""
        self.average = WeightAverage(AVERAGE_DECAY, every=AVERAGE_EVERY)
        self.start: str | None = None
        """The kind of Gaussian that the guide was moved to."""
        self.svi = SVI(run.model, run.guide, run.optim, run.loss)
        self._average = None if run.ranks.alone else GradientAverage(run.ranks, run.optim)
        options: dict[str, Any] = {"limits": run.optim.limits, "average": self._average}
        self.stepper: Stepper | FlowSteps = Stepper(
            self.svi, run.loss, compile=compile, interprets=True, **options
        )
        if self._average is not None:
            self.svi.loss_and_grads = self._average.of_losses(self.svi.loss_and_grads)
        every = num_steps // (CHECKS_SHORT if short else CHECKS)
        self.every = max(1, every - every % AVERAGE_EVERY if every > AVERAGE_EVERY else every)

    # -- rates --------------------------------------------------------------------------------------

    def _set_rate(self) -> float | None:
        """Sets the learning rate of the next steps, unless the optimizer has a schedule of its own."""
        progress = self.progress
        if progress.lr is None:
            return None
        length = self.rounds[progress.round]
        rise = 1 + length // (10 if len(self.rounds) == 1 else 6)
        schedule = CosineSchedule(length, min(WARM_UP, rise), FINAL_RATE)
        # By tens of steps, however many are taken at once.
        step = progress.step - progress.step % AVERAGE_EVERY - progress.round_start
        rate = schedule.rate(step, progress.lr * progress.factor)
        self.stepper.rate = rate
        self.run.optim.advance(rate)
        return rate

    @property
    def _round_end(self) -> int:
        return self.progress.round_start + self.rounds[self.progress.round]

    def prepare(self, steps: FlowSteps | None = None) -> None:
        """Keeps the start as the first candidate.

        :param steps: takes the steps, in place of Pyro.
        """
        if steps is not None:
            self.stepper = steps
        self.run.keep_start(None if steps is None else steps.compared)
        self.progress.round_elbo = -self.run.best_loss

    def is_there(self, params: list[Tensor]) -> bool:
        """Whether the start cannot be told from the posterior, so that there is nothing to train.

        :param params: as of :meth:`Run.keep_start`.
        """
        if not params:
            return False
        self.run.keep_start(params)
        settles = self.run.ranked and self.may_settle and not self._is_patient()
        if not settles or not bool(0.5 * self.run.best_weights.var() < self.tolerance):
            return False
        distance = self.run.distance(1, CHANCE)
        if distance.is_known and distance.is_within(self.tolerance):
            self.progress.stop_reason = "converged"
        return self.progress.stop_reason is not None

    # -- steps --------------------------------------------------------------------------------------

    def _steps(self, call: Call, count: int, left: int) -> list[tuple[float, float]]:
        """Takes up to ``count`` steps; loss and norm of the gradient of each."""
        run = self.run
        run.optim.norm = math.nan
        dropped_before = int(getattr(run.loss, "num_dropped", 0))
        if self._average is not None:
            self._average.share = self.arguments.share(call)
        with _quiet(), run.ranks.own_noise():
            taken = self.stepper.take(self.svi, *call, count, left)
        found = []
        for value, dropped, norm in taken:
            if dropped is None:  # the step was eager: objective and optimizer know
                dropped = int(getattr(run.loss, "num_dropped", 0)) - dropped_before
            self.progress.num_dropped += dropped
            norm = run.optim.norm if norm is None else norm
            run.optim.note(norm)
            found.append((value, norm))
        return found

    def step(self) -> bool:
        """Takes a few steps, or recovers from one that failed; False if there is no more data."""
        run, progress = self.run, self.progress
        noise = run.ranks.noise
        cause: Exception | None = None
        call = self.arguments(progress.step)
        if call is None:
            return False
        rate, skip = self._set_rate(), float(run.optim.limits[1])
        count, left = self._until_a_change(), self.num_steps - progress.step
        try:
            taken = self._steps(call, count, left)
        except RECOVERABLE as error:
            if progress.step == 0 and not (isinstance(error, NotFinite) or is_refusal(error)):
                raise  # most likely the model's own mistake: its message is the best
            taken, cause = [(math.nan, math.nan)], None if isinstance(error, NotFinite) else error
        for value, norm in taken:
            skipped = math.isfinite(value) and norm > skip
            progress.skips = progress.skips + 1 if skipped else 0
            progress.num_skipped += skipped
            if not math.isfinite(value) or progress.skips >= MAX_SKIPS:
                self._recover(call, noise, cause)
                return True
            self._record(value, norm, rate)
        if progress.step % AVERAGE_EVERY == 0:
            run.optim.set_limits()
            self.average.update(run.optim.params, progress.step - progress.round_start)
        return True

    def _record(self, value: float, norm: float, rate: float | None) -> None:
        """Counts a good step."""
        progress = self.progress
        progress.good_steps += 1
        if progress.good_steps >= RECOVERY_STEPS:
            progress.failures = 0
        self.run.losses.append(value)
        progress.rates.append(math.nan if rate is None else rate)
        progress.norms.append(norm)
        progress.step += 1
        if rate is None:
            self.run.optim.advance(None)

    def _until_a_change(self) -> int:
        """Steps that can be taken at once: up to the next update of averages, or one if the data change."""
        if self.fresh_data or self.progress.lr is None:
            return 1
        step = self.progress.step
        return min(
            AVERAGE_EVERY - step % AVERAGE_EVERY, self.every - step % self.every, self._round_end - step
        )

    # -- recovery -----------------------------------------------------------------------------------

    def _recover(self, call: Call, noise: list[Tensor], cause: Exception | None) -> None:
        """Goes back to the last good state with half the rate; gives up after several failures in a row."""
        run, progress = self.run, self.progress
        progress.failures += 1
        progress.num_restarts += 1
        progress.good_steps = progress.skips = 0
        progress.factor *= 0.5
        for param in run.optim.params.values():
            param.grad = None
        if progress.failures >= MAX_FAILURES or not run.optim.params:
            site = run.find_site(call, noise, cause)
            run.restore()
            told = str(cause).strip().splitlines() if cause else []
            losses, single = torch.tensor(run.losses), run.has_float32(call)
            raise FitDiverged(progress.step, site, losses, told[0] if told else None, single) from cause
        self._go_back()

    def _go_back(self) -> None:
        """To the best state so far, with fresh optimizers, averages and limits."""
        self.run.restore()
        self.run.optim.forget()
        self.stepper.forget()
        self.average.forget()

    # -- checks -------------------------------------------------------------------------------------

    def check(self) -> bool:
        """Keeps the averaged state unless an earlier one is better; whether the run is over."""
        progress = self.progress
        self.run.ranks.check_equal(self.run.optim.params)
        with self.average.in_place(self.run.optim.params):
            weights = self.run.keep_unless_worse()
        se = float(weights.std() / math.sqrt(len(weights)))
        progress.elbos.append((progress.step, float(weights.mean()), se))
        progress.recent = [*progress.recent, weights][-1 - PATIENCE :]
        if self.stops_early and self.may_settle and self._has_arrived(weights):
            return True
        early = progress.step < EARLIEST_STOP * self.num_steps
        if not self.stops_early or len(self.rounds) > 1 or early or len(progress.recent) <= PATIENCE:
            return False
        return not self._is_rising() and self._meet_plateau()

    def _is_patient(self) -> bool:
        return isinstance(self.run.judge, FlowWeights) and self.run.judge.patient

    def _has_arrived(self, weights: Tensor) -> bool:
        """Whether the averaged or the best state cannot be told from the posterior."""
        if self._is_patient():
            return False
        if bool(weights.std() < min(SETTLED_SD, math.sqrt(2.0 * self.tolerance))):
            return True
        # A few weights underestimate the distance: they only say when to look closely.
        promising = len(self.rounds) > 1 and bool(0.5 * self.run.best_weights.var() < self.tolerance)
        if not promising:
            return False
        with self.run.best_in_place():
            return self.run.distance().is_within(self.tolerance)

    def _end_round(self) -> bool:
        """Begins the next round at the best state, unless the run is over."""
        progress, elbo = self.progress, -self.run.best_loss
        gain, progress.round_elbo = elbo - progress.round_elbo, elbo
        if progress.round > 0 and gain < LEAST_GAIN and not self._is_patient():
            with self.run.best_in_place():
                distance = self.run.distance()
            if distance.moves_little:
                return True
        if progress.round + 1 < len(self.rounds):
            progress.round_start = self._round_end
            progress.round += 1
            progress.recent = []
            self._go_back()
        return False

    def _is_rising(self) -> bool:
        """Whether the ELBO rose over the recent checks."""
        return is_rising(self.progress.recent, blurred=not self.run.held_out)

    def _meet_plateau(self) -> bool:
        """Lowers the rate at the first plateau; whether it is a later one, which ends the run."""
        progress = self.progress
        progress.recent = []
        progress.plateaus += 1
        if progress.plateaus == 1:
            progress.factor *= PLATEAU_FACTOR
        return progress.plateaus > 1

    # -- the run ------------------------------------------------------------------------------------

    def train(self, save: Callable[[], None] | None = None, seconds: float = 0.0) -> str:
        """Takes all steps and leaves the best state in place; the reason to stop.

        :param save: writes a checkpoint; called at most every so many ``seconds``.
        """
        run, progress = self.run, self.progress
        self.bar.begin(progress.step)
        if progress.stop_reason is not None:
            self.bar.end(progress.stop_reason)
            return progress.stop_reason
        try:
            reason = self._take_all(save, seconds)
        except (KeyboardInterrupt, LostRank) as error:
            if run.best:
                run.restore()
            if isinstance(error, LostRank) or not run.ranks.alone:  # which are left waiting
                raise
            reason = "interrupted"  # in the middle of a step: the last checkpoint stays as it is
        except FitDiverged:
            if save is not None:
                progress.failures = 0
                save()
            raise
        if reason != "interrupted" or not run.best:
            self._keep_last()
        run.restore()
        self.bar.end(reason)
        progress.stop_reason = reason
        if save is not None and reason != "interrupted":
            save()
        return reason

    def _take_all(self, save: Callable[[], None] | None, seconds: float) -> str:
        """Steps, checks and checkpoints until there is a reason to stop, which is returned."""
        progress, ranks, saved = self.progress, self.run.ranks, time.monotonic()
        while progress.step < self.num_steps:
            before = progress.step
            due = ranks.leads and save is not None and time.monotonic() - saved >= seconds
            ranks.tell(due)  # one clock for all ranks
            if not self.step():
                return "no more batches"
            self.bar.advance(progress.step - before)
            ends = len(self.rounds) > 1 and progress.step == self._round_end
            if progress.step > before and (ends or progress.step % self.every == 0):
                over = self.check()
                told = f"round {progress.round + 1} of {len(self.rounds)}, " if len(self.rounds) > 1 else ""
                self.bar.tell(f"{told}ELBO {-self.run.best_loss:.2f}", at_once=False)
                if over or (ends and self._end_round()):
                    return "converged"
            if save is not None and ranks.heard(due):
                save()
                saved = time.monotonic()
        return "completed"

    def _keep_last(self) -> None:
        """Lets the last state and its average compete with the best."""
        with self.average.in_place(self.run.optim.params):
            self.run.keep_unless_worse()
        averaged = self.run.best_weights
        if self.run.ranked and is_worse(averaged, self.run.evaluate()):
            self.run.keep_unless_worse()

    @property
    def converged(self) -> bool:
        """Whether the ELBO had stopped rising when the run ended."""
        if self.progress.stop_reason == "converged":
            return True
        enough = len(self.progress.recent) >= PATIENCE // 2
        return self.run.ranked and enough and not self._is_rising()
