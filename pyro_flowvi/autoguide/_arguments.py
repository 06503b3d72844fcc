"""What the arguments of a flow guide may be."""

from typing import Any

from torch import nn
from torch.distributions import Transform

from ..flows import FLOWS
from ._affine import AFFINES

__all__ = ["check_arguments"]


def check_arguments(
    model: Any,
    flow: Any,
    name: Any,
    affine: Any,
    tails: Any,
    structure: Any,
    amortize: Any,
    create_plates: Any,
) -> None:
    """Refuses arguments of :class:`AutoFlow` that are not of the described kind.

    :raises ValueError: naming the argument.
    """
    if not callable(model):
        raise ValueError(f"model: expected a callable, got {model!r}")
    if isinstance(flow, str) and flow not in FLOWS:
        raise ValueError(f"flow: expected one of {sorted(FLOWS)}, got {flow!r}")
    if (not callable(flow) and not isinstance(flow, str)) or isinstance(flow, Transform):
        raise ValueError(f"flow: expected a key of FLOWS or a callable dim -> Transform, got {flow!r}")
    if affine not in ("auto", None, *AFFINES):
        raise ValueError(f"affine: expected 'auto', None or {list(AFFINES)}, got {affine!r}")
    if not isinstance(tails, bool):
        raise ValueError(f"tails: expected True or False, got {tails!r}")
    if name is not None and not (isinstance(name, str) and name):
        raise ValueError(f"name: expected a non-empty string, got {name!r}")
    if structure not in ("auto", "program", None):
        raise ValueError(f"structure: expected 'auto', 'program' or None, got {structure!r}")
    if create_plates is not None and not callable(create_plates):
        raise ValueError(f"create_plates: expected a callable or None, got {create_plates!r}")
    if not (amortize is None or amortize == "auto" or isinstance(amortize, nn.Module)):
        raise ValueError(f"amortize: expected None, 'auto' or an nn.Module, got {amortize!r}")
