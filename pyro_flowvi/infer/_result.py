"""What a fit gives, and how it fails."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _html
from ..autoguide._protocol import FitGuide

__all__ = ["FitDiverged", "FitResult"]

START_WORDS = {None: "where the guide stood", "previous": "the earlier guide"}
MORE = {
    "no more batches": "give more batches",
    "interrupted": "start again with checkpoint=, which can be gone on from",
}
"""What else helps, by the reason to stop."""


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` returns; prints in a line, and what to do next where it has not converged.

    The guide holds ``best_state`` already.

    :param guide: the trained guide.
    :param losses: the loss (negative ELBO, nats) of every step, shape ``(steps,)``.
    :param best_loss: the loss of the best state, over a few hundred fresh draws.
    :param best_state: name -> value of every trained parameter, the model's included, unconstrained.
    :param stop_reason: "converged" (the ELBO stopped rising, twice), "completed" (all steps were taken),
        "no more batches" or "interrupted".
    :param wall_time: seconds.
    :param start: the kind of Gaussian that the guide was moved to before training: "prior", "laplace",
        "path", "mean-field", or "modes": one that covers several for :class:`AutoCIF`, one at each for
        :class:`AutoFlowMixture`; "program", of the latents that others' priors depend on, with messages for
        the rest; "previous", the guide that ``init`` gives; None if it stayed where it was.
    :param converged: whether the ELBO had stopped rising when the run ended.
    :param rates: the learning rate of every step; NaN with an optimizer of your own.
    :param gradient_norms: the norm of the gradient of every step.
    :param elbos: (step, ELBO, standard error) of the averaged state, on draws that were the same each time.
    :param num_dropped: particles left out because their density or gradient was not finite.
    :param num_skipped: steps left out because their gradient was far above the running median.
    :param num_restarts: how often the run went back to its last good state, with half the rate.
    :param modes: of :class:`AutoFlowMixture`, the masses of the modes that it has, ``modes.masses``, their
        standard errors ``modes.se``, and ``modes.components``, those that each is described by; else None.

    Example::

        >>> result = FitResult(None, torch.tensor([2.0, 1.0]), 1.0, {}, "completed", 0.5)
        >>> result
        FitResult(completed: 2 steps in 0.5 s, loss 2.00 -> 1.00)
          not converged, the ELBO may still rise: go on by another call of fit, or take a larger num_steps
    """

    guide: Any = field(repr=False)
    losses: Tensor
    best_loss: float
    best_state: dict[str, Tensor]
    stop_reason: str
    wall_time: float
    start: str | None = None
    converged: bool = False
    rates: Tensor = field(default_factory=lambda: torch.zeros(0))
    gradient_norms: Tensor = field(default_factory=lambda: torch.zeros(0))
    elbos: list[tuple[int, float, float]] = field(default_factory=list)
    num_dropped: int = 0
    num_skipped: int = 0
    num_restarts: int = 0
    modes: Any = None

    def __repr__(self) -> str:
        steps = f"{len(self.losses)} step{'s' * (len(self.losses) != 1)}"
        line = (
            f"FitResult({self.stop_reason}: {steps} in {self.wall_time:.1f} s, "
            f"loss {', '.join([self._loss(), *self._notes()])})"
        )
        return "\n  ".join(
            [line, *([] if self.modes is None else [str(self.modes)]), *filter(None, [self._next()])]
        )

    def _repr_html_(self) -> str:
        """For a notebook: why it stopped, a table of figures, and what to do next."""
        rows = [
            ("steps", str(len(self.losses))),
            ("seconds", f"{self.wall_time:.1f}"),
            ("loss (-ELBO, nats)", self._loss()),
            ("start", START_WORDS.get(self.start, f"the best Gaussian of a search ({self.start})")),
            ("left out", ", ".join(self._left_out()) or "nothing"),
            *([] if self.modes is None else [("modes", str(self.modes))]),
        ]
        state = "converged" if self.converged else "not converged"
        words = "" if self.stop_reason == state else f"({state})"
        return _html.block(
            _html.paragraph(words, strong=self.stop_reason),
            _html.table((), rows),
            _html.paragraph(self._next()),
        )

    def _loss(self) -> str:
        first = f"{float(self.losses[0]):.2f} -> " if len(self.losses) else ""
        return f"{first}{self.best_loss:.2f}"

    def _notes(self) -> list[str]:
        """Where it started, if it was moved, and what was left out."""
        earlier = self.start == "previous"
        start = "started at the earlier guide" if earlier else f"started at the best Gaussian ({self.start})"
        return [*([] if self.start is None else [start]), *self._left_out()]

    def _left_out(self) -> list[str]:
        counts = (
            (self.num_dropped, "particle", " without a finite density"),
            (self.num_skipped, "step", " skipped"),
            (self.num_restarts, "restart", ""),
        )
        return [f"{count} {what}{'s' * (count > 1)}{more}" for count, what, more in counts if count]

    def _next(self) -> str:
        """What to do where the ELBO had not stopped rising; nothing where it had."""
        if self.converged:
            return ""
        # Pyro's own guides go on from where they are; those of this package search for a start, unless told.
        again = "with fit(..., init=result)" if isinstance(self.guide, FitGuide) else "by another call of fit"
        more = MORE.get(self.stop_reason, "take a larger num_steps")
        return f"not converged, the ELBO may still rise: go on {again}, or {more}"

    @property
    def located(self) -> bool:
        """Whether the guide was moved before training."""
        return self.start is not None

    def plot(self, *, ax: Any = None) -> Any:
        """Draws ELBO, learning rate and gradient norm by step; as :func:`~pyro_flowvi.plotting.plot_trace`.

        :param ax: matplotlib Axes, or a Figure or SubFigure to make them in; None for a new figure.
        :return: an array of the Axes, from the ELBO down.
        :raises ImportError: without matplotlib.
        """
        from ..plotting import plot_trace

        return plot_trace(self, ax=ax)


START = (
    "the guide draws where the model has no density; give a start by init_loc_fn, a smaller init_scale, or a "
    "distribution whose support does not depend on the data"
)


IN_FLOAT32 = (
    "the latents or the data are float32: where the density overflows or cancels there, as a GaussianHMM's "
    "does at small scales, take float64, by torch.set_default_dtype(torch.float64) and data of that dtype"
)


class FitDiverged(RuntimeError):
    """Training met losses or gradients that are not finite, again and again; the guide holds its last good
    state.

    :param step: the step at which it happened, from 0.
    :param site: the sample site that is the first with a value, log density or gradient that is not
        finite; None if it could not be found.
    :param losses: the losses up to that step.
    :param cause: what the model raised, if it did.
    :param float32: whether latents or data are float32; the message then advises float64 as well.

    Example::

        >>> str(FitDiverged(12, "tau", torch.zeros(12)))
        "step 12: the loss is not finite, first at site 'tau'; the last good state is restored"
    """

    def __init__(
        self, step: int, site: str | None, losses: Tensor, cause: str | None = None, float32: bool = False
    ) -> None:
        self.step, self.site, self.losses, self.cause, self.float32 = step, site, losses, cause, float32
        what = f"the model raised {cause!r}" if cause and not site else "the loss is not finite"
        where = f", first at site {site!r}" if site else "" if cause else ", at no single site"
        # At the first step there was no good state: a search for a start has found none.
        then = "the last good state is restored" if step else START
        more = f"; {IN_FLOAT32}" if float32 else ""
        super().__init__(f"step {step}: {what}{where}; {then}{more}")

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.step, self.site, self.losses, self.cause, self.float32)
