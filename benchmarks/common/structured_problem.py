"""What the models of ``structured_models.py`` are: a program, its data, and the scalars that are compared."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Sites = Mapping[str, Tensor]

F64 = torch.float64
NUM_LOCALS = 10
COORDINATES: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda value: value,
    "log": torch.log,
    "logit": torch.logit,
    "artanh": lambda factor: factor[..., 1, 0].atanh(),
}


def named(name: str, values: Tensor, at_most: int | None = None) -> dict[str, Tensor]:
    """The scalars of draws ``(n, *)`` by name and index from 1, or at most so many, evenly spread."""
    columns = values.reshape(len(values), -1).unbind(-1)
    if values.dim() == 1:
        return {name: values}
    # Odd, so that of pairs both members are seen.
    step = 1 if at_most is None else math.ceil(len(columns) / at_most) | 1
    return {f"{name}[{i + 1}]": columns[i] for i in range(0, len(columns), step)}


@dataclass(frozen=True)
class Problem:
    """A model with its data, and which of its scalars are compared.

    :param truth: the name of its posterior, which two ways to write one model share.
    :param roots: of each root the name of its coordinate.
    :param locals: from draws of the sites, ``(n, *)`` each, what else is compared, by name.
    """

    truth: str
    model: Callable[..., Any]
    args: tuple[Tensor, ...] = field(repr=False)
    roots: Mapping[str, str]
    locals: Callable[[Sites], dict[str, Tensor]]

    def coordinates(self, sites: Sites) -> dict[str, Tensor]:
        """The scalars by name, ``(n,)``, of draws of the sites."""
        return self.of_roots(sites) | self.of_locals(sites)

    def of_roots(self, sites: Sites) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, kind in self.roots.items():
            found |= named(f"{kind} {name}".strip(), COORDINATES[kind](sites[name].detach()))
        return found

    def of_locals(self, sites: Sites) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, values in self.locals({name: value.detach() for name, value in sites.items()}).items():
            found |= named(name, values, NUM_LOCALS)
        return found


def some(*names: str) -> Callable[[Sites], dict[str, Tensor]]:
    return lambda sites: {name: sites[name] for name in names}


class Data:
    """Data from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=F64)

    def integers(self, low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=self.generator)

    def coins(self, logits: Tensor) -> Tensor:
        return torch.bernoulli(torch.sigmoid(logits), generator=self.generator)
