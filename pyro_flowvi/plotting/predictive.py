"""Posterior predictive checks: data that a fit would expect, beside those that there are."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine

from .._checks import check_positive_int
from .._program.call import as_keywords, check_programs
from .._program.left_out import counted
from .._program.log_weights import LogWeights
from .._program.sites import is_computed, observed_sites
from ..diagnostics._at_draws import stacked, traces_at
from ._densities import Scale, density, limits, within
from ._panels import COLOURS, ink, panels, show_scale

__all__ = ["plot_ppc"]

Array = NDArray[Any]
KINDS: Final = ("density", "histogram", "bars")
MOST_CURVES: Final = 50
MOST_BARS: Final = 30
"""Different integers that have a bar each; more are put together."""
INTERVAL: Final = (0.05, 0.95)
NUM_POINTS: Final = 400
"""Points of the mean curve."""
FEW_DATA: Final = 50
"""Data of which each has a tick below the curves."""


class _Check(NamedTuple):
    """Observed values, shape ``(N,)``, and what was drawn in their places, ``(S, N)``."""

    observed: Array
    drawn: Array
    discrete: bool


def plot_ppc(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    site: str | None = None,
    kind: str | None = None,
    num_samples: int = 200,
    ax: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """The observed data over data drawn anew from the fit: a posterior predictive check.

    Draws of the guide go through the model, which draws the observed site in place of its data.  Where the
    fit and the model are good, the observed data look like one more of these replicates.  What a mask leaves
    out and what is not finite is left out of both, in the same places; the elements of a site are taken
    together.

    Gelman, Meng and Stern, *Posterior predictive assessment of model fitness via realized discrepancies*,
    1996.

    :param model: a Pyro model.
    :param guide: any fitted Pyro guide for it.
    :param args: the model's positional arguments.
    :param site: the observed site; None where the model has one.
    :param kind: "density", a curve of each of up to 50 replicates, the mean of the curves of all of them, and
        that of the data, all smoothed by one rule;
        "histogram", the data's bars with the median and the 90 % interval of the replicates; "bars", the same
        for each integer.  By default bars for counts and categories, else densities.
    :param num_samples: replicates.
    :param ax: the matplotlib Axes to draw on, or a Figure or SubFigure to make one in; None for a new figure.
    :param kwargs: the model's keyword arguments.
    :param model_kwargs: those whose names are options of this function.
    :param seed: sets Pyro's seed first.
    :return: the Axes.
    :raises ValueError: if the site is unknown, or not to be drawn from; if the model subsamples its data; if
        ``kind`` is no such name, or "bars" for values that are no integers; or if ``ax`` is not as described.
    :raises ImportError: without matplotlib.
    :raises TypeError: for a keyword that is neither an option nor an argument of the model.

    Example::

        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Poisson(rate), obs=y)
        >>> y = torch.tensor([2.0, 0.0, 3.0, 1.0])
        >>> guide = pyro_flowvi.AutoPlanar(model, num_layers=1).materialize(y)
        >>> axis = plot_ppc(model, guide, y, seed=0)
        >>> axis.get_xlabel(), axis.get_ylabel(), axis.get_legend_handles_labels()[1]
        ('y', 'share of the data', ['observed', 'predicted, median and 90 %'])
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind: expected one of {list(KINDS)} or None, got {kind!r}")
    num = check_positive_int("num_samples", num_samples)
    check_programs(model, guide)
    given = as_keywords(plot_ppc, model, kwargs, model_kwargs)
    if seed is not None:
        pyro.set_rng_seed(seed)
    name, check = _replicates(LogWeights(model, guide, args, given), site, num)
    integers = check.discrete and bool((check.observed == np.round(check.observed)).all())
    chosen = kind or ("bars" if integers else "density")
    if chosen == "bars" and not integers:
        raise ValueError(
            f"kind: expected one but 'bars' of {name!r}, whose values are no integers, got 'bars'"
        )
    with panels(ax, 1, 1, (5.2, 3.4)) as ((axis,),):
        if chosen == "density":
            _draw_densities(axis, check)
        else:
            _draw_shares(axis, check, chosen == "bars")
        axis.set_xlabel(name)
        axis.legend(fontsize=8)
    return axis


@torch.no_grad()
def _replicates(particles: LogWeights, site: str | None, num: int) -> tuple[str, _Check]:
    if particles.structure.subsampled:
        raise ValueError("model: expected one that is called with all of its data, got a subsampled plate")
    sites = particles.draws(num)
    with poutine.block(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = poutine.condition(particles.model, data={name: value[0] for name, value in sites.items()})
        one: Any = poutine.trace(first).get_trace(*particles.args, **particles.kwargs)
        observed = {
            name: node
            for name, node in observed_sites(one).items()
            if name not in sites and not is_computed(node)
        }
        if (site is None and len(observed) != 1) or (site is not None and site not in observed):
            wanted = "the name of one" if site is None else "one"
            raise ValueError(
                f"site: expected {wanted} of the observed sites {sorted(observed)}, got {site!r}"
            )
        name = next(iter(observed)) if site is None else site
        shapes = {latent: one.nodes[latent]["fn"].event_dim for latent in sites}
        try:
            traces = traces_at(particles, sites, poutine.uncondition(particles.model), shapes)
        except NotImplementedError as error:
            raise ValueError(f"site: expected one that can be drawn from, got {name!r}: {error}") from error
    node = observed[name]
    drawn = stacked(traces, name, "value", node["value"].shape, num).astype(float).reshape(num, -1)
    data = node["value"].detach().cpu().double().numpy().ravel()
    kept = counted(node).cpu().numpy().ravel() & np.isfinite(data)
    if not kept.any():
        raise ValueError(f"site: expected data of {name!r}, got none that are finite and not masked")
    return name, _Check(data[kept], drawn[:, kept], bool(node["fn"].support.is_discrete))


def _draw_densities(axis: Any, check: _Check) -> None:
    pooled = check.drawn[np.isfinite(check.drawn)]
    scale = Scale([check.observed, pooled])
    low, high = limits([scale(pooled)])
    seen = scale(check.observed)
    margin = 0.03 * float(seen.max() - seen.min())
    box = (min(low, float(seen.min()) - margin), max(high, float(seen.max()) + margin))
    box, bounds = within(box, scale.bounds), scale.bounds
    look: dict[str, Any] = {"color": COLOURS[1]}
    points = np.linspace(*box, NUM_POINTS)
    heights = []
    replicates = [replicate for replicate in check.drawn if np.isfinite(replicate).any()]
    for i, replicate in enumerate(replicates):
        x, y = density(scale(replicate), box, bounds)
        heights.append(np.interp(points, x, y))
        if i < MOST_CURVES:
            label = f"{min(MOST_CURVES, len(replicates))} replicates" if not i else None
            axis.plot(scale.inverse(x), y, linewidth=0.6, alpha=0.35, label=label, **look)
    # A curve of the pooled draws, which are many more, would be less smoothed than that of one data set.
    mean = np.mean(heights, axis=0)
    axis.plot(scale.inverse(points), mean, linewidth=2.0, label="mean of all replicates", **look)
    x, y = density(seen, box, bounds)
    axis.plot(scale.inverse(x), y, linewidth=2.0, color=COLOURS[0], label="observed")
    if len(seen) <= FEW_DATA:
        marks: dict[str, Any] = {"color": COLOURS[0], "markersize": 8, "markeredgewidth": 1.2}
        axis.plot(check.observed, np.zeros(len(seen)), "|", clip_on=False, **marks)
    show_scale(axis.xaxis, scale, box)
    axis.set_ylim(bottom=0.0)
    axis.set_ylabel("density of the log" if scale.log else "density")


def _draw_shares(axis: Any, check: _Check, bars: bool) -> None:
    pooled = check.drawn[np.isfinite(check.drawn)]
    shown = np.concatenate([check.observed, np.quantile(pooled, (0.002, 0.998))])
    low, high = float(shown.min()), float(shown.max())
    step = 1
    if bars:
        step = max(1, int(np.ceil((high - low + 1) / MOST_BARS)))
        edges = np.arange(np.floor(low), np.ceil(high) + step + 1, step) - 0.5
    else:
        num = int(np.clip(np.sqrt(check.observed.size), 5, 40))
        edges = np.linspace(low, high, num + 1) if high > low else np.array([low - 0.5, low + 0.5])
    middle, width = 0.5 * (edges[1:] + edges[:-1]), edges[1:] - edges[:-1]
    seen = np.histogram(check.observed, edges)[0] / check.observed.size
    shares = np.stack([np.histogram(row, edges)[0] / row.size for row in check.drawn])
    few, median, many = np.quantile(shares, (INTERVAL[0], 0.5, INTERVAL[1]), axis=0)
    axis.bar(
        middle,
        seen,
        width * (0.8 if bars else 1.0),
        color=COLOURS[0],
        alpha=0.55,
        linewidth=0,
        label="observed",
    )
    style: dict[str, Any] = {
        "color": ink(axis),
        "fmt": "o",
        "markersize": 3.5,
        "capsize": 2,
        "linewidth": 1.1,
    }
    told = "predicted, median and 90 %"
    axis.errorbar(middle, median, yerr=np.stack([median - few, many - median]), label=told, **style)
    if bars:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(bottom=0.0)
    axis.set_ylabel("share of the data")
