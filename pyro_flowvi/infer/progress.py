"""What a fit has done so far, and how it can fail."""

from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["FitDiverged", "Progress"]


class FitDiverged(RuntimeError):
    """Training met losses or gradients that are not finite, again and again; the guide holds its last good
    state.

    :param step: the step at which it happened, from 0.
    :param site: the sample site that is the first with a value, log density or gradient that is not
        finite; None if it could not be found.
    :param losses: the losses up to that step.
    :param cause: what the model raised, if it did.

    Example::

        >>> str(FitDiverged(12, "tau", torch.zeros(12)))
        "step 12: the loss is not finite, first at site 'tau'; the last good state is restored"
    """

    def __init__(self, step: int, site: str | None, losses: Tensor, cause: str | None = None) -> None:
        self.step, self.site, self.losses, self.cause = step, site, losses, cause
        what = f"the model raised {cause!r}" if cause and not site else "the loss is not finite"
        where = f", first at site {site!r}" if site else "" if cause else ", at no single site"
        super().__init__(f"step {step}: {what}{where}; the last good state is restored")

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.step, self.site, self.losses, self.cause)


@dataclass
class Progress:
    """What a run has done so far, all that is needed to go on with it but for tensors of parameters.

    Example::

        >>> Progress(lr=0.01).stop_reason is None
        True
    """

    step: int = 0
    lr: float | None = None
    factor: float = 1.0
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    elbos: list[tuple[int, float, float]] = field(default_factory=list)
    recent: list[Tensor] = field(default_factory=list)
    plateaus: int = 0
    failures: int = 0
    good_steps: int = 0
    skips: int = 0
    num_skipped: int = 0
    num_dropped: int = 0
    num_restarts: int = 0
    race: dict[float, float] = field(default_factory=dict)
    stop_reason: str | None = None
