"""A device beside the CPU on any machine, whose tensors mix with the CPU's as little as a GPU's do.

torch lets a backend be written in Python.  Every operation on tensors of this one is run on the CPU, after a
check that all of them are of one device, so that what would fail on a GPU for a tensor made on the wrong
device fails here, at the same line.  Numbers are the CPU's; random numbers come from a generator of its own,
and one of the CPU is refused.  Nothing is compiled for it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "second"
LIBRARIES: list[Any] = []
aten = torch.ops.aten
# A GPU lets these mix: indices may lie on the CPU, and copies go from one to the other.
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten.copy_.default, aten.copy.default, aten._to_copy.default, aten.set_.source_Tensor}


class OwnRandomNumbers:
    """What a GPU has besides the CPU's generator, and what torch asks a backend for."""

    def __init__(self) -> None:
        self.state = torch.Generator().manual_seed(0).get_state()

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        self.state = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, device: Any = None) -> Tensor:
        return self.state.clone()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        self.state = state.clone()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        before = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(before)


GENERATOR = OwnRandomNumbers()


class OnDevice(Tensor):
    """A tensor of the second device."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        out = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )
        out.inner = inner
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"{self.inner!r} on {NAME}"

    @property
    def data(self) -> Tensor:
        return OnDevice(self.inner)

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, OnDevice):
            raise RuntimeError(f"data: expected a tensor of {NAME}:0, got one of {value.device}")
        Tensor.data.__set__(self, value)
        self.inner = value.inner

    def __format__(self, spec: str) -> str:
        return format(self.inner, spec)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def numpy(self, **options: Any) -> Any:
        raise TypeError(f"can't convert a tensor of {NAME}:0 to numpy; copy it to the CPU first")

    def __array__(self, *options: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: Any) -> Tensor:
        copied = OnDevice(self.inner.clone()).requires_grad_(self.requires_grad)
        copied = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def refuse_mixed(func: Any, args: Any) -> None:
    """Raises what a GPU raises for an operation on tensors of two devices."""
    if func in COPIES:
        return
    given = (args[0], *args[2:]) if func in INDEXED else args
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    away = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() > 0]
    here = [t for t in tensors if isinstance(t, OnDevice)]
    numbers = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() == 0]
    if here and (away or (numbers and aten_takes_no_numbers(func))):
        raise RuntimeError(f"{func}: expected all tensors on one device, got {NAME}:0 and cpu")
    indices = pytree.tree_leaves(args[1]) if func in INDEXED else []
    if indices and not isinstance(args[0], OnDevice) and any(isinstance(i, OnDevice) for i in indices):
        raise RuntimeError(f"{func}: indices should be on the CPU, as the indexed tensor is")
    if func._schema.is_mutable and tensors and not isinstance(tensors[0], OnDevice) and here:
        raise RuntimeError(f"{func}: expected all tensors on one device, got cpu and {NAME}:0")


def aten_takes_no_numbers(func: Any) -> bool:
    """Whether an operation is none of those pointwise ones that take a number of the CPU."""
    return torch.Tag.pointwise not in func.tags and func.overloadpacket not in (aten.where, aten.masked_fill)


def run(func: Any, args: Any, kwargs: Any) -> Any:
    kwargs = dict(kwargs)
    refuse_mixed(func, (*args, *(v for k, v in kwargs.items() if k not in ("device",))))
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_device = any(isinstance(t, OnDevice) for t in tensors)
    if func in COPIES and func is not aten._to_copy.default:
        on_device = isinstance(tensors[0], OnDevice)
    device = kwargs.get("device")
    if device is not None:
        on_device = device.type == NAME
        kwargs["device"] = torch.device("cpu") if on_device else device
    generator = kwargs.get("generator")
    if generator is not None and on_device:
        raise RuntimeError(f"{func}: expected a generator of {NAME}, got one of {generator.device}")
    inner_args, inner_kwargs = pytree.tree_map_only(OnDevice, lambda t: t.inner, (tuple(args), kwargs))
    draws = on_device and torch.Tag.nondeterministic_seeded in func.tags
    with GENERATOR.in_use() if draws else contextlib.nullcontext():
        out = func(*inner_args, **inner_kwargs)
    if torch.Tag.inplace_view in func.tags and on_device:
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)  # the shape that torch itself has of the tensor
    if func._schema.is_mutable and pytree.tree_leaves(out):
        return _aliased(func, args, kwargs, out)
    return pytree.tree_map_only(Tensor, OnDevice, out) if on_device else out


def _aliased(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """What an operation in place returns: the tensors that it was given."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    mine = {id(t.inner): t for t in tensors if isinstance(t, OnDevice)}
    return pytree.tree_map_only(Tensor, lambda t: mine.get(id(t), t), out)


class SecondDevice(TorchDispatchMode):
    """Under it, new tensors may be made on the second device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def _empty(size: Any, stride: Any, *, dtype: Any = None, **options: Any) -> Tensor:
    # torch.tensor makes its result behind the back of all modes.
    with torch._C._DisableTorchDispatch():
        return OnDevice(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _empty_dense(size: Any, *, dtype: Any = None, **options: Any) -> Tensor:
    with torch._C._DisableTorchDispatch():
        return OnDevice(torch.empty(size, dtype=dtype, device="cpu"))


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    inner = [t.inner if isinstance(t, OnDevice) else t for t in (source, target)]
    with torch._C._DisableTorchDispatch():
        inner[1].copy_(inner[0])
    return target


def register() -> None:
    """Makes the device known to torch, for as long as the process lives; before the first backward pass."""
    from torch.utils import backend_registration

    backend_registration._setup_privateuseone_for_python_backend(NAME, GENERATOR)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", _empty, "PrivateUse1")
    library.impl("empty.memory_format", _empty_dense, "PrivateUse1")
    library.impl("_copy_from", _copy, "PrivateUse1")
    LIBRARIES.append(library)
