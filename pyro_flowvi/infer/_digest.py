"""Short names of data."""

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["digest"]

MOST_BYTES, BLOCK = 2**28, 2**12
"""Of larger arrays, as of files in place of memory, so many bytes are read, in blocks that lie evenly."""


def digest(value: Any) -> str:
    """A short name of a nest of tensors and plain values, the same in every process."""
    found = hashlib.sha256()
    leaves, structure = pytree.tree_flatten(value)
    found.update(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu().contiguous()
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            found.update(_bytes(leaf.reshape(-1).view(torch.uint8).numpy()))
        elif isinstance(leaf, np.ndarray) and leaf.dtype != object:
            found.update(_bytes(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)))
        elif isinstance(leaf, bool | int | float | str | None):
            found.update(repr(leaf).encode())
        else:
            found.update(type(leaf).__name__.encode())
    return found.hexdigest()[:16]


def _bytes(whole: NDArray[np.uint8]) -> memoryview:
    if len(whole) <= MOST_BYTES:
        return whole.data
    blocks = whole[: len(whole) // BLOCK * BLOCK].reshape(-1, BLOCK)
    return np.ascontiguousarray(blocks[:: -(-len(whole) // MOST_BYTES)]).data
