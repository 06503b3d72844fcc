"""A guide that may draw latents by the priors of its model."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._compile.errors import CannotCompile
from .._compile.priors import PriorGraph, record_priors
from .._program.param_store import restored
from .._program.structure import LatentStructure, find_structure, is_subsampled
from .._types import InitFn, Program, StructureKind
from ..transforms.compose import Chain
from ._message_map import MessageMap
from ._message_plan import levels_of
from ._prototype import PrototypeGuide

__all__ = ["GuideStructure", "StructuredGuide"]

MAX_ALL_NOISE = 32
"""Latents up to which the flow sees the noise of all of them, and not of the roots alone."""
MAX_DEPTH = 128
"""Priors in a row, each given the last one, up to which they are run one after another unasked."""
_MARK = re.compile(r"\.(log_weight|joint\.\d+\.slope)$")
"""Parameters that every message map has one of."""
_UNREADABLE = CannotCompile, ValueError, RuntimeError, KeyError


@dataclass(frozen=True)
class GuideStructure:
    """What a guide found of its model's structure, and what it took.

    Example::

        >>> print(GuideStructure(None, False, "structure=None"))
        flat: structure=None
    """

    found: LatentStructure | None
    """None where it was not looked for, or the model could not be read."""
    taken: bool
    """Whether the guide draws by the model's priors."""
    why: str
    """The reason, in words."""

    def __str__(self) -> str:
        lines = [f"{'message map' if self.taken else 'flat'}: {self.why}"]
        return "\n".join([*lines, *([] if self.found is None else [str(self.found)])])


class StructuredGuide(PrototypeGuide):
    """A guide whose noise may go through a :class:`MessageMap` in the end.

    :param structure: "auto", "program" or None.
    """

    _flow_dim: int
    """How many coordinates of the noise the flow sees."""

    def __init__(
        self, model: Program, init_loc_fn: InitFn, name: str | None, structure: StructureKind
    ) -> None:
        super().__init__(model, init_loc_fn, name)
        self._structure_kind = structure
        self._structure = GuideStructure(None, False, "the guide has not seen data yet")
        self._priors: PriorGraph | None = None

    @property
    def structure(self) -> GuideStructure:
        """What was found of the model's structure, and whether the guide uses it; prints as text."""
        return self._structure

    def _read_structure(self, run: Program, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Finds the priors of the latents, once these are known."""
        priors, found = None, None
        why_not = self._why_not_read()
        if why_not is None:
            try:
                priors = self._record(run, args, kwargs)
                shapes = {name: latent.free_shape for name, latent in self._packing.latents.items()}
                found = find_structure(shapes, priors.parents, self._packing.left_out)
                why_not = self._why_not_taken(found)
            except _UNREADABLE as error:
                why_not = f"the model's priors could not be recorded: {error}"
        self._priors = priors if why_not is None else None
        why = "the priors of latents depend on others" if self._structure_kind == "auto" else "asked for"
        self._structure = GuideStructure(found, why_not is None, why_not or why)

    def _why_not_read(self) -> str | None:
        """Why the model's priors are not looked for; None if they are."""
        if self._structure_kind is None:
            return "structure=None"
        if any(is_subsampled(frame) for stack in self._cond_indep_stacks.values() for frame in stack):
            return "latents under a subsampled plate"
        return None

    def _why_not_taken(self, found: LatentStructure) -> str | None:
        """Why the guide does not draw by priors that are known; None if it does."""
        if not found.messages:
            return "no latent has a prior that is known, beside the roots"
        if self._structure_kind == "program":
            return None
        if not found.hierarchical:
            return "no prior depends on a latent"
        if len(levels_of(found)) > MAX_DEPTH:
            return f"a chain of more than {MAX_DEPTH} priors, which takes long; structure='program' does so"
        return None

    def _record(self, run: Program, args: Any, kwargs: Mapping[str, Any]) -> PriorGraph:
        loc = self._init_loc().nan_to_num(0.0, 0.0, 0.0)
        return record_priors(run, args, kwargs, self._packing, loc)

    def _renew_priors(self, run: Program, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Records the priors again, for other data or after a move to another device or dtype."""
        layer = self._map
        if layer is not None:
            with suppress(*_UNREADABLE):
                layer.renew(self._record(run, args, kwargs))

    def _restored_flat(self) -> bool:
        """Whether a state that was loaded, or a restored param store, is one of a guide without a map."""
        keys = list(self._pending_state) or restored(self.name, self._named)
        return bool(keys) and not any(_MARK.search(key) for key in keys)

    # -- the map among the layers --------------------------------------------------------------

    @property
    def _map(self) -> MessageMap | None:
        """The map, if the guide has one."""
        flow = self._modules.get("flow")
        last = flow[-1] if isinstance(flow, Chain) and len(flow) else None
        return last if isinstance(last, MessageMap) else None

    def _make_map(self, scale: float) -> MessageMap | None:
        """A map with messages that alone have a standard deviation of ``scale``."""
        found = self._structure.found
        if not self._structure.taken or found is None or self._priors is None:
            return None
        return MessageMap(self._packing, found, self._priors, scale)

    def _flow_places(self, layer: MessageMap | None) -> Tensor | None:
        """The coordinates of the noise that the flow sees; None for all."""
        if layer is None or self.latent_dim <= MAX_ALL_NOISE:
            return None
        roots = layer.plan.root_places()
        return roots if len(roots) else None

    def _take_flat(self, why: str) -> None:
        """Goes over to a guide without a map."""
        self._structure = GuideStructure(self._structure.found, False, why)


def spread_over(places: Tensor, loc: Tensor, scale: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """A Gaussian of some coordinates, and a standard normal of the others, ``(D,)`` and ``(D, D)``."""
    whole, factor = loc.new_zeros(dim), torch.eye(dim).to(loc)
    whole[places] = loc
    factor[places.unsqueeze(-1), places] = scale
    return whole, factor
