"""K transforms of one structure, run in one batched call."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform
from torch.func import functional_call

from ..nn import MLP
from .base import FlowTransform, forward_and_log_det, inverse_and_log_det
from .compose import common_dim, own_dim

__all__ = ["Stacked"]


class _Call(nn.Module):
    """Both directions of a transform behind ``nn.Module``'s call, which a ``Transform`` takes for its own."""

    def __init__(self, transform: Any) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return (inverse_and_log_det if inverse else forward_and_log_det)(self.transform, x)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def drop_caches(module: nn.Module) -> None:
    """Empties the caches of Pyro's transforms, which hold tensors of a graph that has no copy.

    Example::

        >>> reflect = pyro.distributions.transforms.Householder(2)
        >>> y = reflect(torch.zeros(2))
        >>> drop_caches(reflect)
        >>> reflect._cached_x_y
        (None, None)
    """
    for part in module.modules():
        for key, value in vars(part).items():
            if key.startswith("_cache") and key != "_cache_size":
                vars(part)[key] = (None, None) if isinstance(value, tuple) else None


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last


class Stacked(FlowTransform):
    """K transforms of one structure with parameters of their own: the k-th moves the k-th vector.

    The parameters are kept stacked, shape ``(K,) + shape``, under the names that one transform has, and
    all K run as one batched operation (``torch.vmap``): what is written for one transform serves, and
    nothing loops over K.

    :param transforms: K modules, transforms of vectors, alike but for the values of their parameters and
        buffers.  Their tensors are copied.
    :param dim: the length D of the vectors, needed only where the transforms do not tell it.
    :raises ValueError: if there is none, one is no module and transform of vectors, or they differ in
        structure.

    Shapes: ``batch_shape`` is ``(K,)``; input ``(*, K, D)`` or what broadcasts with it, such as
    ``(*, 1, D)`` for one vector that all K move; output ``(*, K, D)``.

    Example::

        >>> from pyro_flowvi import FLOWS
        >>> flows = Stacked(FLOWS["realnvp"](2) for _ in range(3))
        >>> y, log_det = flows.forward_and_log_det(torch.zeros(100, 1, 2))
        >>> y.shape, log_det.shape
        (torch.Size([100, 3, 2]), torch.Size([100, 3]))
    """

    def __init__(self, transforms: Iterable[Any], dim: int | None = None) -> None:
        transforms = list(transforms)
        for transform in transforms:
            if not isinstance(transform, nn.Module) or not isinstance(transform, Transform):
                raise ValueError(f"transforms: expected modules that are transforms, got {transform!r}")
            own_batch: Any = getattr(transform, "batch_shape", ())
            if own_batch:
                raise ValueError(f"transforms: expected no batch shape, got {tuple(own_batch)}")
        if not transforms:
            raise ValueError("transforms: expected at least one transform, got none")
        super().__init__(common_dim(map(own_dim, transforms)) if dim is None else dim)
        alike = {
            (type(t), *((name, x.shape, x.dtype) for name, x in _tensors(t).items())) for t in transforms
        }
        if len(alike) > 1:
            raise ValueError("transforms: expected the same structure, got different parameters or buffers")
        self.num = len(transforms)
        self.exact_inverse = all(getattr(t, "exact_inverse", True) for t in transforms)
        self._stack(copy.deepcopy(transforms[0]), [_tensors(t) for t in transforms])

    def _stack(self, template: Any, tensors: Sequence[dict[str, Tensor]]) -> None:
        for name, first in tensors[0].items():
            owner, last = _owner(template, name)
            values = [each[name].detach() for each in tensors]
            if isinstance(first, nn.Parameter):
                stacked = nn.Parameter(torch.stack(values), requires_grad=first.requires_grad)
                owner._parameters[last] = stacked
            elif any(not torch.equal(value, values[0]) for value in values[1:]):
                owner._buffers[last] = torch.stack(values)
        self._shared = {
            name for name, buffer in template.named_buffers() if buffer.shape == tensors[0][name].shape
        }
        for module in template.modules():
            if isinstance(module, MLP):
                module.columns = True
        self.each = template
        self._run = (_Call(template),)  # in a tuple: the parameters are registered once

    @property
    def batch_shape(self) -> Size:
        return Size((self.num,))

    def _both(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        stacked = {
            f"transform.{name}": x for name, x in _tensors(self.each).items() if name not in self._shared
        }
        one_for_all = x.dim() < 2 or x.shape[-2] == 1
        if not one_for_all and x.shape[-2] != self.num:
            raise ValueError(f"x: expected shape (*, {self.num}, {self.dim}), got {tuple(x.shape)}")
        lead = x.shape[:-1] if x.dim() < 2 else x.shape[:-2]
        rows = x.reshape(-1, self.dim) if one_for_all else x.movedim(-2, 0).reshape(self.num, -1, self.dim)

        def run(tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = functional_call(self._run[0], tensors, (x, inverse))
            return result

        if one_for_all and not stacked:  # transforms that are all the same
            rows, one_for_all = rows.expand(self.num, *rows.shape), False
        y, log_det = torch.vmap(run, in_dims=(0, None if one_for_all else 0))(stacked, rows)
        y = y.reshape(self.num, *lead, self.dim).movedim(0, -2)
        return y, log_det.reshape(self.num, *lead).movedim(0, -1)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._both(x, inverse=False)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._both(y, inverse=True)

    def part(self, index: int) -> Any:
        """A copy of the transform of that index, with parameters of its own.

        :raises IndexError: if there is none of that index.
        """
        if not -self.num <= index < self.num:
            raise IndexError(f"index: expected below {self.num}, got {index}")
        drop_caches(self.each)
        part = copy.deepcopy(self.each)
        for name, value in _tensors(part).items():
            owner, last = _owner(part, name)
            if name in self._shared:
                continue
            row = value.detach()[index].clone()
            if isinstance(value, nn.Parameter):
                owner._parameters[last] = nn.Parameter(row, requires_grad=value.requires_grad)
            else:
                owner._buffers[last] = row
        for module in part.modules():
            if isinstance(module, MLP):
                module.columns = False
        return part

    def select(self, indices: Sequence[int]) -> "Stacked":
        """Those transforms alone, in that order; the parameters are copies.

        :raises IndexError: if there is none of an index.
        """
        return Stacked([self.part(index) for index in indices], dim=self.dim)

    def extra_repr(self) -> str:
        return f"num={self.num}"
