"""The names of live guides and models in Pyro's param store, and their parameters there."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from .pyro_private import (
    drop_stored,
    empty_store,
    is_module_local_param_enabled,
    replace_stored,
    stored_params,
)

__all__ = [
    "NamedModel",
    "adopt_stored",
    "announce",
    "apart_from_store",
    "check_name",
    "claim_name",
    "forget",
    "holds_name",
    "register",
    "restored",
]

_live: "weakref.WeakValueDictionary[str, nn.Module]" = weakref.WeakValueDictionary()
"""Every guide and model with a name of its own in the param store: one registry, since the store is one."""


def claim_name(owner: nn.Module, name: str | None, default: str) -> str:
    """Takes ``name``, or the first free one of ``default``, ``default_1``, ...: no two live owners share one.

    An explicit name is taken over from whoever holds it, as in a notebook's cell that is run again: what that
    owner wrote leaves the param store, and :func:`check_name` raises for it from then on.

    :raises ValueError: if ``name`` is no non-empty string.

    Example::

        >>> first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> claim_name(first, None, "net"), claim_name(second, None, "net")
        ('net', 'net_1')
    """
    if name is not None and not (isinstance(name, str) and name):
        raise ValueError(f"name: expected a non-empty string, got {name!r}")
    free, count = name or default, 0
    if free in _live:
        gc.collect()  # an owner in a reference cycle outlives its last use
    before = _live.get(free)
    if name is not None and before is not None and before is not owner:
        forget(before, free)
    while name is None and free in _live:
        count += 1
        free = f"{default}_{count}"
    _live[free] = owner
    return free


def holds_name(owner: nn.Module, name: str) -> bool:
    """Whether the owner of a name has it still; another of the same explicit name may have taken it over."""
    return _live.get(name) is owner


def check_name(owner: nn.Module, name: str) -> None:
    """Raises for an owner whose name was taken over, if it would be shown to the param store under it.

    :raises RuntimeError: says who has the name now, and what the owner is good for still.
    """
    if holds_name(owner, name) or is_module_local_param_enabled():
        return
    heir = type(_live[name]).__name__ if name in _live else "one that is gone"
    raise RuntimeError(
        f"{name}: this {type(owner).__name__} has lost its name to another of that name ({heir}), which was "
        "made later, and is no longer in the param store; draws, densities and state_dict are its own still. "
        "To run or train it beside the other, give them different names, or take copy.deepcopy of it, which "
        "gets a name of its own"
    )


def forget(owner: nn.Module, name: str) -> None:
    """Takes an owner's parameters out of the param store, but for what was loaded there since."""
    own = {id(param) for param in owner.parameters()}
    for key, param in list(stored_params().items()):
        if key.startswith(f"{name}.") and id(param) in own and _is_leftover(key, param):
            drop_stored(key)
            del _registered[key]


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

        :raises ValueError: if it is no non-empty string.
        """
        self.__dict__["_store_name"] = claim_name(self, name, type(self).__name__)
        self._pyro_name = self.name

    @property
    def name(self) -> str:
        """Prefix of the parameters in the param store."""
        return self.__dict__["_store_name"]  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        # Within a larger PyroModule, Pyro would show a part's parameters a second time, by its place there.
        part = self.__dict__.get("_modules", {}).get(name)
        if part is None or isinstance(part, PyroModule):
            return super().__getattr__(name)
        return part

    def announce(self, *parts: str) -> None:
        """Shows the trainable parameters of parts, attributes of the model, to Pyro.

        :raises RuntimeError: if another model or guide has taken over the name.
        :raises ValueError: as :func:`announce`.
        """
        check_name(self, self.name)
        for part in parts:
            announce(getattr(self, part), f"{self.name}.{part}")

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
    _note(full_name, param)


def _note(full_name: str, param: Tensor) -> None:
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
    _note(full_name, param)


@contextmanager
def apart_from_store() -> Iterator[None]:
    """Within it the param store is empty; afterwards it is as before, and so is what is known of its entries.

    Example::

        >>> with apart_from_store():
        ...     register("x", torch.nn.Parameter(torch.zeros(2)))
        >>> sorted(pyro.get_param_store())
        []
    """
    known = dict(_registered)
    try:
        with empty_store():
            yield
    finally:
        _registered.clear()
        _registered.update(known)


def restored(prefix: str, leftovers: bool = False) -> list[str]:
    """The names under a prefix whose values in the param store a new owner takes over.

    :param leftovers: as of :func:`adopt_stored`.
    """
    return [
        key
        for key, value in stored_params().items()
        if key.startswith(f"{prefix}.") and (leftovers or not _is_leftover(key, value))
    ]


def _is_leftover(full_name: str, stored: Tensor) -> bool:
    """Whether a store entry is what another guide of this process left, and not a restored value.

    A guide without a name of its own starts afresh, whatever an earlier one of its class left behind.
    Clearing or restoring the store makes a new dictionary, or new tensors in it.
    """
    param, store = _registered.get(full_name, (None, None))
    return param is not None and param() is stored and store is stored_params()
