"""A guide's traces of its model: made once, and made again where the data could have changed the latents."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous

from .._program.log_density import UnconstrainedModel
from .._program.sites import is_enumerated
from .._program.start_trace import SafeInit, prototype
from ._lifecycle import PROTOTYPE_STATE, NamedGuide

__all__ = ["PrototypeGuide"]

_MAX_SIGNATURES = 100


class PrototypeGuide(NamedGuide):
    """A guide that knows the latents of its model, and that they are those which it was built for.

    Knows nothing of the posterior, which subclasses build once the latents are known;
    :class:`~pyro_flowvi.autoguide.AutoFlow` is one.

    :param model: a Pyro model.
    :param init_loc_fn: a per-site function of ``pyro.infer.autoguide.initialization``.
    :param name: as of :class:`NamedGuide`.
    """

    def __init__(self, model: Callable[..., Any], init_loc_fn: Callable[..., Any], name: str | None) -> None:
        super().__init__(model, SafeInit(init_loc_fn), name)
        self._signatures: set[Any] = set()
        self._data: tuple[Any, Any] | None = None

    def materialize(self, *args: Any, **kwargs: Any) -> Self:
        """Sets the guide up with the model's arguments, so that its parameters exist; returns it.

        :raises RuntimeError: if the guide lost its model in a copy or a pickle.
        :raises ValueError: as the class says.
        """
        if self.prototype_trace is None:
            with self._pyro_context:
                self._setup_prototype(*args, **kwargs)
        elif self._stale:
            self._require_model()
            self._reset_prototype(args, kwargs)
        self._data = args, kwargs
        return self

    _prototype_hide_fn = staticmethod(lambda msg: _hidden(msg))

    def _require_model(self) -> Callable[..., Any]:
        if self._raw_model[0] is None:
            raise RuntimeError(
                f"{self.name}: the guide lost its model, which could not be pickled; build the guide "
                "from the model again and load its state_dict"
            )
        return self._raw_model[0]

    @contextmanager
    def _apart(self) -> Iterator[Callable[[], None]]:
        """Runs of the model that are no part of the step that happens to be under way.

        No handler sees them, and what a PyroModule caches in a call is neither used nor lost.  Gives the
        function that empties that cache, to be called between runs.
        """
        cache = self._pyro_context.cache
        kept = dict(cache)
        cache.clear()
        try:
            with poutine.block(), torch.no_grad():
                yield cache.clear
        finally:
            cache.clear()
            cache.update(kept)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        model = self._require_model()
        with self._apart() as clear:
            prototype(model, args, kwargs, self._init_fn.init_loc_fn, before_run=clear)
            try:
                clear()
                super()._setup_prototype(*args, **kwargs)
                if self.master is None:
                    self._create_plates(*args, **kwargs)
                self._build_flow()
            except BaseException:
                self.prototype_trace = None
                raise
        self._signatures = {_signature((args, kwargs))}

    def _build_flow(self) -> None:
        """Makes the parameters, for the latents that are known now."""
        raise NotImplementedError(f"{type(self).__name__}._build_flow")

    def _reset_prototype(self, args: Any, kwargs: Any) -> None:
        """Traces the model again; the latents must be those that the flow was built for."""
        before = dict(self._unconstrained_shapes)
        saved = {key: self.__dict__[key] for key in PROTOTYPE_STATE}
        # Sites that were observed at set-up and now are not (a prediction) are the model's to draw.
        self.__dict__["_prototype_hide_fn"] = lambda msg: _hidden(msg) or msg["name"] not in before
        try:
            # What the model draws here is no part of the user's stream of random numbers.
            with torch.random.fork_rng(), self._apart():
                super()._setup_prototype(*args, **kwargs)
        except BaseException:
            self.__dict__.update(saved)
            raise
        finally:
            del self.__dict__["_prototype_hide_fn"]
        after = self._unconstrained_shapes
        if after != before:
            self.__dict__.update(saved)
            for name in {**before, **after}:
                old, new = before.get(name), after.get(name)
                if old != new:
                    raise ValueError(
                        f"site {name!r}: expected unconstrained shape "
                        f"{None if old is None else tuple(old)}, which the guide was set up with, "
                        f"got {None if new is None else tuple(new)}; build a guide for this data"
                    )
        self._stale = False

    def _ready(self, args: Any, kwargs: Any) -> None:
        """Sets the guide up, or checks that the latents are still the same."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
            return
        if torch._C._get_tracing_state():  # of torch.jit: sizes are tensors then
            return
        seen = _signature((args, kwargs))
        known = seen in self._signatures or len(self._signatures) >= _MAX_SIGNATURES
        if (self._stale or not known) and self._raw_model[0] is not None:
            self._reset_prototype(args, kwargs)
        self._signatures.add(seen)

    def density(self, *args: Any, **kwargs: Any) -> UnconstrainedModel:
        """The log density of the guide's model over the latents as the guide packs them.

        :raises RuntimeError: if the guide lost its model in a copy or a pickle.
        """
        return UnconstrainedModel(self._require_model(), args, kwargs, self._init_fn.init_loc_fn)


def _hidden(msg: dict[str, Any]) -> bool:
    """What the prototype leaves out: all but latents, and of those what the model enumerates."""
    return bool(AutoContinuous._prototype_hide_fn(msg)) or is_enumerated(msg)


def _signature(value: Any) -> Any:
    """What of a model's arguments can change the number of its latents; hashable."""
    if isinstance(value, Mapping):
        return tuple((key, _signature(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_signature, value))
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):  # of a distribution it is a method
        return tuple(shape)
    return value if isinstance(value, bool | int | str | None) else type(value)
