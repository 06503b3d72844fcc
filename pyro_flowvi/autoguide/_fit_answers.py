"""What fit asks of a guide whose posterior is a flow: where it starts, and in which frame it is trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from .._compile.log_density import traced
from .._program.log_density import UnconstrainedModel
from .._program.param_store import check_name, forget
from .._ranks import ALONE, Ranks
from ..flows import defaults_for
from ..init import Effort, find_gaussian
from . import _message_pass  # noqa: F401 - enters its form
from ._affine import enter_frame, frame_of, leave_frame, set_affine
from ._message_start import place_messages
from ._protocol import FitOptions, Frame, Taken
from ._rivals import falls_behind, trained_weights, weights_of
from ._root_tails import RootTails
from ._structured import StructuredGuide, spread_over
from ._take_over import Learned, approach, bring_over, check_previous, gap_of, learned_of, weigh

__all__ = ["FitAnswers"]

MAX_RIVAL = 1000
"""Latents up to which the flat guide is tried beside messages that may be far off."""
DOUBT = 1.0
"""Standard deviation of log weights at the start, nats, from which they may be."""
LONG_TAIL = 0.05
"""c of a root's tail from which it takes many steps to be learned."""
TOLERANCE, TOLERANCE_EACH = 0.01, 5e-4
"""Nats below the evidence at which a fit ends, and for each latent with a message: of thousands each may be
off by a little, which adds up, and leaves the roots where they are."""
NEAR, NEARER = 0.5, 2.0
"""Nats below the evidence up to which a posterior is near, and how many times what a fit has ended with."""
MAP_STEPS = 1500
"""Steps of a fit: it starts near its end."""
MAP_PARTICLES, MAP_ELEMENTS = 16, 8_000
"""Draws a step at least where the flow sees the roots alone, and numbers of all of them together.  What the
flow does not see has messages that are nearly right."""


class Place(NamedTuple):
    """Where a structured guide starts: location and scale of the roots, and fixed numbers of the messages."""

    loc: Tensor
    scale: Tensor
    messages: tuple[dict[str, Tensor], ...]


def _copied(module: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, as they are now."""
    return {name: param.detach().clone() for name, param in module.named_parameters()}


@torch.no_grad()
def _put(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Makes parameters what :func:`_copied` has found."""
    for name, param in module.named_parameters():
        param.copy_(values[name])


class FitAnswers(StructuredGuide):
    """The answers of :class:`FitGuide`, for a guide with a ``_flow`` and an ``affine`` map in it."""

    flow_name: str | None
    covers_modes: ClassVar[bool] = False
    """Whether ``fit`` starts from a normal over all modes that it finds, and not from the best at one."""

    _place: Place | None = None
    """Where roots and messages start, once it has been looked for."""
    _near: bool = False
    """Whether a fit starts near the posterior, where an earlier guide is."""
    _gap: float = 0.0
    """How far from the posterior the last fit has ended, nats."""
    _learned: Learned = {}  # noqa: RUF012 - never changed in place
    """What the last fit has learned of messages."""

    @property
    def _flow(self) -> Any:
        raise NotImplementedError

    @property
    def affine(self) -> Any:
        raise NotImplementedError

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def set_up(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], all_data: bool = True) -> None:
        """:meth:`materialize`; a part of the data is not remembered.

        :raises RuntimeError: if another guide or model has taken over the name.
        """
        check_name(self, self.name)
        self.materialize(*args, **kwargs)
        if not all_data:
            self._data = None

    def fit_options(self) -> FitOptions:
        """Learning rate and number of particles of a flow of the registry, by what latents it sees."""
        layer = self._map
        options = FitOptions(
            num_steps=None if layer is None else MAP_STEPS,
            tolerance=None if layer is None else TOLERANCE + TOLERANCE_EACH * layer.plan.num_messages,
            settings={"flow": repr(self._flow)},
        )
        if self.flow_name is None:
            return options
        places = self._flow_places(layer)
        if places is None:
            choice = defaults_for(self.latent_dim).flows[self.flow_name]
            return replace(options, lr=choice.lr, num_particles=choice.num_particles)
        choice = defaults_for(len(places)).flows[self.flow_name]
        most = max(MAP_PARTICLES, MAP_ELEMENTS // self.latent_dim)
        return replace(options, lr=choice.lr, num_particles=min(choice.num_particles, most))

    def watched(self) -> Tensor | None:
        """The roots of a structured guide: errors of single latents given the roots are small, and many."""
        layer = self._map
        return None if layer is None or self._flow_places(layer) is None else layer.plan.root_places()

    def has_long_tails(self) -> bool:
        """Whether a root has a tail that few draws reach, as the logarithm of a scale near zero."""
        tails = (module.longest() for module in self._flow.modules() if isinstance(module, RootTails))
        return any(longest > LONG_TAIL for longest in tails)

    def can_move(self) -> bool:
        """Whether there is an affine map whose location and scale are trained."""
        affine = self.affine
        return affine is not None and bool(affine.loc.requires_grad and affine.log_scale.requires_grad)

    def take_over(self, previous: Any, density: UnconstrainedModel | None, all_data: bool) -> Taken:
        """Takes flow and affine map of a guide with the same latents, else moments by site and by position.

        :param previous: a guide of this package that was fitted, or this one.
        :param density: the model.
        :param all_data: whether that has all data, or a part.
        :raises ValueError: if that is no such guide, or has none of the model's latents.
        """
        if density is None:
            raise ValueError("init: expected None for a guide without an affine map, got a guide")
        if not isinstance(previous, FitAnswers):
            raise ValueError(f"init: expected a fitted guide of this package, got {previous!r}")
        self._near = False
        check_previous(self, previous)
        layer = self._map
        if layer is not None and previous._map is None and self._structure_kind == previous._structure_kind:
            self._take_flat("as the guide that the fit started from")
        whole, point = bring_over(self, previous, density)
        graph = traced(density, self.fit_options().num_particles)
        if not all_data or density.subsampled or not graph.holds:
            return Taken()
        found = approach(self, point, previous._learned, graph)
        enough = max(NEAR, NEARER * (self.fit_options().tolerance or 0.0), NEARER * previous._gap)
        self._near = found and gap_of(weigh(self, graph)) < enough
        if layer is not None and not self._near:
            layer.leave_frame()
        return Taken(self._near, whole)

    def remember(self, weights: Tensor) -> None:
        """Keeps how far from the posterior a fit has ended, and what it has learned of messages."""
        layer = self._map
        self._gap, self._near = gap_of(weights), False
        self._learned = {} if layer is None else learned_of(layer)

    def masses(self, density: UnconstrainedModel | None) -> Any:
        """Those of modes, of which one flow has one."""
        return None

    def choose(self, density: UnconstrainedModel, num_steps: int, ranks: Ranks = ALONE) -> None:
        """Finds where messages start, and goes over to a guide without them where that is the better one.

        Where the weights of the draws at the start say that messages may be far off, both are trained for a
        tenth of the steps.  Of several ranks all do what rank 0 has found.
        """
        own = self._modules.get("flow"), self._structure, self._flow_dim
        self._choose(density, num_steps)
        flat, self._place = ranks.same((self._map is None, self._place))
        if flat and self._map is not None:
            self._take_flat("rank 0 took the flat guide")
        elif not flat and self._map is None:
            self._modules["flow"], self._structure, self._flow_dim = own

    def _choose(self, density: UnconstrainedModel, num_steps: int) -> None:
        layer, self._place = self._map, None
        if layer is None or not self.can_move():
            return
        kept = _copied(layer)
        graph = traced(density, self.fit_options().num_particles)
        found = place_messages(layer, graph) if graph.holds else None
        if found is not None:
            self._place = Place(*found, layer.frame())
        layer.set_frame(())
        _put(layer, kept)
        if self._structure_kind != "auto":
            return
        if found is None:
            self._take_flat("the latents have no mode given the roots, or none that could be found")
        elif self.latent_dim <= MAX_RIVAL:
            self._hold_against_flat(density, num_steps // 10)

    def _hold_against_flat(self, density: UnconstrainedModel, num_steps: int) -> None:
        """Goes over to the flat guide if messages are doubtful and it is better after a short training."""
        before = _copied(self._flow)
        _, move_back = self.move_to_start(density, Effort.small())
        doubtful = not bool(weights_of(self, density).std() < DOUBT)
        move_back()
        self.leave_frame()
        _put(self._flow, before)
        if not doubtful:
            return
        weights = trained_weights(self, density, Effort.small(), num_steps)
        own, structure, place, dim = self._modules["flow"], self._structure, self._place, self._flow_dim
        self._take_flat("the flat guide had the better ELBO after a tenth of the steps")
        effort = Effort.within(self.latent_dim, self.latent_dim)
        if not falls_behind(weights, trained_weights(self, density, effort, num_steps)):
            self._modules["flow"] = own
            self._structure, self._place, self._flow_dim = structure, place, dim

    def _take_flat(self, why: str) -> None:
        forget(self, self.name)
        super()._take_flat(why)

    def move_to_start(self, density: UnconstrainedModel, effort: Effort) -> tuple[str, Callable[[], None]]:
        """Moves to the best Gaussian that a search finds, and into its frame.

        :param density: the model.
        :param effort: how much to spend on the search.
        :return: the kind of candidate that it came from; a function that moves back.
        """
        layer = self._map
        if self._near:  # the messages are in their frame
            enter_frame(self.affine)
            return "previous", self.leave_frame
        kept = _copied(self._flow)
        kind, loc, scale = self._search(density, effort)
        if not enter_frame(self.affine, loc, scale):
            set_affine(self.affine, loc, scale)
        if layer is not None and self._place is not None:
            layer.enter_frame(self._place.messages)

        def move_back() -> None:
            self.leave_frame()
            _put(self._flow, kept)
            enter_frame(self.affine)
            if layer is not None:
                layer.enter_frame()

        return kind, move_back

    def _search(self, density: UnconstrainedModel, effort: Effort) -> tuple[str, Tensor, Tensor]:
        """The kind of the best Gaussian, its location and scale."""
        layer = self._map
        if layer is not None and self._place is not None:
            loc, scale = self._place.loc, self._place.scale
            if self._flow_places(layer) is None:
                loc, scale = spread_over(layer.plan.root_places(), loc, scale, self.latent_dim)
            return "program", loc, scale
        if density.search is not None:
            found = density.search(effort)
        else:
            value_and_grad = traced(density, effort.starts)
            found = find_gaussian(value_and_grad, density.start, effort, cover=self.covers_modes)
        return found.kinds[0], found.loc[0], found.scale[0]

    def frame(self) -> Frame | None:
        """The fixed map behind the affine one, and fixed numbers of messages; None outside of a fit."""
        frame, layer = frame_of(self.affine), self._map
        return frame if layer is None or frame is None else (*frame, *layer.frame())

    def set_frame(self, frame: Frame | None) -> None:
        """Sets the fixed map, and leaves the parameters as they are."""
        layer = self._map
        if frame is not None or self.frame() is not None:
            self.affine.set_frame(*(frame[:2] if frame is not None else (None, None)))
            if layer is not None:
                layer.set_frame(() if frame is None else frame[2:])

    def leave_frame(self) -> None:
        """Makes one affine map of the trainable and the fixed one."""
        leave_frame(self.affine)
        layer = self._map
        if layer is not None:
            layer.leave_frame()

    @property
    def amortised(self) -> bool:
        """Whether latents are drawn by what a network reads in the data of a step."""
        return False

    @property
    def rows_by_batch(self) -> bool:
        """Whether there are messages of rows that each batch names."""
        return False

    def gather_rows(self) -> Self:
        """Brings the messages of all rows of a subsampled plate to all ranks of a distributed fit, after it.

        Until then each rank has those of its own rows, and draws these alone.  To be called on all ranks.

        :return: the guide.
        :raises RuntimeError: if this process has some of the rows, and the others are gone.

        Example, on one process, where there is nothing to bring::

            >>> guide = pyro_flowvi.AutoPlanar(lambda: pyro.sample("x", dist.Normal(0.0, 1.0))).materialize()
            >>> guide.gather_rows() is guide
            True
        """
        return self

    def whole(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The pair of all rows, which the guide sees already."""
        return None

    def whole_map(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """That of all rows, of which the guide has none."""
        return None

    def sweep(self, epoch: Callable[[int], Sequence[Any]], ranks: Ranks = ALONE) -> Any:
        """Passes over rows, of which the guide has none."""
        return None

    @torch.no_grad()
    def draw_latent(self, size: int) -> tuple[Tensor, Tensor]:
        """Packed unconstrained latents, ``(size, D)``, and their log densities, ``(size,)``."""
        drawn: tuple[Tensor, Tensor] = self.get_posterior().rsample_and_log_prob((size,))
        return drawn

    def place_at(self, loc: Tensor, scale: Tensor) -> None:
        """Moves to a Gaussian, of the roots or of all latents, as far as the flow is the identity.

        :raises ValueError: without an affine map.
        """
        if self.affine is None:
            raise ValueError(
                "init: expected a guide with the same flow and latents, for one without an affine map"
            )
        set_affine(self.affine, loc, scale)
