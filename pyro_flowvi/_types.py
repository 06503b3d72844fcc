"""Types with one name across the package."""

from collections.abc import Callable
from typing import Any

__all__ = ["Program", "Site", "Trace"]

Program = Callable[..., Any]
"""A model or a guide."""
Site = Any  # a message of Pyro, whose own type admits none of its keys
Trace = Any  # Pyro's type admits no site without a value
