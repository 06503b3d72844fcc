"""The model's arguments step by step."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._program.call import as_call
from .._ranks import ALONE, Ranks
from ._parts_of_data import fixed_part, in_turn

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

    Of several ranks each takes batches in its turn: the first takes the first of the first step, the second
    the next one.

    :param batches: None, a callable of the step, or an iterable; a generator runs once.
    :param args: the arguments where ``batches`` is None.
    :param kwargs: keyword arguments that all steps share; a batch's own come before them.
    :param ranks: the processes.
    """

    def __init__(
        self, batches: Any, args: tuple[Any, ...], kwargs: dict[str, Any], ranks: Ranks = ALONE
    ) -> None:
        self.batches, self.args, self.kwargs, self._ranks = batches, args, kwargs, ranks
        self._fixed = False
        self._lengths: list[int] = []
        self.restart(torch.get_rng_state())

    def keep_rows(self) -> None:
        """Has each rank see a part of the data of its own from now on, the same in every epoch.

        :raises ValueError: if the batches cannot be divided.
        """
        if self._ranks.alone or self.batches is None or callable(self.batches):
            return
        self.batches, self._fixed = self.part(), True
        if self.batches is None:
            raise ValueError(
                "batches: expected a list of at least as many batches as there are ranks, or a DataLoader "
                "that shuffles or goes in order, of which each rank keeps its own rows, got neither"
            )
        self.restart(self.start)

    def part(self) -> Any:
        """The batches of this rank's part of the data, the same in every epoch; None where there is none."""
        return self.batches if self._fixed else fixed_part(self.batches, self._ranks)

    def restart(self, start: Tensor) -> None:
        """Begins anew, with the random numbers that follow from a state of torch's generator."""
        self.start = self._state = start
        self._source = self._rounds()
        self._last: tuple[int, Any] = (-1, None)

    def _rounds(self) -> Iterator[Any]:
        ranks = ALONE if self._fixed else self._ranks
        return in_turn(self.batches, ranks)

    def _next(self) -> Any:
        training = torch.get_rng_state()
        torch.set_rng_state(self._state)
        try:
            return next(self._source)
        finally:
            self._state = torch.get_rng_state()
            torch.set_rng_state(training)

    def _at(self, step: int) -> Any:
        """What a callable gives for a step."""
        return self.batches(step * self._ranks.size + self._ranks.rank)

    def __call__(self, step: int) -> Call | None:
        """The arguments of a step, none of them before that of the last call; None once there are no more."""
        if self.batches is None:
            return self.args, self.kwargs
        if callable(self.batches):
            return as_call_with(self.kwargs, self._at(step))
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
        found = self._ranks.all(None if call is None else _lengths(call))
        if call is None or None in found:
            few = "" if self._ranks.alone else f" for each of {self._ranks.size} ranks"
            raise ValueError(f"batches: expected at least one batch{few}, got none")
        self._lengths = found[0]
        return call

    def share(self, call: Call) -> float:
        """How many rows a call has beside the first one of rank 0: how much its gradient counts."""
        if self._ranks.alone or self.batches is None:
            return 1.0
        found = [own / first for own, first in zip(_lengths(call), self._lengths, strict=False) if first]
        return min(found, default=1.0) or 1.0

    def epoch(self, most: int) -> list[Call]:
        """The arguments of one pass over the data, as far as that can be told; nothing is used up.

        :param most: batches at most, of an iterable that has no end.
        """
        if callable(self.batches):
            steps = -(-most // self._ranks.size)
            return [as_call_with(self.kwargs, self._at(step)) for step in range(steps)]
        if self.batches is None or iter(self.batches) is self.batches:
            return [self.first()]
        with torch.random.fork_rng():
            torch.set_rng_state(self.start)
            return [as_call_with(self.kwargs, batch) for batch in islice(self.batches, most)]


def _lengths(call: Call) -> list[int]:
    """The lengths of all tensors in a call."""
    return [len(leaf) for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim()]
