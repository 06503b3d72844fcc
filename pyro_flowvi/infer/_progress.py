"""Where a run stands."""

import math
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Progress"]


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
    round: int = 0
    round_start: int = 0
    round_elbo: float = -math.inf
    stop_reason: str | None = None
