"""The named flow guides: each is AutoFlow with a flow of the registry."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from pyro.infer.autoguide.initialization import init_to_median

from .._checks import check_positive_int
from ..transforms import FLOWS
from .base import AutoFlow

__all__ = ["AutoPlanar", "AutoRadial"]


class _Layered(AutoFlow):
    """AutoFlow with ``num_layers`` layers of one flow of the registry."""

    _flow_key: ClassVar[str]

    def __init__(
        self,
        model: Callable[..., Any],
        num_layers: int = 16,
        *,
        name: str | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        affine: str | None = "auto",
    ) -> None:
        layers = check_positive_int("num_layers", num_layers)
        build = partial(FLOWS[self._flow_key], num_layers=layers)
        super().__init__(
            model, build, name=name, init_loc_fn=init_loc_fn, init_scale=init_scale, affine=affine
        )


class AutoPlanar(_Layered):
    """A planar flow over all continuous latents (Rezende and Mohamed 2015).

    :param model: a Pyro model.
    :param num_layers: the number of planar layers.
    :param name: as in :class:`AutoFlow`, and so are ``init_loc_fn``, ``init_scale`` and ``affine``.
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
    :param num_layers: the number of radial layers.
    :param name: as in :class:`AutoFlow`, and so are ``init_loc_fn``, ``init_scale`` and ``affine``.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> AutoRadial(model).materialize().sample_posterior(5)["x"].shape
        torch.Size([5])
    """

    _flow_key = "radial"
