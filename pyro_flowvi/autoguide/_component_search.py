"""The number of components of a mixture guide: given, or found by a search for modes."""

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from .._compile.log_density import traced
from .._program.log_density import UnconstrainedModel
from .._program.param_store import forget, restored
from .._ranks import ALONE, Ranks
from ..init import PRIOR_DRAWS, Effort, Modes, find_all_modes
from ._protocol import Taken
from .flow import AutoFlow

__all__ = ["AUTO", "ComponentSearch"]

AUTO = "auto"


class ComponentSearch(AutoFlow):
    """A guide with a number of components, which a search may find.

    The search is part of set-up, where the guide is set up by a call or :meth:`materialize`; ``fit`` makes it
    anew.  A state that is loaded brings its own number.
    """

    def _look_for(self, num_components: Any) -> None:
        """Keeps the number of components, or that a search is to find it."""
        self.num_components: Any = num_components
        """The number K of components; "auto" before set-up, where that is left to the search."""
        self._auto = num_components == AUTO
        self._modes: Modes | None = None
        """Where the components start, once it has been looked for."""
        self._postpones = False
        """Whether a search follows set-up."""

    def place(self, loc: Tensor, scale: Tensor, weights: Tensor) -> None:
        """Moves the components to Gaussians."""
        raise NotImplementedError

    def set_up(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], all_data: bool = True) -> None:
        """As of any guide; the search for modes is left to :meth:`choose`."""
        self._postpones = True
        try:
            super().set_up(args, kwargs, all_data)
        finally:
            self._postpones = False

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self._call = args, kwargs
        before = self.num_components
        try:
            super()._setup_prototype(*args, **kwargs)
        except BaseException:
            self.num_components = before
            raise
        finally:
            del self._call

    def _build_flow(self) -> None:
        if self.num_components == AUTO:
            self.num_components = self._first_number()
        super()._build_flow()
        self._place_found()

    def _first_number(self) -> int:
        """The number of components of a state that was loaded or a restored param store, or of a search."""
        if "logits" in self._pending_state:
            return len(self._pending_state["logits"])
        if names := restored(self.name, self._named):
            return len(pyro.get_param_store()[names[0]])  # all are stacked
        if self._postpones:
            return 1
        args, kwargs = self._call
        with torch.random.fork_rng():
            density = self._density_of(self._require_model(), args, kwargs)
        self._modes = self._find_all(density)
        return len(self._modes.weights)

    def _resize(self, num: int) -> None:
        """Makes new parameters for another number of components."""
        if num != self.num_components:
            forget(self, self.name)
            self.num_components = num
            super()._build_flow()

    @staticmethod
    def _find_all(density: UnconstrainedModel) -> Modes:
        """All modes of the posterior, as far as a search finds them."""
        effort = Effort.within(density.largest, density.dim)
        value_and_grad = traced(density, 2 * effort.starts)
        if not value_and_grad.batched:
            effort = Effort.small()
        return find_all_modes(value_and_grad, density.start, effort, density.prior_draws(PRIOR_DRAWS))

    def _adopt(self, found: Modes) -> None:
        """Has a component for each mode, which is to be placed there."""
        self._resize(len(found.weights))
        self._modes = found

    def _place_found(self) -> None:
        """Starts the components at what a search has found."""
        found, self._modes = self._modes, None
        if found is not None:
            self.place(found.gaussian.loc, found.gaussian.scale, found.weights)

    def choose(self, density: UnconstrainedModel, num_steps: int, ranks: Ranks = ALONE) -> None:
        """Searches for the number of components where this is "auto"; all ranks take that of rank 0."""
        super().choose(density, num_steps, ranks)
        if self._auto and self.can_move():
            self._adopt(ranks.same(self._find_all(density)))

    def take_over(self, previous: Any, density: UnconstrainedModel | None, all_data: bool) -> Taken:
        """As of any guide; with "auto" with the other's number of components."""
        if self._auto and isinstance(previous, ComponentSearch) and previous.prototype_trace is not None:
            self._resize(previous.num_components)
        return super().take_over(previous, density, all_data)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        saved = state_dict.get(f"{prefix}flow.logits")
        if self._auto and saved is not None and self.prototype_trace is not None:
            self._resize(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
