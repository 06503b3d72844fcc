"""The named flow guides: each is AutoFlow with a flow of the registry."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from pyro.infer.autoguide.initialization import init_to_median
from torch import nn

from .._checks import check_positive_int, check_widths
from .._types import AffineKind, InitFn, Program, StructureKind
from ..flows import FLOWS
from .flow import AutoFlow

__all__ = [
    "AutoIAF",
    "AutoNICE",
    "AutoNeuralSpline",
    "AutoPlanar",
    "AutoRadial",
    "AutoRealNVP",
    "AutoSylvester",
]


def sized_flow(key: str, num_layers: int | None, hidden: Sequence[int] | None = None) -> Callable[[int], Any]:
    """A flow of the registry with its sizes checked now, not when the guide first sees data."""
    layers = None if num_layers is None else check_positive_int("num_layers", num_layers)
    widths = None if hidden is None else check_widths("hidden", hidden)
    return partial(FLOWS[key], num_layers=layers, hidden=widths)


class _Layered(AutoFlow):
    """AutoFlow with ``num_layers`` layers of one flow of the registry."""

    _flow_key: ClassVar[str]

    def __init__(
        self,
        model: Program,
        num_layers: int | None = None,
        *,
        name: str | None = None,
        init_loc_fn: InitFn = init_to_median,
        init_scale: float = 0.1,
        affine: AffineKind | None = "auto",
        tails: bool = False,
        structure: StructureKind = "auto",
        amortize: nn.Module | str | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            model,
            sized_flow(self._flow_key, num_layers),
            name=name,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
            affine=affine,
            tails=tails,
            structure=structure,
            amortize=amortize,
            create_plates=create_plates,
        )


class _Networked(AutoFlow):
    """AutoFlow with ``num_layers`` layers of a flow whose networks have the widths ``hidden``."""

    _flow_key: ClassVar[str]

    def __init__(
        self,
        model: Program,
        num_layers: int | None = None,
        hidden: Sequence[int] | None = None,
        *,
        name: str | None = None,
        init_loc_fn: InitFn = init_to_median,
        init_scale: float = 0.1,
        affine: AffineKind | None = "auto",
        tails: bool = False,
        structure: StructureKind = "auto",
        amortize: nn.Module | str | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            model,
            sized_flow(self._flow_key, num_layers, hidden),
            name=name,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
            affine=affine,
            tails=tails,
            structure=structure,
            amortize=amortize,
            create_plates=create_plates,
        )


class AutoPlanar(_Layered):
    """A planar flow over all continuous latents (Rezende and Mohamed 2015).

    :param model: a Pyro model.
    :param num_layers: the number of planar layers; by default 16.
    :param name: as of :class:`AutoFlow`, as are ``init_loc_fn``, ``init_scale``, ``affine`` and ``tails``.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x**2, 1.0))
        >>> guide = AutoPlanar(model, num_layers=8).materialize()
        >>> sorted(guide.median())
        ['x', 'y']
    """

    _flow_key = "planar"


class AutoRadial(_Layered):
    """A radial flow over all continuous latents (Rezende and Mohamed 2015).

    :param model: a Pyro model.
    :param num_layers: the number of radial layers; by default 16.
    :param name: as of :class:`AutoFlow`, as are the other keywords.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> AutoRadial(model).materialize().sample_posterior(5)["x"].shape
        torch.Size([5])
    """

    _flow_key = "radial"


class AutoSylvester(_Layered):
    """A Sylvester flow over all continuous latents (van den Berg et al. 2018).

    :param model: a Pyro model.
    :param num_layers: the number of layers, each with as many units as latents but at most 8.
    :param name: as of :class:`AutoFlow`, as are the other keywords.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        >>> AutoSylvester(model, num_layers=2).materialize().median()["x"].shape
        torch.Size([3])
    """

    _flow_key = "sylvester"


class AutoNICE(_Networked):
    """Additive couplings and a diagonal scaling over all continuous latents (Dinh et al. 2014).

    :param model: a Pyro model.
    :param num_layers: the number of couplings, of which each moves half of the latents.
    :param hidden: widths of the networks' hidden layers.
    :param name: as of :class:`AutoFlow`, as are the other keywords.  Defaults of the first two are those of
        :data:`pyro_flowvi.flows.DEFAULTS` for the number of latents.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x**2, 0.1))
        >>> AutoNICE(model, num_layers=4, hidden=(16,)).materialize().sample_posterior(5)["y"].shape
        torch.Size([5])
    """

    _flow_key = "nice"


class AutoRealNVP(_Networked):
    """Affine couplings over all continuous latents (Dinh, Sohl-Dickstein and Bengio 2017).

    The guide to try first.  With one latent there is nothing to couple, and what remains is a Gaussian: take
    :class:`AutoNeuralSpline` there.

    :param model: a Pyro model.
    :param num_layers: the number of couplings, of which each moves half of the latents.
    :param hidden: widths of the networks' hidden layers.
    :param name: as of :class:`AutoFlow`, as are the other keywords.  Defaults of the first two are those of
        :data:`pyro_flowvi.flows.DEFAULTS` for the number of latents.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> def model():
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     pyro.sample("x", dist.Normal(0.0, scale))
        >>> guide = AutoRealNVP(model).materialize()
        >>> guide.log_prob(guide.sample_posterior(7)).shape
        torch.Size([7])
    """

    _flow_key = "realnvp"


class AutoNeuralSpline(_Networked):
    """Rational-quadratic spline couplings over all continuous latents (Durkan et al. 2019).

    For several modes, kinks and sharp edges.

    :param model: a Pyro model.
    :param num_layers: the number of couplings, of which each moves half of the latents.
    :param hidden: widths of the networks' hidden layers.
    :param name: as of :class:`AutoFlow`, as are the other keywords.  Defaults of the first two are those of
        :data:`pyro_flowvi.flows.DEFAULTS` for the number of latents.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Gamma(2.0, 1.0))
        >>> guide = AutoNeuralSpline(model, num_layers=2).materialize()
        >>> bool(guide.sample_posterior(100)["x"].min() > 0)
        True
    """

    _flow_key = "neural_spline"


class AutoIAF(_Networked):
    """An inverse autoregressive flow over all continuous latents (Kingma et al. 2016).

    Unlike Pyro's ``AutoIAFNormal`` it starts at the identity, scores any value, and can have any scale.

    :param model: a Pyro model.
    :param num_layers: the number of autoregressive layers; every second one runs backwards.
    :param hidden: widths of the networks' hidden layers.
    :param name: as of :class:`AutoFlow`, as are the other keywords.  Defaults of the first two are those of
        :data:`pyro_flowvi.flows.DEFAULTS` for the number of latents.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, x.exp()))
        >>> guide = AutoIAF(model, num_layers=2).materialize()
        >>> guide.get_posterior().log_prob(torch.zeros(4, 2)).shape
        torch.Size([4])
    """

    _flow_key = "iaf"
