"""Learning rates by the step, and when they should fall: the plateau of an ELBO."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PATIENCE", "PLATEAU_FACTOR", "CosineSchedule", "is_rising", "round_lengths"]

PATIENCE = 6
"""Checks over which a plateau is judged."""
PLATEAU_GAIN = 2e-3
"""Gain in ELBO, nats, over that time that still counts as progress."""
BLURRED_ERROR = 0.05
"""Standard error of that gain, doubled, above which no plateau can be told from a slow rise."""
PLATEAU_FACTOR = 0.3
"""What a first plateau does to the learning rate."""
ROUNDS = (0.1, 0.3)
"""Shares of the steps that the rounds before the last have."""


@dataclass(frozen=True)
class CosineSchedule:
    r"""A linear rise over the first steps, times a cosine down to a share of the rate.

    At step t of T the rate is :math:`\min(1, (t + 1) / W) \, (f + (1 - f) (1 + \cos(\pi t / T)) / 2)` times
    its peak.

    :param num_steps: the number T of all steps.
    :param warm_up: the number W of steps of the rise; with 1 there is none.
    :param final_share: the share f of the peak that is left at the end; with 1 there is no fall.

    Example::

        >>> schedule = CosineSchedule(100, warm_up=10, final_share=0.01)
        >>> [round(schedule.rate(step, 1.0), 4) for step in (0, 50, 100)]
        [0.1, 0.505, 0.01]
    """

    num_steps: int
    warm_up: int = 1
    final_share: float = 0.0

    def rate(self, step: float, peak: float) -> float:
        """The learning rate of a step, from 0, where ``peak`` is that of full height."""
        rise = min(1.0, (step + 1) / self.warm_up)
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / self.num_steps))
        return peak * rise * (self.final_share + (1.0 - self.final_share) * cosine)


def round_lengths(num_steps: int, multiple: int) -> list[int]:
    """The steps of three rounds, each longer than the one before.

    Most posteriors are reached in a tenth of the steps; what is left are the widths of the harder ones, which
    come last.

    :param num_steps: of all together.
    :param multiple: what each is a multiple of, but for the last.

    Example::

        >>> round_lengths(3000, 10)
        [300, 900, 1800]
    """
    lengths = [multiple * max(1, round(share * num_steps / multiple)) for share in ROUNDS]
    return [*lengths, num_steps - sum(lengths)]


def is_rising(recent: list[Tensor], blurred: bool = True) -> bool:
    """Whether an ELBO rises over checks on common random numbers, beyond its noise.

    :param recent: log weights at each check, the oldest first.
    :param blurred: calls it rising where the noise is too large to tell.
    """
    half = len(recent) // 2
    late, early = torch.stack(recent[half:]).mean(0), torch.stack(recent[:half]).mean(0)
    gain = late - early
    if not bool(gain.isfinite().all()):
        return True
    error = float(gain.std()) / math.sqrt(len(gain))
    if 2.0 * error > BLURRED_ERROR and blurred:
        return True
    return float(gain.mean()) > max(2.0 * error, PLATEAU_GAIN)
