"""Files that are written: where they may be, and how one takes the place of another."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_file", "replacing"]


def check_file(name: str, path: str | os.PathLike[str]) -> Path:
    """The path, or ValueError unless it is that of a file, there or not, in a folder that exists."""
    found = Path(path)
    if not found.parent.is_dir() or found.is_dir():
        raise ValueError(f"{name}: expected a file in a folder that exists, got {os.fspath(path)!r}")
    return found


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A neighbouring file to write, which then takes this one's place; if writing fails, nothing changes."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
