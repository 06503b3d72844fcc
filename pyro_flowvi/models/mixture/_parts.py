"""What a mixture of flows is made of, and the checks of its arguments."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Distribution

from ..._checks import check_count, check_dtype, check_positive
from ...flows import FLOWS, indexed_layers
from ...transforms import Compose, IndexedCompose, LowerAffine, Stacked
from ...transforms.compose import Chain
from ...transforms.indexed import INDEX_SCALE

__all__ = [
    "Flow",
    "Weights",
    "check_logits",
    "check_rows",
    "check_weight",
    "class_map",
    "component_flows",
    "known_rows",
    "moved",
]

Flow = str | Callable[[int], nn.Module]


class Weights(nn.Module):
    """The mixture's weights or, of a Dirichlet, its parameters, as logarithms."""

    logits: Tensor

    def __init__(self, num: int, *, trained: bool = True) -> None:
        super().__init__()
        logits = torch.zeros(num)
        if trained:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)


def known_rows(x: Any, mask: Any) -> Any:
    """``x`` with zeros in rows that are not known; ValueError if the mask is none."""
    if mask is None or not isinstance(x, Tensor):
        return x
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected booleans (torch.bool), got {kind}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask: expected shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
    return torch.where(mask.unsqueeze(-1), x, 0.0)


def check_logits(logits: Any, num: int) -> None:
    """ValueError unless these are log weights of ``num`` components."""
    if not isinstance(logits, Tensor) or logits.dim() == 0 or logits.shape[-1] != num:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits: expected a tensor of shape (*, {num}), got {got}")


def check_rows(x: Any, y: Any, dim: int, num_classes: int, *, matrix: bool = True) -> None:
    """ValueError unless these are rows of data and labels, as :meth:`VMoNF.model` takes them.

    :param matrix: whether rows are in one dimension, and not of any shape.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"x: expected a tensor, got {type(x).__name__}")
    check_dtype("x", x.dtype)
    if (matrix and x.dim() != 2) or not x.dim() or x.shape[-1] != dim or not x.numel():
        shape = f"(N, {dim}) with N > 0" if matrix else f"(*, {dim}), not empty"
        raise ValueError(f"x: expected shape {shape}, got {tuple(x.shape)}")
    if y is not None:
        if not isinstance(y, Tensor) or y.dtype != torch.long:
            kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"y: expected integers (torch.long), got {kind}")
        if y.shape != x.shape[:-1]:
            raise ValueError(f"y: expected shape {tuple(x.shape[:-1])}, got {tuple(y.shape)}")
    if not is_validation_enabled():
        return
    if not bool(x.isfinite().all()):
        raise ValueError(f"x: expected finite values, got {int((~x.isfinite()).sum())} that are not")
    if y is not None and bool(((y < -1) | (y >= num_classes)).any()):
        raise ValueError(f"y: expected labels from 0 to {num_classes - 1}, or -1, got {y.unique().tolist()}")


def check_weight(name: str, value: float) -> float:
    """``value`` as a float, or ValueError unless it is 0 or a positive number."""
    return 0.0 if value == 0 and not isinstance(value, bool) else check_positive(name, value)


def component_flows(
    num: int, dim: int, flow: Flow, shared: int, index_dim: int, sizes: dict[str, Any]
) -> Chain:
    """The flows of all components, stacked, and what they share: next to the data, hence last."""

    if check_count("shared_layers", shared) and index_dim:
        raise ValueError(f"shared_layers: expected 0 with continuously-indexed components, got {shared}")

    def build(**sizes: Any) -> Any:
        return FLOWS[flow](dim, **sizes) if isinstance(flow, str) else flow(dim)

    def component(affine: LowerAffine) -> Chain:
        if not index_dim:
            return Compose([build(**sizes), affine], dim=dim)
        # Indices that move nothing at first get no gradient.
        layers = indexed_layers(flow, dim, index_dim=index_dim, index_scale=INDEX_SCALE, **sizes)
        return IndexedCompose([*layers, affine], dim)

    common = [build() for _ in range(shared)]
    if shared and isinstance(flow, str):
        common = [build(num_layers=shared, hidden=sizes["hidden"])]
    affines = [LowerAffine(dim) for _ in range(num)]
    for affine in affines:
        nn.init.normal_(affine.loc)  # components that start alike stay alike
    stacked = Stacked(map(component, affines))
    return Compose([stacked, *common])


def class_map(classes: Sequence[int] | None, num: int) -> Tensor:
    """The class of each of ``num`` components, integers of shape ``(num,)``."""
    if classes is None:
        return torch.arange(num)
    found = [check_count("classes", each) for each in classes]
    if len(found) != num or set(found) != set(range(max(found, default=-1) + 1)):
        raise ValueError(f"classes: expected {num} integers, with each from 0 on, got {list(classes)!r}")
    return torch.tensor(found)


def moved(law: Distribution, fn: Callable[[Tensor], Tensor]) -> Distribution:
    """A copy of a distribution with all its tensors, those of distributions in it too, moved by ``fn``."""
    new = copy.copy(law)
    for name, value in vars(law).items():
        if isinstance(value, Tensor):
            vars(new)[name] = fn(value)
        elif isinstance(value, Distribution):
            vars(new)[name] = moved(value, fn)
    return new
