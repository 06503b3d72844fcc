"""Types with one name across the package."""

from collections.abc import Callable
from typing import Any, Literal

__all__ = ["AffineKind", "CompileMode", "InitFn", "Program", "Site", "StructureKind", "Trace"]

Program = Callable[..., Any]
"""A model or a guide."""
Site = Any  # a message of Pyro, whose own type admits none of its keys
Trace = Any  # Pyro's type admits no site without a value
AffineKind = Literal["auto", "lower", "low_rank", "elementwise"]
"""The affine map of a guide."""
StructureKind = Literal["auto", "program"] | None
"""Whether a guide draws latents by the priors of its model."""
CompileMode = bool | Literal["auto"]
InitFn = Callable[..., Any]
"""A per-site function of ``pyro.infer.autoguide.initialization``."""
