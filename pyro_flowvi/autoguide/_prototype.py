"""A guide's trace of its model: what it knows of the latents."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Self

import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from .._program.dtypes import dtype_for_sums
from .._program.left_out import check_left_out, uncounted
from .._program.log_density import UnconstrainedModel
from .._program.packing import Packing
from .._program.pyro_private import PYRO_STACK
from .._program.sites import is_enumerated, latent_sites
from .._program.start_trace import LocalLatents, SafeInit, prototype
from .._shapes import broadcast_shapes
from ._lifecycle import PROTOTYPE_STATE, NamedGuide

__all__ = ["PrototypeGuide"]


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
        self._data: tuple[Any, Any] | None = None
        self._packing: Packing
        self._sums_dtype: torch.dtype | None = None

    def _call_dtype(self) -> torch.dtype | None:
        """The dtype of a call's latents, if not that of the parameters: see :func:`dtype_for_sums`."""
        enumerates = any(isinstance(handler, EnumMessenger) for handler in PYRO_STACK)
        return self._sums_dtype if enumerates else None

    def materialize(self, *args: Any, **kwargs: Any) -> Self:
        """Sets the guide up with the model's arguments, so that its parameters exist; returns it.

        A guide that is set up takes other data of the same latents.

        :raises RuntimeError: if the guide lost its model in a copy or a pickle.
        :raises ValueError: as the class says, or if these data have other latents.
        """
        if self.prototype_trace is None:
            with self._pyro_context:
                self._setup_prototype(*args, **kwargs)
        elif self._stale or self._raw_model[0] is not None:
            self._require_model()
            self._trace_again(args, kwargs)
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

            def run(*args: Any, **kwargs: Any) -> Any:
                clear()
                return model(*args, **kwargs)

            if self._wants_rows and self._serve_rows(run, args, kwargs):
                return
            try:
                trace = prototype(model, args, kwargs, self._init_fn, before_run=clear)
            except LocalLatents:
                if self._serve_rows(run, args, kwargs):
                    return
                raise
            masked = any(uncounted(site) is not None for _, site in latent_sites(trace))
            left_out = self._density_of(run, args, kwargs).packing.left_out if masked else {}
            try:
                self._sums_dtype = dtype_for_sums(run, args, kwargs, trace)
                clear()
                super()._setup_prototype(*args, **kwargs)
                if self.master is None:
                    self._create_plates(*args, **kwargs)
                self._pack(left_out)
                self._read_structure(run, args, kwargs)
                self._build_flow()
            except BaseException:
                self.prototype_trace = None
                raise

    _wants_rows = False
    """Whether the guide is for latents that are seen a page at a time, subsampled or not."""

    def _serve_rows(self, run: Callable[..., Any], args: Any, kwargs: Any) -> bool:
        """Sets the guide up for latents under a subsampled plate, if it is one for such."""
        return False

    def _pack(self, left_out: Mapping[str, Tensor]) -> None:
        """Finds the latents' places, once they are known."""
        trace: Any = self.prototype_trace
        sites = {name: trace.nodes[name] for name in self._unconstrained_shapes}
        self._packing = Packing(sites, left_out)
        self.latent_dim = self._packing.dim

    def _site_values(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Every latent site with its unconstrained value, particles where Pyro's plates have them.

        As Pyro's ``_unpack_latent``, whose comparison of shapes imports sympy.
        """
        sites = [self._site(name) for name in self._unconstrained_shapes]
        shapes = list(self._unconstrained_shapes.values())
        parts = latent.split([shape.numel() for shape in shapes], -1)
        for site, shape, part in zip(sites, shapes, parts, strict=True):
            event_dim = site["fn"].event_dim + len(shape) - site["value"].dim()
            yield site, part.view(broadcast_shapes(shape, (*latent.shape[:-1], *[1] * event_dim)))

    def _unpack_latent(self, latent: Tensor) -> Any:
        return self._site_values(self._packing.complete(latent, torch.randn))

    def _bijection(self, name: str) -> Any:
        return self._packing.latents[name].bijection

    def _init_loc(self) -> Tensor:
        """The starting point of the latents that the flow draws."""
        values = {name: self._site(name)["value"].detach() for name in self._packing.latents}
        return self._packing.unconstrain(values)[0]

    def _site(self, name: str) -> Any:
        trace: Any = self.prototype_trace
        return trace.nodes[name]

    def _read_structure(self, run: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Reads what else the guide wants to know of the model."""

    def _renew_priors(self, run: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Reads again what depends on device and dtype, after the guide was moved."""

    def _build_flow(self) -> None:
        """Makes the parameters, for the latents that are known now."""
        raise NotImplementedError(f"{type(self).__name__}._build_flow")

    def _trace_again(self, args: Any, kwargs: Any) -> None:
        """Traces the model at other data: the latents must be those that the flow was built for.

        What is known of them stays as it is, unless the guide was moved to another device or dtype.
        """
        saved = {key: self.__dict__[key] for key in PROTOTYPE_STATE}
        packing = self._packing
        # Sites that were observed at set-up and now are not (a prediction) are the model's to draw.
        self.__dict__["_prototype_hide_fn"] = lambda msg: _hidden(msg) or msg["name"] not in packing.latents
        try:
            # What the model draws here is no part of the user's stream of random numbers.
            with torch.random.fork_rng(), self._apart():
                super()._setup_prototype(*args, **kwargs)
            self._pack({})
            self._check_same(packing, self._packing)
            self._pack(packing.left_out)
            if packing.left_out:
                self._check_masks(args, kwargs)
            self._renew_priors(self._require_model(), args, kwargs)
            if self._stale:
                saved, self._stale = {}, False
        finally:
            self.__dict__.update(saved)
            del self.__dict__["_prototype_hide_fn"]

    def _check_same(self, before: Packing, after: Packing) -> None:
        """Refuses data with other latents.

        :raises ValueError: naming the site.
        """
        for name in {**before.latents, **after.latents}:
            old, new = (
                tuple(packing.latents[name].free_shape) if name in packing.latents else None
                for packing in (before, after)
            )
            if old != new:
                raise ValueError(
                    f"site {name!r}: expected unconstrained shape {old}, which the guide was set up with, "
                    f"got {new}; build a guide for this data.  To predict new rows, keep the latents that "
                    "they share with the old ones, and let the model draw their own: "
                    "globals = {name: draws[name] for name in (...)} of "
                    "draws = guide.sample_posterior(1000), and "
                    "Predictive(model, posterior_samples=globals)"
                )

    def _ready(self, args: Any, kwargs: Any) -> None:
        """Sets the guide up at its first call; from then on it answers whatever it is called with."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
            return
        if self._raw_model[0] is None or torch._C._get_tracing_state():
            return
        if self._stale:
            with suppress(Exception):  # a call without data: the next one with them will do
                self._trace_again(args, kwargs)
        if self._packing.left_out:
            self._check_masks(args, kwargs)

    def _check_masks(self, args: Any, kwargs: Any) -> None:
        """Reads the model's masks at these data: what was masked out at set-up must be so now."""
        trace: Any = self.prototype_trace
        values = {name: trace.nodes[name]["value"] for name in self._packing.latents}
        try:
            with self._apart():
                at_set_up = poutine.trace(poutine.condition(self._require_model(), data=values))
                sites = at_set_up.get_trace(*args, **kwargs).nodes
        except Exception:  # a call without data
            return
        now = {name: uncounted(sites[name]) for name in self._packing.left_out if name in sites}
        check_left_out({name: self._packing.left_out[name] for name in now}, now)

    def density(self, *args: Any, **kwargs: Any) -> UnconstrainedModel:
        """The log density of the guide's model over the latents as the guide packs them.

        :raises RuntimeError: if the guide lost its model in a copy or a pickle.
        :raises ValueError: if these data have other latents than those that the guide was set up with.
        """
        density = self._density_of(self._require_model(), args, kwargs)
        if self.prototype_trace is not None:
            self._check_same(self._packing, density.packing)
        return density

    def density_of(self, model: Callable[..., Any], args: Any, kwargs: Any) -> UnconstrainedModel:
        """That of a model with the same latents, of which the guide's own may hide a discrete site."""
        if model != self._require_model():
            with suppress(ValueError, NotImplementedError):
                density = self._density_of(model, args, kwargs)
                self._check_same(self._packing, density.packing)
                return density
        return self.density(*args, **kwargs)

    def _density_of(self, model: Callable[..., Any], args: Any, kwargs: Any) -> UnconstrainedModel:
        left_out = None if self.prototype_trace is None else self._packing.left_out
        return UnconstrainedModel(model, args, kwargs, self._init_fn, left_out)


def _hidden(msg: dict[str, Any]) -> bool:
    """What the prototype leaves out: all but latents, and of those what the model enumerates."""
    return bool(AutoContinuous._prototype_hide_fn(msg)) or is_enumerated(msg)
