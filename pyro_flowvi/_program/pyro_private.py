"""Every private name of Pyro that the package uses; no other module imports one.

Tried on Pyro 1.9.2.  Methods that a subclass overrides or inherits are used where they stand:
``_get_trace`` and ``_vectorized_num_particles`` of objectives, ``_setup_prototype``, ``_prototype_hide_fn``
and ``_pyro_context`` of guides, ``_get_optim`` of optimizers, and the marks ``_pyro_...`` on tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.infer.traceenum_elbo import _compute_dice_elbo as compute_dice_elbo
from pyro.infer.traceenum_elbo import _compute_model_factors as compute_model_factors
from pyro.nn.module import _is_module_local_param_enabled as is_module_local_param_enabled
from pyro.optim.optim import _load_state_dict as load_optimizer_state
from pyro.poutine.runtime import _PYRO_STACK as PYRO_STACK
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor

from .._types import Program, Trace

__all__ = [
    "PYRO_STACK",
    "compute_dice_elbo",
    "compute_model_factors",
    "drop_stored",
    "empty_store",
    "get_traces",
    "is_module_local_param_enabled",
    "load_optimizer_state",
    "replace_stored",
    "stored_params",
    "subsampling_replaced",
]


def get_traces(
    elbo: Any, model: Program, guide: Program, args: Any, kwargs: Any
) -> Iterator[tuple[Trace, Trace]]:
    """Traces of model and guide for each run of an objective, scored as it scores them."""
    return iter(elbo._get_traces(model, guide, args, kwargs))


def stored_params() -> dict[str, Tensor]:
    """The unconstrained parameters of the param store: the dictionary itself, which a new store replaces."""
    params: dict[str, Tensor] = pyro.get_param_store()._params
    return params


def replace_stored(full_name: str, param: Tensor) -> None:
    """Puts a parameter into the place of the one that the param store has under its name."""
    store = pyro.get_param_store()
    store._param_to_name.pop(store._params[full_name], None)
    store._params[full_name] = param
    store._param_to_name[param] = full_name


def drop_stored(full_name: str) -> None:
    """Takes a parameter out of the param store, which may have it under another name too."""
    store = pyro.get_param_store()
    param = store._params.pop(full_name)
    store._constraints.pop(full_name, None)
    if store._param_to_name.get(param) == full_name:
        del store._param_to_name[param]


@contextmanager
def empty_store() -> Iterator[None]:
    """Within it the param store is empty; afterwards it has the dictionaries again that it had.

    Pyro's ``scope`` makes new ones of the same entries, which is what a store that was restored looks like.
    """
    store = pyro.get_param_store()
    names = ("_params", "_param_to_name", "_constraints")
    before = {name: getattr(store, name) for name in names}
    store.clear()
    try:
        yield
    finally:
        for name, held in before.items():
            setattr(store, name, held)


@contextmanager
def subsampling_replaced(name: str, rows: Tensor | None) -> Iterator[None]:
    """Within it a plate consists of ``rows`` alone, or of those that its ``subsample=`` says, if it has one.

    A handler cannot do this: a plate holds what handlers answer against the size that it was written with.
    """
    own, own_select = SubsampleMessenger._subsample, SubsampleMessenger._postprocess_message
    sizes: list[Any] = []

    def replaced(
        plate: str, size: Any = None, subsample_size: Any = None, subsample: Any = None, *rest: Any
    ) -> Any:
        shown = subsample if rows is None else rows
        if plate != name or shown is None:
            return own(plate, size, subsample_size, subsample, *rest)
        sizes[:] = [size]
        return len(shown), len(shown), shown

    def select(plate: SubsampleMessenger, msg: Any) -> None:
        # What `pyro.subsample` and parameters with an `event_dim` hold is of all rows.
        shown = plate.size
        if plate.name == name and sizes:
            plate.size = sizes[0]
        try:
            own_select(plate, msg)
        finally:
            plate.size = shown

    messenger: Any = SubsampleMessenger
    messenger._subsample, messenger._postprocess_message = staticmethod(replaced), select
    try:
        yield
    finally:
        messenger._subsample, messenger._postprocess_message = staticmethod(own), own_select
