"""Densities of single scalars: posterior, prior and reference."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger

from .._checks import check_positive_int
from .._program.call import as_keywords
from .._program.log_weights import LogWeights
from .._program.sites import is_enumerated
from ._densities import Limits, Scale, bandwidth, density, is_discrete, limits, support, within
from ._draws import Draws
from ._panels import COLOURS, ink, panels, show_scale

__all__ = ["plot_marginals"]

Array = NDArray[Any]
MAX_MARGINALS: Final = 12
"""Scalars that are shown, unless they are named."""
COLUMNS: Final = 4
MORE_OF_PRIORS: Final = 10
"""How many times more draws of the prior, whose curve should be as smooth as it is known."""
PRIOR_NUMBERS: Final = 20_000_000
"""Numbers of all sites up to which there are more."""
BEYOND: Final = 0.5
"""By how many widths of the posterior's box the prior's may widen it on either side."""


def plot_marginals(
    draws: Any,
    *args: Any,
    prior: Any = None,
    reference: Any = None,
    names: Sequence[str] | None = None,
    labels: tuple[str, str, str] = ("posterior", "prior", "reference"),
    num_samples: int = 2000,
    ax: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> NDArray[Any]:
    """The density of each scalar under the posterior, and if wanted under the prior and a reference.

    What the data have taught: a posterior that lies on its prior has learnt nothing of that scalar.  Positive
    scalars with a heavy tail have a log axis, and the density is that of the log.  By default the first
    twelve scalars are shown, and the picture says of how many.

    :param draws: a fitted guide, or draws, of the kinds that :func:`plot_pairs` takes.
    :param args: the model's positional arguments, to draw from the prior; by default those that the guide was
        fitted with.
    :param prior: a Pyro model, whose latents are drawn from their priors; True for the model of the guide;
        or draws of the prior; None for none.
    :param reference: other draws of the same scalars, such as NUTS ones, of the same kinds as ``draws``.
    :param names: the scalars or sites to show, such as ``["tau", "theta"]``; of an array the names of its
        columns.
    :param labels: of posterior, prior and reference.
    :param num_samples: draws of a guide; of the prior ten times as many, if the model draws many at once.
    :param ax: as many matplotlib Axes as scalars, or a Figure or SubFigure to make them in; None for a new
        figure.
    :param kwargs: the model's keyword arguments.
    :param model_kwargs: those whose names are options of this function.
    :return: an array of the Axes, in the order of the scalars.
    :raises ValueError: if a name is unknown, a prior is improper or not to be had, the draws are of no such
        kind, or ``ax`` is not as described.
    :raises ImportError: without matplotlib.

    Example::

        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, tau), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 4.0])
        >>> guide = pyro_flowvi.AutoPlanar(model, num_layers=1).materialize(y)
        >>> axes = plot_marginals(guide, y, prior=True)
        >>> [axis.get_xlabel() for axis in axes], axes[0].get_legend_handles_labels()[1]
        (['mu', 'tau'], ['posterior', 'prior'])
    """
    found = Draws(draws, "draws", names, num_samples)
    other = None if reference is None else Draws(reference, "reference", names, num_samples)
    shown = found.first(MAX_MARGINALS) if names is None else found.named(names)
    model = _model_of(draws) if prior is True else prior
    if _is_program(model):
        before: Draws | None = _prior(draws, model, args, kwargs, model_kwargs, num_samples)
    elif args or kwargs or model_kwargs:
        raise ValueError("args: expected none but with prior=True or a model, whose arguments they are")
    else:
        before = None if prior is None else Draws(prior, "prior", names, num_samples)
    sets = [each and each.take(shown) for each in (found, before, other)]
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    size = (2.6 * columns + 0.6, 2.1 * rows + 0.4)
    note = found.note(shown) if names is None else ""
    with _as_many(ax, len(shown), rows, columns, size) as axes:
        for i, (axis, name) in enumerate(zip(axes, shown, strict=True)):
            _draw(axis, [each and each[name] for each in sets], labels)
            axis.set_xlabel(name)
            if i % columns == 0:
                axis.set_ylabel("density", fontsize=9)
        if len(axes[0].get_legend_handles_labels()[0]) > 1:
            axes[0].legend(fontsize=8)
        axes[min(columns, len(shown)) - 1].set_title(note, fontsize=8, loc="right")
    return axes


@contextmanager
def _as_many(ax: Any, num: int, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Array]:
    """Panels of a grid of which the last row need not be full, as a flat array."""
    own = ax is None or hasattr(ax, "subplots")
    with panels(ax, *((rows, columns) if own else (1, num)), size) as axes:
        for axis in axes.flat[num:]:
            axis.remove()
        yield axes.ravel()[:num]


def _draw(axis: Any, sets: list[Any], labels: tuple[str, str, str]) -> None:
    posterior, prior, reference = sets
    told = [each for each in (posterior, reference) if each is not None]
    scale = Scale(told)
    if prior is not None and scale.log:
        prior = prior[prior > 0]
    every = [*told, *([prior] if prior is not None else [])]
    bounds = (-np.inf, np.inf) if scale.log else support(every)
    box = scale.shown if prior is None else _widened(scale.shown, limits([scale(prior)]))
    box = within(box, bounds)
    looks: list[dict[str, Any]] = [
        {"color": COLOURS[1], "linewidth": 1.4},
        {"color": ink(axis), "linewidth": 1.1, "linestyle": "--"},
        {"color": COLOURS[0], "linewidth": 1.4},
    ]
    for i in range(3):
        if sets[i] is None:
            continue
        values = scale(prior if i == 1 else sets[i])
        values = values[np.isfinite(values)]
        x, y, style = _curve(values, box, bounds)
        axis.plot(scale.inverse(x), y, label=labels[i], **looks[i], **style)
        if i == 0 and not style:
            axis.fill_between(scale.inverse(x), y, color=COLOURS[1], alpha=0.25, linewidth=0)
    show_scale(axis.xaxis, scale, box)
    if not scale.log:  # more would run into those of the next panel
        axis.locator_params(axis="x", nbins=4)
    axis.set_ylim(bottom=0.0)
    axis.set_yticks([])


def _curve(values: Array, box: Limits, bounds: Limits) -> tuple[Array, Array, dict[str, Any]]:
    """Points, heights and style: a density, shares of integers, or a line where all draws are one."""
    if is_discrete(values) and len(np.unique(values)) > 1:
        at, counts = np.unique(values, return_counts=True)
        return at, counts / len(values), {"marker": "o", "markersize": 3}
    if not bandwidth(values):
        return np.repeat(values[:1], 2), np.array([0.0, 1.0]), {"marker": "_"}
    return *density(values, box, bounds), {}


def _widened(box: Limits, wide: Limits) -> Limits:
    reach = BEYOND * (box[1] - box[0])
    return min(box[0], max(wide[0], box[0] - reach)), max(box[1], min(wide[1], box[1] + reach))


# -- the prior ---------------------------------------------------------------------------------------


def _is_program(value: Any) -> bool:
    """Whether it is a model to be run, rather than draws."""
    known = hasattr(value, "get_samples") or hasattr(value, "posterior") or isinstance(value, torch.Tensor)
    return callable(value) and not known


def _model_of(guide: Any) -> Callable[..., Any]:
    if not isinstance(guide, AutoGuide):
        raise ValueError("prior: expected a model, or draws, where no guide tells it; got True")
    if hasattr(guide, "_require_model"):
        own: Callable[..., Any] = guide._require_model()
        return own
    model: Any = guide.model
    # Pyro's guides keep it within a handler that draws where the guide is to start, not from the priors.
    while isinstance(call := getattr(model, "func", None), partial):
        if not isinstance(call.args[0], InitMessenger):
            break
        model = call.args[1]
    return model  # type: ignore[no-any-return]


def _prior(
    guide: Any,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    model_kwargs: Mapping[str, Any] | None,
    num_samples: int,
) -> Draws:
    """Latents from their priors, many at once where the model allows."""
    given = as_keywords(plot_marginals, model, kwargs, model_kwargs)
    if not (args or given) and getattr(guide, "_data", None) is not None:
        args, given = guide._data[0], dict(guide._data[1])

    def latents(*args: Any, **kwargs: Any) -> None:
        with poutine.block(hide_fn=lambda site: site.get("is_observed") or is_enumerated(site)):
            model(*args, **kwargs)

    num = check_positive_int("num_samples", num_samples)
    try:
        particles = LogWeights(model, latents, args, given)
        parts = [particles.draws(num)]
        if particles.vectorized:  # of a loop more draws would take long
            more = min(MORE_OF_PRIORS, PRIOR_NUMBERS // (num * _size(model, args, given)))
            parts += [particles.draws(num) for _ in range(more - 1)]
    except NotImplementedError as error:
        raise ValueError(f"prior: expected a model of proper priors to draw from, got {error}") from error
    return Draws({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, "prior")


@torch.no_grad()
def _size(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Numbers that a run of the model draws or observes."""
    with poutine.block():
        nodes: Any = poutine.trace(model).get_trace(*args, **kwargs).nodes.values()
    values = (node["value"] for node in nodes if node["type"] == "sample")
    return max(1, sum(value.numel() for value in values if isinstance(value, torch.Tensor)))
