"""The names of live guides and models in Pyro's param store, and their parameters there."""

import gc
import weakref
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from .pyro_private import replace_stored, stored_params

__all__ = ["NamedModel", "adopt_stored", "announce", "claim_name", "register"]

_live: "weakref.WeakValueDictionary[str, nn.Module]" = weakref.WeakValueDictionary()
"""Every guide and model with a name of its own in the param store: one registry, since the store is one."""


def claim_name(owner: nn.Module, name: str | None, default: str) -> str:
    """Takes ``name``, or the first free one of ``default``, ``default_1``, ...: no two live owners share one.

    :raises ValueError: if ``name`` is no non-empty string, or belongs to a live guide or model.

    Example::

        >>> first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> claim_name(first, None, "net"), claim_name(second, None, "net")
        ('net', 'net_1')
    """
    if name is not None and not (isinstance(name, str) and name):
        raise ValueError(f"name: expected a non-empty string, got {name!r}")
    wanted = name or default
    if wanted in _live:
        gc.collect()  # an owner in a reference cycle outlives its last use
    if name is not None and name in _live:
        raise ValueError(
            f"name: expected one that no live guide or model holds, got {name!r}; delete the other or choose "
            "another name"
        )
    free, count = wanted, 0
    while free in _live:
        count += 1
        free = f"{wanted}_{count}"
    _live[free] = owner
    return free


class NamedModel(PyroModule):
    """A model with a name of its own in the param store; copies take names of theirs.

    Example::

        >>> class Model(NamedModel):
        ...     def __init__(self, name=None):
        ...         super().__init__()
        ...         self.take_name(name)
        >>> first, second = Model(), Model()
        >>> first.name, second.name
        ('Model', 'Model_1')
    """

    def take_name(self, name: str | None) -> None:
        """Takes ``name``, or a free one after the class, once the modules are there.

        :raises ValueError: as :func:`claim_name`.
        """
        self.__dict__["_store_name"] = claim_name(self, name, type(self).__name__)
        self._pyro_name = self.name

    @property
    def name(self) -> str:
        """Prefix of the parameters in the param store."""
        return self.__dict__["_store_name"]  # type: ignore[no-any-return]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_store_name"] = claim_name(self, None, state["_store_name"])
        self._pyro_name = self.name


def announce(module: nn.Module, prefix: str) -> None:
    """Shows the module's trainable parameters to Pyro under their names, so that an optimizer finds them.

    Values of a param store that was loaded are taken over; what an earlier model of this process left there
    under the same name is replaced.

    :raises ValueError: if an entry of the store has another shape.

    Example::

        >>> announce(torch.nn.Linear(1, 2), "net")
        >>> sorted(pyro.get_param_store())
        ['net.bias', 'net.weight']
    """
    for key, param in module.named_parameters():
        if param.requires_grad:
            adopt_stored(f"{prefix}.{key}", param)
            register(f"{prefix}.{key}", param)


_Store = dict[str, Tensor]
_registered: dict[str, tuple["weakref.ref[Tensor]", _Store]] = {}
"""Parameter name -> the tensor that a guide of this process put into the param store, and that store."""


def register(full_name: str, param: Tensor) -> None:
    """Shows a parameter to Pyro under its name, so that an optimizer finds it."""
    pyro.param(full_name, param)
    _registered[full_name] = weakref.ref(param), stored_params()


def adopt_stored(full_name: str, param: Tensor, wins: bool = True, leftovers: bool = False) -> None:
    """Puts a parameter into the place of what the param store has under its name.

    :param wins: whether the parameter takes over the value of the store.
    :param leftovers: whether also one that an earlier owner of this process left there.
    :raises ValueError: if the value has another shape.
    """
    stored = stored_params().get(full_name)
    if stored is param or stored is None:
        return
    if wins and (leftovers or not _is_leftover(full_name, stored)):
        if stored.shape != param.shape:
            raise ValueError(
                f"param store entry {full_name!r}: expected shape {tuple(param.shape)}, "
                f"got {tuple(stored.shape)}; call pyro.clear_param_store() or choose another name"
            )
        with torch.no_grad():
            param.copy_(stored)
    replace_stored(full_name, param)


def _is_leftover(full_name: str, stored: Tensor) -> bool:
    """Whether a store entry is what another guide of this process left, and not a restored value.

    A guide without a name of its own starts afresh, whatever an earlier one of its class left behind.
    Clearing or restoring the store makes a new dictionary, or new tensors in it.
    """
    param, store = _registered.get(full_name, (None, None))
    return param is not None and param() is stored and store is stored_params()
