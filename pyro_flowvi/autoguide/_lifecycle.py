"""The parameters of a guide: their names in the param store, and their life in copies and pickles."""

import copy
import pickle
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.poutine.runtime import effectful
from torch import Tensor
from torch.distributions import constraints

from .._checks import check_dtype
from .._program.param_store import adopt_stored, claim_name, holds_name, register
from .._program.pyro_private import is_module_local_param_enabled
from ..transforms import Compose
from ..transforms.stacked import drop_caches

__all__ = ["PROTOTYPE_STATE", "NamedGuide"]

PROTOTYPE_STATE = (
    "prototype_trace",
    "_prototype_frames",
    "_unconstrained_shapes",
    "_cond_indep_stacks",
    "latent_dim",
    "plates",
    "_packing",
    "_data",
)
"""What the guide keeps of its traces of the model; copies share it."""


class NamedGuide(AutoContinuous):
    """A guide with one transform as its parameters, known to the param store by the guide's own name.

    Knows nothing of the model's latents; :class:`PrototypeGuide` builds on it.

    :param model: a Pyro model.
    :param init_loc_fn: a per-site function of ``pyro.infer.autoguide.initialization``.
    :param name: prefix of the parameters in the param store, taken over from a live guide or model that has
        it; by default the class name, made unique.
    :raises ValueError: if ``name`` is no non-empty string.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> first, second = pyro_flowvi.AutoPlanar(model), pyro_flowvi.AutoPlanar(model)
        >>> first.name == second.name
        False
    """

    def __init__(self, model: Callable[..., Any], init_loc_fn: Callable[..., Any], name: str | None) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._init_fn: Any = init_loc_fn
        self._raw_model: tuple[Callable[..., Any] | None] = (model,)
        self._placement: tuple[torch.device | None, torch.dtype | None] = (None, None)
        self._pending_state: dict[str, Tensor] = {}
        self._store_wins = True
        self._stale = False
        self._named = name is not None
        self._take_name(name, type(self).__name__)

    # -- names ---------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Prefix of the guide's parameters in the param store."""
        return self.__dict__["_store_name"]  # type: ignore[no-any-return]

    def _take_name(self, name: str | None, default: str) -> None:
        self.__dict__["_store_name"] = claim_name(self, name, default)
        if self.master is None:
            self._pyro_name = self.name

    # -- parameters ----------------------------------------------------------------------------

    def _adopt_store(self, flow: Compose) -> None:
        """Takes over the values of a param store that was restored since the last call.

        A guide that lost its name has no more to do with the store, and keeps its values.
        """
        if not holds_name(self, self.name):
            return
        for name, param in flow.named_parameters():
            adopt_stored(f"{self.name}.{name}", param, self._store_wins, leftovers=self._named)
        self._store_wins = True

    def _announce_params(self) -> None:
        """Shows every parameter to Pyro, under its name, so that an optimizer finds it."""
        local = is_module_local_param_enabled()
        for name, param in self._flow.named_parameters():
            full_name = f"{self.name}.{name}"
            if not param.requires_grad:
                continue
            if not local:
                register(full_name, param)
                continue
            param.unconstrained = weakref.ref(param)
            effectful(type="param")(lambda *_, _value=param, **__: _value)(
                full_name, param, constraint=constraints.real, name=full_name
            )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._store_wins = False
        if self.prototype_trace is None:
            start = f"{prefix}flow."
            if state_dict and not any(key.startswith(start) for key in state_dict):
                missing_keys = args[2]
                missing_keys.append(start + "*")
            self._pending_state = {
                key.removeprefix(start): value.detach().clone()
                for key, value in state_dict.items()
                if key.startswith(start)
            }
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in self._pending_state.items():
            destination[f"{prefix}flow.{key}"] = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Two probes tell what ``fn`` fixes: a device always, a dtype only if both come out alike.
        single, double = (fn(torch.zeros((), dtype=t)) for t in (torch.float32, torch.float64))
        dtype = single.dtype if single.dtype == double.dtype else self._placement[1]
        if dtype is not None:
            check_dtype("dtype", dtype)
        self._placement = (single.device, dtype)
        self._stale = self.prototype_trace is not None
        super()._apply(fn, recurse)
        return self

    # -- copies --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        drop_caches(self)
        state = self.__dict__.copy()
        state["master"] = state["_data"] = None
        for param in self.parameters():
            param.__dict__.pop("unconstrained", None)  # Pyro's weak reference; it sets it anew
        try:
            pickle.dumps((self._model, self._raw_model, self._init_fn, self.create_plates))
        except Exception:  # whatever a user's model raises when pickled
            state["_model"] = state["_raw_model"] = (None,)
            state["_init_fn"] = state["create_plates"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._store_wins = False
        self._take_name(None, state["_store_name"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        drop_caches(self)
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        state = self.__dict__.copy()
        state["master"] = None
        for key in ("_model", "_raw_model", *PROTOTYPE_STATE):
            if key in state:
                memo[id(state[key])] = state[key]  # by reference
        new.__setstate__(copy.deepcopy(state, memo))
        return new
