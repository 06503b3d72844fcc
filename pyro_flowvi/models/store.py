"""Names under which a model's modules are known to Pyro's param store."""

import gc
import weakref
from typing import Any

from pyro.nn import PyroModule
from torch import nn

from ..autoguide.params import adopt_stored, register

__all__ = ["NamedModel", "announce", "claim_name"]

_live: "weakref.WeakValueDictionary[str, nn.Module]" = weakref.WeakValueDictionary()


def claim_name(module: Any, name: str | None, default: str) -> str:
    """Takes ``name``, or the first free one of ``default``, ``default_1``, ...: no two live models share one.

    :raises ValueError: if ``name`` is no non-empty string, or belongs to a live model.

    Example::

        >>> first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> claim_name(first, None, "net"), claim_name(second, None, "net")
        ('net', 'net_1')
    """
    if name is not None and not (isinstance(name, str) and name):
        raise ValueError(f"name: expected a non-empty string, got {name!r}")
    wanted = name or default
    if wanted in _live:
        gc.collect()  # a model in a reference cycle outlives its last use
    if name is not None and name in _live:
        raise ValueError(
            f"name: expected one that no live model holds, got {name!r}; delete the other or choose another"
        )
    free, count = wanted, 0
    while free in _live:
        count += 1
        free = f"{wanted}_{count}"
    _live[free] = module
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
