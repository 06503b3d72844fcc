"""Where torch's random numbers stand."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["noise_state", "own_noise", "set_noise_state"]


def noise_state() -> list[Tensor]:
    """The state of torch's generator, and of the one on the present GPU if any is in use."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else states


def set_noise_state(states: list[Tensor]) -> None:
    """Has random numbers go on from there."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


@contextmanager
def own_noise(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Random numbers that are no part of the user's stream: those of a seed, or a copy of the stream's."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:
            # torch.manual_seed would seed every GPU as well, which no one restores.
            (torch.default_generator if device.type == "cpu" else torch).manual_seed(seed)
        yield
