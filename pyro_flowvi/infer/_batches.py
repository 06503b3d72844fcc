"""The model's arguments step by step."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .._program.call import as_call

__all__ = ["Call", "Supply", "as_call_with"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model."""


def as_call_with(kwargs: Mapping[str, Any], batch: Any) -> Call:
    """The arguments in a batch, in any of the forms of :func:`as_call`, beside keywords that all share."""
    args, own = as_call(batch)
    return args, {**kwargs, **own}


class Supply:
    """The model's arguments by step: always the same, by a callable, or from an iterable.

    What an iterable draws at random, as a shuffling DataLoader does, comes from a stream of its own: so that
    it can be gone through again from the start without a trace in the training's.

    :param batches: None, a callable of the step, or an iterable; a generator runs once.
    :param args: the arguments where ``batches`` is None.
    :param kwargs: keyword arguments that all steps share; a batch's own come before them.
    """

    def __init__(self, batches: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.batches, self.args, self.kwargs = batches, args, kwargs
        self.restart(torch.get_rng_state())

    def restart(self, start: Tensor) -> None:
        """Begins anew, with the random numbers that follow from a state of torch's generator."""
        self.start = self._state = start
        self._source = self._rounds()
        self._last: tuple[int, Any] = (-1, None)

    def _rounds(self) -> Iterator[Any]:
        while True:
            source, empty = iter(self.batches), True
            for batch in source:
                empty = False
                yield batch
            if empty or source is self.batches:
                return

    def _next(self) -> Any:
        training = torch.get_rng_state()
        torch.set_rng_state(self._state)
        try:
            return next(self._source)
        finally:
            self._state = torch.get_rng_state()
            torch.set_rng_state(training)

    def __call__(self, step: int) -> Call | None:
        """The arguments of a step, none of them before that of the last call; None once there are no more."""
        if self.batches is None:
            return self.args, self.kwargs
        if callable(self.batches):
            return as_call_with(self.kwargs, self.batches(step))
        while self._last[0] < step:
            try:
                self._last = self._last[0] + 1, self._next()
            except StopIteration:
                return None
        return as_call_with(self.kwargs, self._last[1])

    def first(self) -> Call:
        """The arguments of the first step.

        :raises ValueError: if there are none.
        """
        call = self(0)
        if call is None:
            raise ValueError("batches: expected at least one batch, got none")
        return call

    def epoch(self, most: int) -> list[Call]:
        """The arguments of one pass over the data, as far as that can be told; nothing is used up.

        :param most: batches at most, of an iterable that has no end.
        """
        if callable(self.batches):
            return [as_call_with(self.kwargs, self.batches(step)) for step in range(most)]
        if self.batches is None or iter(self.batches) is self.batches:
            return [self.first()]
        with torch.random.fork_rng():
            torch.set_rng_state(self.start)
            return [as_call_with(self.kwargs, batch) for batch in islice(self.batches, most)]
