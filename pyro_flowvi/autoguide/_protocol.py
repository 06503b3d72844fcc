"""What fit and the diagnostics ask of a guide, so that they need not know its class."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from .._program.log_density import UnconstrainedModel
from .._ranks import ALONE, Ranks
from .._types import Program
from ..init import Effort

__all__ = ["FitGuide", "FitOptions", "Frame", "Taken", "as_fit_guide"]

Frame = tuple[Any, ...]
"""Location and scale of the fixed map behind a guide's affine one, or of those of its components, and
whatever else a guide keeps fixed while it is trained."""


@dataclass(frozen=True)
class FitOptions:
    """How a guide is fitted where the user does not say.

    :param lr: the learning rate to start from.
    :param num_particles: draws a step, in one run of the model.
    :param num_components: flows that have so many draws each.
    :param num_steps: steps of a fit to all data; None for as many as any.
    :param tolerance: nats below the evidence at which a fit may end; None for that of its own.
    :param settings: what no parameter's shape tells of the guide, and a run goes on only with the same.
    """

    lr: float = 1e-2
    num_particles: int = 16
    num_components: int = 1
    num_steps: int | None = None
    tolerance: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Taken(NamedTuple):
    """What a guide has taken over from one that was fitted before.

    :param near: whether it is so near the posterior now that no other start is searched for.
    :param whole: whether its flow is the earlier one, so that a short run is enough then.
    """

    near: bool = False
    whole: bool = False


@runtime_checkable
class FitGuide(Protocol):
    """A guide that answers for itself; :func:`as_fit_guide` answers for any other."""

    @property
    def amortised(self) -> bool:
        """Whether latents are drawn by what a network reads in the data of a step."""

    @property
    def rows_by_batch(self) -> bool:
        """Whether there are messages of rows that each batch names."""

    def set_up(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], all_data: bool = True) -> None:
        """Makes the parameters exist; ``all_data`` tells whether the arguments hold all data, or a part."""

    def density(self, *args: Any, **kwargs: Any) -> UnconstrainedModel:
        """The guide's own model over the packed unconstrained latents."""

    def density_of(
        self, model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> UnconstrainedModel:
        """The model that is to be fitted likewise; the guide's own where that one has other latents."""

    def fit_options(self) -> FitOptions:
        """The defaults of a fit."""

    def choose(self, density: UnconstrainedModel, num_steps: int, ranks: Ranks = ALONE) -> None:
        """Chooses what of the model's structure the guide uses, alike on all ranks, before so many steps."""

    def take_over(self, previous: Any, density: UnconstrainedModel | None, all_data: bool) -> Taken:
        """Moves to where a guide is that was fitted before, to other data or another version of the model.

        :param previous: that guide; it may be this one.
        :param density: the model.
        :param all_data: whether that has all data, or a part.
        :raises ValueError: naming ``init``, if nothing can be taken over.
        """

    def remember(self, weights: Tensor) -> None:
        """Keeps how far from the posterior a fit has ended, for those that start from this guide.

        :param weights: log weights of draws, in the end.
        """

    def masses(self, density: UnconstrainedModel | None) -> Any:
        """The masses of the modes that a mixture has, once it is trained; None of any other guide.

        :param density: the model with all its data; None if what is known of it is a part.
        """

    def can_move(self) -> bool:
        """Whether the guide can be moved to a Gaussian before it is trained."""

    def move_to_start(self, density: UnconstrainedModel, effort: Effort) -> tuple[str, Callable[[], None]]:
        """Searches for Gaussians to start from, and moves there, and into their frame.

        :param density: the model.
        :param effort: how much to spend on the search.
        :return: the kind of Gaussian; a function that moves back, and into the frame of the old place.
        """

    def frame(self) -> Frame | None:
        """The frame that the guide is in; None without one."""

    def set_frame(self, frame: Frame | None) -> None:
        """Puts the guide into a frame as it is, for parameters that are given their values afterwards."""

    def leave_frame(self) -> None:
        """Out of the frame, with the posterior as it is."""

    def watched(self) -> Tensor | None:
        """The latents whose moments have to settle before a fit ends; None for all."""

    def has_long_tails(self) -> bool:
        """Whether draws see little of what is still to be learned."""

    def draw_latent(self, size: int) -> tuple[Tensor, Tensor] | None:
        """Packed unconstrained latents, ``(size, D)``, and their log densities; None if it has none."""

    def pushforward(self, model: Program) -> Any:
        """The map from standard normal noise to the latents of ``model``; None if it is no such guide."""

    def trained_map(self, model: Program) -> Any:
        """What steps outside Pyro train: that map, or several and their weights; None if Pyro takes them."""

    def gather_rows(self) -> Any:
        """Brings what other ranks have of the rows of a subsampled plate here."""

    def whole(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Model, guide and arguments of all rows of a subsampled plate; None without latents there."""

    def whole_map(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Density of all rows' latents and the map from noise to them, where :meth:`whole` gives a pair."""

    def sweep(self, epoch: Callable[[int], Sequence[Any]], ranks: Ranks = ALONE) -> Any:
        """Passes over the rows of a subsampled plate; None without latents there.

        :param epoch: from how many batches there are at most to the model's arguments in one pass.
        :param ranks: the processes that have rows of their own.
        """


class _PyroGuide:
    """The answers for a guide that knows of none of this: Pyro's own, a list of guides, a function."""

    amortised = rows_by_batch = False

    def __init__(self, model: Program) -> None:
        self.model = model

    def set_up(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], all_data: bool = True) -> None:
        pass

    def density(self, *args: Any, **kwargs: Any) -> UnconstrainedModel:
        return UnconstrainedModel(self.model, args, kwargs)

    def density_of(
        self, model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> UnconstrainedModel:
        return self.density(*args, **kwargs)

    def fit_options(self) -> FitOptions:
        return FitOptions()

    def choose(self, density: UnconstrainedModel, num_steps: int, ranks: Ranks = ALONE) -> None:
        pass

    def take_over(self, previous: Any, density: UnconstrainedModel | None, all_data: bool) -> Taken:
        raise ValueError("init: expected None for a guide that is no flow, got a guide")

    def remember(self, weights: Tensor) -> None:
        pass

    def masses(self, density: UnconstrainedModel | None) -> Any:
        return None

    def can_move(self) -> bool:
        return False

    def move_to_start(self, density: UnconstrainedModel, effort: Effort) -> tuple[str, Callable[[], None]]:
        raise NotImplementedError("the guide cannot be moved")

    def frame(self) -> Frame | None:
        return None

    def set_frame(self, frame: Frame | None) -> None:
        pass

    def leave_frame(self) -> None:
        pass

    def watched(self) -> Tensor | None:
        return None

    def has_long_tails(self) -> bool:
        return False

    def draw_latent(self, size: int) -> tuple[Tensor, Tensor] | None:
        return None

    def pushforward(self, model: Program) -> Any:
        return None

    def trained_map(self, model: Program) -> Any:
        return None

    def gather_rows(self) -> Any:
        return None

    def whole(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return None

    def whole_map(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return None

    def sweep(self, epoch: Callable[[int], Sequence[Any]], ranks: Ranks = ALONE) -> Any:
        return None


def as_fit_guide(model: Program, guide: Program) -> FitGuide:
    """The guide itself if it answers, else one that answers for it."""
    return guide if isinstance(guide, FitGuide) else _PyroGuide(model)
