"""The named flows: of each its layers and, measured, its sizes and learning rate by dimension.

The measurements are of ``fit`` at 3,000 steps on targets whose normaliser is known (divergence in nats; the
scripts are ``benchmarks/fits/dimensions.py`` and ``benchmarks/fits/energies.py``; without the present search
for a start):

- *Learning rate.*  RealNVP at 1e-3 / 3e-3 / 1e-2: funnel in 2 dimensions .027 / .011 / .067, five curved
  valleys in 10 dimensions 2.1 / .95 / 4.3.  In 1,000 dimensions 1e-2 diverges from the start, and 3e-3 is
  worse than 1e-3.
- *Particles.*  RealNVP, the five valleys: 16 / 64 / 256 give .95 / .39 / .10, at a cost a step that grows
  less than in proportion.
- *Layers.*  The same with 4 / 8 / 16 couplings and 64 particles: .53 / .39 / .23.  On eight real posteriors
  of 4 to 13 dimensions (``benchmarks/fits/posteriordb.py``) 8 couplings are as good as 12, for two thirds of
  the cost.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from torch import nn
from torch.distributions import Transform

from ._checks import check_positive_int, check_widths
from .transforms.autoregressive import AffineAutoregressive, SplineAutoregressive
from .transforms.base import ParametricTransform
from .transforms.compose import Compose, ConditionalCompose, Inverse
from .transforms.conditional import Conditional
from .transforms.coupling import AdditiveCoupling, AffineCoupling, SplineCoupling
from .transforms.indexed import HIDDEN, INDEX_SCALE, IndexedLayer
from .transforms.linear import ElementwiseAffine
from .transforms.planar import Planar
from .transforms.radial import Radial
from .transforms.sylvester import Sylvester

__all__ = [
    "DEFAULTS",
    "FLOWS",
    "Defaults",
    "FlowDefaults",
    "NamedFlow",
    "defaults_for",
    "indexed_layers",
    "recipe_name",
]

Layers = Callable[[int, int, Sequence[int]], list[ParametricTransform]]
NUM_INDEXED: Final = 5
MASKS: Final = ("first", "second", "even", "odd")
"""The masks of successive coupling layers: halves, then every second one, so that all places mix."""


@dataclass(frozen=True)
class FlowDefaults:
    """What is chosen for one flow.

    :param num_layers: layers, for couplings half-layers.
    :param num_particles: draws a step.
    :param lr: Adam's learning rate to start from.

    Example::

        >>> defaults_for(10).flows["planar"]
        FlowDefaults(num_layers=16, num_particles=16, lr=0.01)
    """

    num_layers: int
    num_particles: int
    lr: float


@dataclass(frozen=True)
class Defaults:
    """What is chosen for targets of up to ``max_dim`` dimensions.

    :param max_dim: the largest dimension D of the row.
    :param hidden: widths of every network.

    Example::

        >>> defaults_for(10).hidden
        (32, 32)
    """

    max_dim: float
    hidden: tuple[int, ...]

    @property
    def flows(self) -> dict[str, FlowDefaults]:
        """What is chosen for each flow, by its key in the registry."""
        row = _row(self.max_dim)
        return {name: flow.by_row[row] for name, flow in FLOWS.items()}


DEFAULTS: Final = (Defaults(32, (32, 32)), Defaults(200, (64, 64)), Defaults(math.inf, (100, 100)))
"""Rows by increasing dimension."""


def _row(dim: float) -> int:
    return next(i for i, row in enumerate(DEFAULTS) if dim <= row.max_dim)


def defaults_for(dim: int) -> Defaults:
    """The row of :data:`DEFAULTS` for targets of ``dim`` dimensions.

    Example::

        >>> defaults_for(2).flows["realnvp"].num_layers
        8
    """
    return DEFAULTS[_row(dim)]


@dataclass(frozen=True)
class NamedFlow:
    """A named flow: how its layers follow from dimension, number of layers and widths of networks.

    :param name: the key in :data:`pyro_flowvi.FLOWS`.
    :param layers: ``(dim, num_layers, hidden)`` -> the layers, first one first.
    :param by_row: what is chosen for it in each row of :data:`DEFAULTS`.

    Example::

        >>> flow = FLOWS["planar"](3, num_layers=4)
        >>> flow
        Planar(dim=3, num_layers=4)
        >>> FLOWS["realnvp"](3, context_dim=2).condition(torch.zeros(5, 2)).batch_shape
        torch.Size([5])
    """

    name: str
    layers: Layers
    by_row: tuple[FlowDefaults, ...]

    def __call__(
        self,
        dim: int,
        *,
        num_layers: int | None = None,
        hidden: Sequence[int] | None = None,
        context_dim: int | None = None,
    ) -> nn.Module:
        """Builds the flow.

        :param dim: the length of the vectors.
        :param num_layers: the number of layers; by default that of :data:`~pyro_flowvi.flows.DEFAULTS`.
        :param hidden: widths of every network, likewise; planar, radial and Sylvester flows have one with
            a context only.
        :param context_dim: the length of the context vectors, for a conditional flow.
        :return: a transform, or with a context a module with a ``condition`` method.
        :raises ValueError: if an argument is not of the described kind.
        """
        num, widths = self._sizes(dim, num_layers, hidden)
        layers = self.layers(dim, num, widths)
        if context_dim is not None:
            conditional = [Conditional(layer, context_dim, widths) for layer in layers]
            return conditional[0] if len(conditional) == 1 else ConditionalCompose(conditional)
        return layers[0] if len(layers) == 1 else Compose(layers)

    def _sizes(
        self, dim: int, num_layers: int | None, hidden: Sequence[int] | None
    ) -> tuple[int, Sequence[int]]:
        row = _row(check_positive_int("dim", dim))
        num = self.by_row[row].num_layers if num_layers is None else num_layers
        widths = DEFAULTS[row].hidden if hidden is None else check_widths("hidden", hidden)
        return check_positive_int("num_layers", num), widths

    def single_layers(
        self, dim: int, *, num_layers: int | None = None, hidden: Sequence[int] | None = None
    ) -> list[ParametricTransform]:
        """The layers one by one, ``num_layers`` of them, without what follows the last."""
        num, widths = self._sizes(dim, num_layers, hidden)
        layers = self.layers(dim, num, widths)
        if len(layers) < num:  # several are stacked in one
            layers = [self.layers(dim, 1, widths)[0] for _ in range(num)]
        return layers[:num]


_registry: dict[str, NamedFlow] = {}
FLOWS: Final = MappingProxyType(_registry)
"""The named flows: ``FLOWS[name](dim, *, num_layers, hidden, context_dim)`` builds one."""


def _named(name: str, *defaults: FlowDefaults) -> Callable[[Layers], Layers]:
    """Enters the layers that it decorates in the registry, with ``defaults`` for each row or for all."""
    by_row = defaults * len(DEFAULTS) if len(defaults) == 1 else defaults
    if len(by_row) != len(DEFAULTS) or name in _registry:
        raise ValueError(
            f"{name}: expected a new name with 1 or {len(DEFAULTS)} defaults, got {len(defaults)}"
        )

    def enter(layers: Layers) -> Layers:
        _registry[name] = NamedFlow(name, layers, by_row)
        return layers

    return enter


def recipe_name(build: object) -> str | None:
    """The key of the named flow that a builder builds, also through ``functools.partial``; None for others.

    Example::

        >>> import functools
        >>> recipe_name(functools.partial(FLOWS["nice"], num_layers=2))
        'nice'
    """
    while isinstance(build, functools.partial):
        build = build.func
    return build.name if isinstance(build, NamedFlow) else None


def check_layer_flow(flow: Any, hidden: Sequence[int] | None) -> None:
    """ValueError unless ``flow`` is a key of the registry, or a callable and ``hidden`` None."""
    if isinstance(flow, str):
        if flow not in FLOWS:
            raise ValueError(f"flow: expected one of {sorted(FLOWS)}, got {flow!r}")
    elif not callable(flow) or isinstance(flow, Transform):
        raise ValueError(f"flow: expected a key of FLOWS or a callable dim -> Transform, got {flow!r}")
    elif hidden is not None:
        raise ValueError(f"hidden: expected None with a callable flow, got {hidden!r}")


def indexed_layers(
    flow: str | Callable[[int], nn.Module],
    dim: int,
    *,
    num_layers: int | None = None,
    hidden: Sequence[int] | None = None,
    index_dim: int = 1,
    index_hidden: Sequence[int] = HIDDEN,
    order: str = "after",
    context_dim: int | None = None,
    index_scale: float = INDEX_SCALE,
) -> list[IndexedLayer]:
    """The layers of a named flow, each made continuously indexed.

    :param flow: a key of :data:`pyro_flowvi.FLOWS`, or a callable from ``dim`` to one layer's transform.
    :param dim: the length of the vectors.
    :param num_layers: the number of layers; by default that of the flow, or 5 with a callable.
    :param hidden: widths of the networks of a named flow.
    :param index_dim: the length of each layer's index.
    :param index_hidden: widths of the networks of the index, as in :class:`IndexedLayer`; so are ``order``,
        ``context_dim`` and ``index_scale``.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> layers = indexed_layers("realnvp", 3, num_layers=2, index_dim=2)
        >>> len(layers), layers[0].index_dim
        (2, 2)
    """
    check_layer_flow(flow, hidden)
    check_widths("index_hidden", index_hidden)
    if isinstance(flow, str):
        transforms: list[Any] = FLOWS[flow].single_layers(dim, num_layers=num_layers, hidden=hidden)
    else:
        count = NUM_INDEXED if num_layers is None else check_positive_int("num_layers", num_layers)
        transforms = [flow(dim) for _ in range(count)]
    options: dict[str, Any] = {"order": order, "context_dim": context_dim, "index_scale": index_scale}
    return [IndexedLayer(transform, index_dim, index_hidden, dim=dim, **options) for transform in transforms]


@_named("planar", FlowDefaults(16, 16, 1e-2))
def _planar(dim: int, num_layers: int, hidden: Sequence[int]) -> list[ParametricTransform]:
    return [Planar(dim, num_layers)]


@_named("radial", FlowDefaults(16, 16, 1e-2))
def _radial(dim: int, num_layers: int, hidden: Sequence[int]) -> list[ParametricTransform]:
    return [Radial(dim, num_layers)]


@_named("planar_radial", FlowDefaults(16, 16, 1e-2))
def _planar_radial(dim: int, num_layers: int, hidden: Sequence[int]) -> list[ParametricTransform]:
    return [(Planar, Radial)[i % 2](dim) for i in range(num_layers)]


def _mask(i: int) -> str:
    return MASKS[i % len(MASKS)]


@_named("nice", FlowDefaults(8, 64, 3e-3), FlowDefaults(12, 64, 3e-3), FlowDefaults(8, 32, 1e-3))
def _nice(dim: int, num_layers: int, hidden: Sequence[int]) -> list[ParametricTransform]:
    layers = [AdditiveCoupling(dim, mask=_mask(i), hidden=hidden) for i in range(num_layers)]
    return [*layers, ElementwiseAffine(dim)]


@_named("realnvp", FlowDefaults(8, 64, 3e-3), FlowDefaults(12, 64, 3e-3), FlowDefaults(8, 32, 1e-3))
def _realnvp(dim: int, num_layers: int, hidden: Sequence[int]) -> list[ParametricTransform]:
    return [AffineCoupling(dim, mask=_mask(i), hidden=hidden) for i in range(num_layers)]


@_named("neural_spline", FlowDefaults(4, 64, 3e-3), FlowDefaults(4, 64, 3e-3), FlowDefaults(4, 32, 1e-3))
def _neural_spline(dim: int, num_layers: int, hidden: Sequence[int]) -> list[ParametricTransform]:
    # One affine map outside the boxes: one for each layer outran the networks, and training shook.
    layers = [SplineCoupling(dim, mask=_mask(i), hidden=hidden) for i in range(num_layers)]
    return [*layers, ElementwiseAffine(dim)]


@_named("neural_spline_ar", FlowDefaults(4, 64, 3e-3), FlowDefaults(4, 64, 3e-3), FlowDefaults(4, 32, 1e-3))
def _neural_spline_ar(dim: int, num_layers: int, hidden: Sequence[int]) -> list[ParametricTransform]:
    layers = [SplineAutoregressive(dim, hidden=hidden, reverse=i % 2 == 1) for i in range(num_layers)]
    return [*layers, ElementwiseAffine(dim)]


@_named("iaf", FlowDefaults(4, 64, 3e-3), FlowDefaults(4, 64, 3e-3), FlowDefaults(4, 32, 1e-3))
def _iaf(dim: int, num_layers: int, hidden: Sequence[int]) -> list[ParametricTransform]:
    return [AffineAutoregressive(dim, hidden=hidden, reverse=i % 2 == 1) for i in range(num_layers)]


@_named("maf", FlowDefaults(4, 64, 3e-3), FlowDefaults(4, 64, 3e-3), FlowDefaults(4, 32, 1e-3))
def _maf(dim: int, num_layers: int, hidden: Sequence[int]) -> list[ParametricTransform]:
    return [Inverse(layer) for layer in _iaf(dim, num_layers, hidden)]


@_named("sylvester", FlowDefaults(8, 16, 1e-2))
def _sylvester(dim: int, num_layers: int, hidden: Sequence[int]) -> list[ParametricTransform]:
    return [Sylvester(dim) for _ in range(num_layers)]
