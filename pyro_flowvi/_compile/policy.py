"""Whether a step is traced and its graph compiled: a matter of counts alone."""

from typing import Literal, Protocol

__all__ = ["CompileWherePays", "InterpretWherePays", "Mode", "Policy", "Settled"]

STEPS_BEFORE = 200
"""Calls of ``step`` with the same shapes that "auto" runs eagerly first."""
PAYS_AT_LEAST = 1500
"""Steps that "auto" wants, one more for each operation of the graph, before ``run`` compiles."""
INTERPRETED_FROM = 300
"""Steps from which :func:`pyro_flowvi.fit` traces at all."""
MACHINE_CODE_FROM = 10_000
"""Steps, and ten more for each operation of the graph, from which it compiles: below that the seconds of
the compiler, 10 to 60 of them where its cache is cold, are more than those it saves."""
MAX_OPERATIONS = 20_000
"""Larger graphs would be compiled for many minutes; "auto" leaves them eager."""

Mode = Literal["eager", "interpreted", "machine code", "flow"]
"""How a step runs: by Pyro, as a graph, operation by operation or compiled, or of a flow outside Pyro."""


class Policy(Protocol):
    """Decides by how often a call was made, ``calls``, this one included, and how many are ``left``, which
    may not be known; and by the ``size`` of its graph, in operations."""

    def traces(self, calls: int, left: int | None, size: int) -> bool:
        """Whether to trace; ``size`` is 0 where that was not done before."""

    def mode(self, calls: int, left: int | None, size: int) -> Mode:
        """How to run a graph."""


class CompileWherePays:
    """What "auto" means for :class:`~pyro_flowvi.CompiledSVI`."""

    def traces(self, calls: int, left: int | None, size: int) -> bool:
        if size > MAX_OPERATIONS:
            return False
        return calls > STEPS_BEFORE if left is None else calls + left > PAYS_AT_LEAST + size

    def mode(self, calls: int, left: int | None, size: int) -> Mode:
        too_few = left is not None and calls + left <= PAYS_AT_LEAST + size
        return "eager" if too_few or size > MAX_OPERATIONS else "machine code"


class InterpretWherePays:
    """What "auto" means for :func:`~pyro_flowvi.fit`: a graph not worth compiling is used as it is."""

    def traces(self, calls: int, left: int | None, size: int) -> bool:
        return calls + (left or 0) > INTERPRETED_FROM

    def mode(self, calls: int, left: int | None, size: int) -> Mode:
        return "machine code" if MACHINE_CODE_FROM + 10 * size < calls + (left or 0) else "interpreted"


class Settled:
    """The mode is known: ``compile=True``, or an earlier process has begun."""

    def __init__(self, mode: Mode) -> None:
        self._mode: Mode = mode

    def traces(self, calls: int, left: int | None, size: int) -> bool:
        return self._mode != "eager"

    def mode(self, calls: int, left: int | None, size: int) -> Mode:
        return self._mode
