"""Argument checks with one wording: the argument's name, what was expected and what came."""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import torch

__all__ = [
    "check_count",
    "check_dtype",
    "check_positive",
    "check_positive_int",
    "check_sites",
    "check_widths",
]

FLOAT_DTYPES = (torch.float32, torch.float64)


def check_positive_int(name: str, value: object) -> int:
    """``value`` as an int, or ValueError unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return int(value)


def check_count(name: str, value: object) -> int:
    """``value`` as an int, or ValueError unless it is an integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise ValueError(f"{name}: expected an integer of at least 0, got {value!r}")
    return int(value)


def check_positive(name: str, value: object) -> float:
    """``value`` as a float, or ValueError unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return float(value)


def check_sites(sites: str | Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """The sites that are wanted, None for all, in the order of the known ones; ValueError for others."""
    names = list(known)
    wanted = names if sites is None else [sites] if isinstance(sites, str) else list(sites)
    if unknown := sorted(set(wanted) - set(names)):
        raise ValueError(f"sites: expected some of {names}, got {unknown}")
    return [site for site in names if site in wanted]


def check_widths(name: str, value: Sequence[int]) -> tuple[int, ...]:
    """Hidden-layer widths as a tuple of positive ints."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name}: expected a sequence of positive integers, got {value!r}")
    return tuple(check_positive_int(name, width) for width in value)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """ValueError unless ``dtype`` is one in which the numerics hold."""
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name}: expected torch.float32 or torch.float64, got {dtype}")
