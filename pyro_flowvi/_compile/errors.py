"""Why a step cannot be compiled, and which line of the user's program stands in the way."""

import itertools
import linecache
import os
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from types import CodeType

import pyro
import torch

__all__ = [
    "CannotCompile",
    "CompileWarning",
    "brief",
    "is_library",
    "stack_inside",
    "user_line",
    "users_level",
]

_LIBRARIES = tuple(
    os.path.join(folder, "")
    for folder in {
        *(os.path.dirname(str(module.__file__)) for module in (torch, pyro)),
        *(sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")),
        os.path.dirname(os.path.dirname(__file__)),
    }
)


class CompileWarning(UserWarning):
    """Steps stay eager, for the cause that it names; ``compile=True`` raises :class:`CannotCompile` instead.

    Example::

        >>> issubclass(CompileWarning, UserWarning)
        True
    """


class CannotCompile(RuntimeError):
    """Why a step cannot be compiled, and the line of the user's program that stands in the way."""

    def __init__(self, cause: str, line: str | None = None) -> None:
        self.cause, self.line = cause, line
        super().__init__(cause + (f" ({line})" if line else ""))


def is_library(filename: str) -> bool:
    """Whether a file belongs to Python, to an installed package, to this one, or is none at all."""
    return filename.startswith(_LIBRARIES) or filename.startswith("<")


def user_line(stack: Sequence[traceback.FrameSummary] | traceback.StackSummary) -> str | None:
    """The innermost line that belongs to no library."""
    for frame in reversed(stack):
        if not is_library(frame.filename):
            code = linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f"{frame.filename}:{frame.lineno}, in {frame.name}: {code}"
    return None


def users_level() -> int:
    """The ``stacklevel`` with which the caller's warning points at the user's line."""
    frames = enumerate(traceback.walk_stack(sys._getframe(1)), 1)
    return next((i for i, (frame, _) in frames if not is_library(frame.f_code.co_filename)), 1)


def brief(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def stack_inside(marker: CodeType) -> list[traceback.FrameSummary]:
    """The present stack, from the innermost call of the marked function inwards."""
    frames = list(traceback.walk_stack(sys._getframe(1)))
    inner = itertools.takewhile(lambda pair: pair[0].f_code is not marker, frames)
    return list(traceback.StackSummary.extract(reversed(list(inner)), lookup_lines=False))
