"""What a user's model is to these tests: how it is built, its guide, and what the page says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pyro.infer import Trace_ELBO, TraceEnum_ELBO

from pyro_flowvi import AutoRealNVP

__all__ = ["SMALL", "Case", "Problem", "Refusal", "summed"]

SMALL = {"num_layers": 4, "hidden": (16,)}


@dataclass
class Problem:
    """A model with its data; ``check`` gets a fitted guide's draws, by site ``(draws,) + shape``."""

    model: Any
    args: tuple[Any, ...] = ()
    check: Callable[[dict[str, Any]], None] | None = None


@dataclass(frozen=True)
class Refusal:
    """Which error comes, with what words."""

    error: type[Exception]
    words: str


def summed(plates: int) -> Callable[[], Any]:
    """The objective of examples whose discrete latents are summed out."""
    return partial(TraceEnum_ELBO, max_plate_nesting=plates)


_REALNVP = partial(AutoRealNVP, **SMALL)


@dataclass
class Case:
    """A row of the table in docs/compatibility.md, which the tests hold against what they find.

    ``compiled`` is "yes" or "eager", with the reason in ``cause``; with a ``refusal`` no way is open.
    """

    key: str
    name: str
    build: Callable[[], Problem]
    guide: Callable[..., Any] = _REALNVP
    guide_name: str = "`AutoRealNVP`"
    loss: Callable[[], Any] = Trace_ELBO
    compiled: str = "yes"
    cause: str = ""
    refusal: Refusal | None = None
    remark: str = ""
    warns: str = ""
    steps: int = 200
    svi_steps: int = 50
    fit_options: Mapping[str, Any] = field(default_factory=dict)
    slow: bool = False
    unsteady: bool = False
    """Whether a few draws of a huge loss rule the ELBO after ``svi_steps`` of stock SVI."""
    behind: bool = False
    """Whether the ELBO after ``fit`` is below that of ``AutoNormal`` after as many steps."""
