"""Averages of the weights over a run, and copies of the best ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["WeightAverage", "put_back", "snapshot"]


def snapshot(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of parameters."""
    return {name: param.detach().clone() for name, param in params.items()}


@torch.no_grad()
def put_back(params: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """Sets parameters to the copies of a :func:`snapshot`."""
    for name, param in params.items():
        param.copy_(kept[name])


@dataclass
class WeightAverage:
    r"""An exponential average of weights, which forgets the start of a run faster.

    After n steps the present weights count :math:`\max(1 - \beta^m, \min(1, a m / (n + b)))`, with m steps
    between updates: at first the average is over a share of the run, as in polynomial decay (Shamir and
    Zhang 2013), and later over :math:`1 / (1 - \beta)` steps.

    :param decay: the decay β a step.
    :param every: the number m of steps from one update to the next.
    :param early: the constant a: the larger, the more of the start is forgotten.
    :param lag: the constant b.
    :param values: the average, by the parameter's name; empty before the first update.

    Example::

        >>> weights = {"w": torch.zeros(1)}
        >>> average = WeightAverage(decay=0.5)
        >>> average.update(weights, 0)
        >>> average.update({"w": torch.ones(1)}, 100)
        >>> with average.in_place(weights):
        ...     weights["w"].item()
        0.5
        >>> weights["w"].item()
        0.0
    """

    decay: float = 0.99
    every: int = 1
    early: float = 10.0
    lag: float = 1.0
    values: dict[str, Tensor] = field(default_factory=dict)

    def forget(self) -> None:
        """Has the next update begin anew."""
        self.values = {}

    def weight(self, num_steps: int) -> float:
        """What the weights after so many steps count."""
        early = min(1.0, self.early * self.every / (num_steps + self.lag))
        return max(1.0 - self.decay**self.every, early)

    def update(self, params: Mapping[str, Tensor], num_steps: int) -> None:
        """Takes in the weights after so many steps; begins anew if there are others than before."""
        if self.values.keys() != params.keys():
            self.values = snapshot(params)
            return
        if not params:
            return
        present = [params[name].detach() for name in self.values]
        torch._foreach_lerp_(list(self.values.values()), present, self.weight(num_steps))

    @contextmanager
    def in_place(self, params: Mapping[str, Tensor]) -> Iterator[None]:
        """With the average in place of the present weights, if it knows all of them."""
        if self.values.keys() != params.keys():
            yield
            return
        with torch.no_grad():
            present = snapshot(params)
            put_back(params, self.values)
            try:
                yield
            finally:
                put_back(params, present)
