"""Model, guide and data on one device."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._types import Program

__all__ = ["check_devices"]


def check_devices(model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuses data on another device than the guide's, unless the model itself brings them together.

    A guide that has no parameters yet takes the model's device at its first call: for it all data are right.
    Where devices differ, the model is run once at a draw of the guide, which tells whether it moves its data.

    :param model: a Pyro model.
    :param guide: a Pyro guide for it.
    :param args: the model's positional arguments.
    :param kwargs: its keyword arguments.
    :raises ValueError: naming the argument and both devices.

    Example::

        >>> def model(y):
        ...     pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)
        >>> guide = pyro_flowvi.AutoPlanar(model).materialize(torch.tensor(1.0))
        >>> check_devices(model, guide, (torch.ones(3),), {})
        >>> try:
        ...     check_devices(model, guide, (torch.ones(3, device="meta"),), {})
        ... except ValueError as error:
        ...     print(str(error).partition(";")[0])
        args[0]: expected data on the guide's device cpu, got a tensor on meta
    """
    own = _device_of(guide)
    away = None if own is None else next(_elsewhere(own, args, kwargs), None)
    if away is None or _runs(model, guide, args, kwargs):
        return
    name, device = away
    raise ValueError(
        f"{name}: expected data on the guide's device {own}, got a tensor on {device}; "
        f"move the data, with .to({str(own)!r}), or the guide, with guide.to({str(device)!r})"
    )


def _device_of(guide: Program) -> torch.device | None:
    """The one device of a guide's parameters; None without any, or with several."""
    tensors = guide.parameters() if isinstance(guide, nn.Module) else ()
    devices = {tensor.device for tensor in tensors}
    return devices.pop() if len(devices) == 1 else None


def _elsewhere(
    own: torch.device, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, torch.device]]:
    """Arguments that hold a tensor of another device; numbers of the CPU go with any."""
    for name, value in (*((f"args[{i}]", arg) for i, arg in enumerate(args)), *kwargs.items()):
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.device != own and (leaf.dim() or leaf.device.type != "cpu"):
                yield name, leaf.device


def _runs(model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the model has a density at a draw of the guide."""
    with torch.no_grad(), torch.random.fork_rng(), poutine.block():
        try:
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
            poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs).log_prob_sum()
        except Exception:  # whatever torch raises for tensors of two devices
            return False
    return True
