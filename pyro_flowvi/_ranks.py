"""The processes that train one model together, over ``torch.distributed``."""

import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._noise import noise_state, set_noise_state

__all__ = ["ALONE", "LostRank", "Ranks"]


class LostRank(ConnectionError):
    """Another process of a distributed fit has died, failed, or does not answer; the guide holds its last good
    state, and a checkpoint the last complete one.

    :param rank: the process that says so.
    :param cause: what ``torch.distributed`` said.

    Example::

        >>> str(LostRank(1, "Connection closed by peer"))
        'rank 1: another rank has died, failed or does not answer (Connection closed by peer); the guide holds its last good state, and a run goes on from its checkpoint'
    """  # noqa: E501  the message is one line

    def __init__(self, rank: int, cause: str) -> None:
        self.rank, self.cause = rank, cause
        super().__init__(
            f"rank {rank}: another rank has died, failed or does not answer ({cause}); the guide holds its "
            "last good state, and a run goes on from its checkpoint"
        )

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.rank, self.cause)


class Ranks:
    """This process among those that train together; of one alone everything is as if there were no others.

    All of them call the same methods in the same order.

    :param rank: the number of this process, from 0.
    :param size: how many there are.
    :param device: of this one's parameters.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size, self._device = rank, size, device
        self.flag = False
        """What this rank tells the others with its next gradient."""
        self.flagged = False
        """Whether any rank has told something so far, and nobody has taken note."""
        self.bytes_reduced, self.seconds_reducing = 0, 0.0
        """What gradients have sent so far, and for how long."""
        self._noise: list[Tensor] | None = None

    def tell(self, what: bool) -> None:
        """Tells the others something with the next gradient."""
        self.flag = what and not self.alone

    def heard(self, own: bool) -> bool:
        """Whether a rank has told something since the last time that this was asked; of one alone ``own``."""
        if self.alone:
            return own
        heard, self.flagged = self.flagged, False
        return heard

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes files and talks to the user."""
        return self.rank == 0

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What ``torch.distributed`` raises becomes a :class:`LostRank`."""
        try:
            yield
        except RuntimeError as error:
            raise LostRank(
                self.rank, (str(error).strip().splitlines() or [type(error).__name__])[0]
            ) from error

    # -- numbers -------------------------------------------------------------------------------------

    def sum(self, value: Tensor) -> Tensor:
        """Total over all ranks, the same to the last bit on each."""
        if self.alone:
            return value
        total = value.detach().clone(memory_format=torch.contiguous_format)
        with self._together():
            dist.all_reduce(total)
        return total

    def sum_both(
        self,
        of_own: Callable[[], tuple[Tensor, Tensor]],
        otherwise: tuple[Tensor, Tensor],
        refusals: Sequence[type[Exception]],
    ) -> tuple[Tensor, Tensor]:
        """Totals over all ranks of values ``(P,)`` and slopes ``(P, D)``, in one message.

        :param of_own: computes those of this rank.
        :param otherwise: what counts where it cannot, among others.
        """
        value, slope = self.attempt(of_own, otherwise, refusals)
        if self.alone:
            return value, slope
        total = self.sum(torch.cat([value.unsqueeze(-1), slope.to(value)], -1))
        return total[:, 0], total[:, 1:].to(slope)

    def average(
        self, grad: Tensor, loss: float, dropped: int = 0, share: float = 1.0
    ) -> tuple[Tensor, float, int]:
        """Means of a flat gradient and a loss over all ranks, the number of dropped draws, in one message.

        :param share: how much this rank counts beside the others.
        """
        if self.alone:
            return grad, loss, dropped
        started = time.perf_counter()
        # Two parts, the first so short that it is summed without rounding: float32 has few digits for a loss.
        high = torch.tensor(share * loss, dtype=torch.bfloat16).item()
        low = share * loss - high if math.isfinite(high) else 0.0
        told = grad.new_tensor([high, low, float(dropped), share, float(self.flag)])
        buffer = torch.cat([grad if share == 1.0 else grad * share, told])
        with self._together():
            dist.all_reduce(buffer)
        high, low, dropped_by_all, shares, flags = buffer[-5:].tolist()
        self.flag, self.flagged = False, self.flagged or flags > 0.0
        self.bytes_reduced += buffer.nbytes
        self.seconds_reducing += time.perf_counter() - started
        return buffer[:-5] / shares, (high + low) / shares, int(dropped_by_all)

    def lead(self, *tensors: Tensor) -> None:
        """Gives tensors the numbers that they have on rank 0."""
        if self.alone:
            return
        with torch.no_grad(), self._together():
            for tensor in tensors:
                held = tensor.detach().contiguous()
                dist.broadcast(held, 0)
                if held.data_ptr() != tensor.data_ptr():
                    tensor.copy_(held)

    def join(self, parts: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Tensors of all ranks, which differ in their first dimension alone, on each.

        :param sizes: the lengths of all of them.
        """
        if self.alone:
            return [parts]
        found = []
        with self._together():
            for rank, size in enumerate(sizes):
                held = (
                    parts.detach().contiguous()
                    if rank == self.rank
                    else parts.new_empty(size, *parts.shape[1:])
                )
                dist.broadcast(held, rank)
                found.append(held)
        return found

    # -- anything ------------------------------------------------------------------------------------

    def same(self, value: Any) -> Any:
        """What rank 0 has in its place."""
        if self.alone:
            return value
        box = [self._packed(value) if self.leads else None]
        with self._together():
            dist.broadcast_object_list(box, 0)
        return value if self.leads else self._unpacked(box[0])

    def all(self, value: Any) -> list[Any]:
        """What all ranks have in its place, in their order."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(found, self._packed(value))
        return [self._unpacked(other) for other in found]

    def _packed(self, value: Any) -> Any:
        """What is sent: with tensors of a GPU, which is another one on each rank, as in a file."""
        if self._device is None or self._device.type == "cpu":
            return value
        file = io.BytesIO()
        torch.save(value, file)
        return file.getvalue()

    def _unpacked(self, sent: Any) -> Any:
        if self._device is None or self._device.type == "cpu":
            return sent
        return torch.load(io.BytesIO(sent), map_location=self.place, weights_only=False)

    def place(self, storage: Any, location: str) -> Any:
        """Where a rank puts what another one has saved, as ``map_location`` of ``torch.load``."""
        if location == "cpu" or self._device is None:
            return storage
        return storage.cpu() if self._device.type == "cpu" else storage.cuda(self._device.index)

    def every(self, value: bool) -> bool:
        """Whether something holds on all ranks."""
        return all(self.all(value))

    # -- checks --------------------------------------------------------------------------------------

    def check_same(self, described: Mapping[str, Any]) -> None:
        """Holds what describes a run against what the other ranks have.

        :raises ValueError: on all ranks, with the first thing in which one differs.
        """
        found = self.all(dict(described))
        for rank, other in enumerate(found[1:], 1):
            for name in [*found[0], *(key for key in other if key not in found[0])]:
                one, two = found[0].get(name), other.get(name)
                if one != two:
                    raise ValueError(
                        f"{name}: expected the same on all ranks, got {one!r} on rank 0 and {two!r} on "
                        f"rank {rank}"
                    )

    def check_equal(self, params: Mapping[str, Tensor]) -> None:
        """Holds parameters that all ranks share against each other, bit for bit.

        :raises RuntimeError: on all ranks, with the name of the first that differs.
        """
        if self.alone:
            return
        found = self.all({name: _checksum(param) for name, param in params.items()})
        for rank, other in enumerate(found[1:], 1):
            for name in sorted(found[0].keys() | other.keys()):
                if found[0].get(name) != other.get(name):
                    raise RuntimeError(
                        f"parameter {name!r}: expected the same numbers on all ranks, got others on rank "
                        f"{rank} than on rank 0; a model or guide that trains other parameters on each, or "
                        "changes them itself, cannot be trained together"
                    )

    # -- noise ---------------------------------------------------------------------------------------

    def share_noise(self) -> None:
        """Has all ranks draw the same random numbers, but for those in :meth:`own_noise`."""
        if self.alone:
            return
        state = torch.get_rng_state()
        self.lead(state)
        torch.set_rng_state(state)
        seed, other = torch.randint(2**48, (2,), device="cpu").tolist()
        torch.manual_seed(self._stream(seed))
        self._noise = noise_state()
        torch.manual_seed(other)

    def _stream(self, seed: int) -> int:
        """The seed of what this rank alone draws."""
        return seed + self.rank

    @contextmanager
    def own_noise(self) -> Iterator[None]:
        """Random numbers in this context are this rank's own."""
        if self._noise is None:
            yield
            return
        shared = noise_state()
        set_noise_state(self._noise)
        try:
            yield
        finally:
            self._noise = noise_state()
            set_noise_state(shared)

    @property
    def noise(self) -> list[Tensor]:
        """Where this rank's own random numbers stand."""
        return noise_state() if self._noise is None else self._noise

    def set_noise(self, state: list[Tensor]) -> None:
        """Has this rank's own random numbers go on from a state."""
        if not self.alone:
            self._noise = state

    @contextmanager
    def parted_noise(self) -> Iterator[None]:
        """Random numbers in this context are others on each rank, and follow from those that all share."""
        if self.alone:
            yield
            return
        seed = int(torch.randint(2**48, (1,), device="cpu"))
        with torch.random.fork_rng():
            torch.manual_seed(seed + self.rank)
            yield

    def numbered(self, i: int) -> int:
        """A number that no other rank has, for the ``i``-th of this one."""
        return i * self.size + self.rank

    # -- work ----------------------------------------------------------------------------------------

    def part(self, total: int) -> range:
        """This rank's part of so many things, next to each other."""
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def attempt(self, act: Callable[[], Any], otherwise: Any, refusals: Sequence[type[Exception]]) -> Any:
        """The result of a function; of one that a rank among others cannot compute, something else.

        A rank alone may raise: others would wait for it.
        """
        if self.alone:
            return act()
        try:
            return act()
        except tuple(refusals):
            return otherwise


def _checksum(param: Tensor) -> int:
    """A number that hardly two tensors have in common."""
    bits = param.detach().contiguous().reshape(-1).view(torch.uint8)
    pad = -len(bits) % 8
    words = torch.cat([bits, bits.new_zeros(pad)]).view(torch.int64)
    place = torch.arange(1, len(words) + 1, device=words.device)
    return int((words * (2 * place + 1)).sum())


ALONE = Ranks()
