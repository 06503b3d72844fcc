"""Short names of data."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["digest"]


def digest(value: Any) -> str:
    """A short name of a nest of tensors and plain values, the same in every process."""
    found = hashlib.sha256()
    leaves, structure = pytree.tree_flatten(value)
    found.update(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu().contiguous()
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            found.update(leaf.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, np.ndarray):
            found.update(leaf.tobytes())
        elif isinstance(leaf, bool | int | float | str | None):
            found.update(repr(leaf).encode())
        else:
            found.update(type(leaf).__name__.encode())
    return found.hexdigest()[:16]
