"""What Inductor does once a machine, or over and over, and a step does without: seconds a compilation."""

import contextlib
from collections.abc import Iterator
from typing import Any, Final

from .torch_private import private

__all__ = ["fast_inductor"]

_OPTIONS: Final = {
    "cpp.vec_isa_ok": True,  # what the processor reports is taken for good
    "pattern_matcher": False,  # none of the patterns is in these graphs
    "aot_inductor.enable_line_tables": False,
    "max_fusion_buffer_group_pairwise_attempts": 16,
}
_originals: dict[tuple[Any, str], Any] = {}


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute replaced; what two threads replace at a time is at the end what it was at first."""
    original = _originals.setdefault((owner, name), getattr(owner, name))
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def fast_inductor() -> Iterator[None]:
    """Options of Inductor, and shortcuts, that save seconds.

    It would compile and load a probe for each extension of the vector instructions, three on an x86, and
    make the table of rules of dtypes anew for each operation in each kernel.
    """
    dtypes = private("DtypePropagationOpsHandler")
    with contextlib.ExitStack() as stack:
        stack.enter_context(private("config").patch({k: v for k, v in _OPTIONS.items() if _is_option(k)}))
        stack.enter_context(_replaced(private("VecISA"), "check_build", lambda isa, code: True))
        with contextlib.suppress(Exception):
            dtypes()
            stack.enter_context(_replaced(dtypes, "__init__", lambda handler: None))
        yield


def _is_option(name: str) -> bool:
    """Whether this torch has an option."""
    place: Any = private("config")
    for part in name.split("."):
        place = getattr(place, part, None)
    return place is not None or name == "cpp.vec_isa_ok"
