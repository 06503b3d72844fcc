"""Fit guides to real posteriors, and compare their draws with reference draws, raw and resampled.

    python -m benchmarks.fits.posteriordb --data DIR [--posteriors NAME ...] [--guides NAME ...] [--seeds 3]
        [--steps 3000] [--isolate] [--cold] [--output results.jsonl]
    python -m benchmarks.fits.posteriordb --report results.jsonl [--figure docs/posteriordb.png]

``DIR`` is a clone of github.com/stan-dev/posteriordb, which has the data and ten chains of 1,000 reference
draws of each posterior.  A name may be shortened to its start.  Everything is in float64.

- Our guides are trained by ``pyro_flowvi.fit(model, guide, *args)`` at its defaults.
- Pyro's (``pyro.``) are trained by its eager ``SVI``, 3,000 steps of 16 vectorised particles, ClippedAdam
  from 1e-2 to 1e-3.  Two of them ignore start values and cannot start on a flat prior; their model is
  wrapped in Pyro's ``InitMessenger``.  ``AutoNormalizingFlow`` has 8 planar layers.
- NumPyro's (``numpyro.``) are at their defaults, with the same steps, particles and optimizer; without
  NumPyro they are skipped.

*Right* is defined in ``scoring.py``: every mean within 0.1 standard deviations of the reference, and every
ratio of standard deviations within 0.9 to 1.1.  The other scores of a result: the sliced Wasserstein-2
distance in standardised unconstrained coordinates over its noise floor, ELBO, k-hat and verdict of
``pyro_flowvi.diagnose``, and the wall seconds from the guide's construction to the end of training, with all
compilation.  ``--isolate`` gives each fit a process of its own; ``--cold`` does so and measures our guides
twice, first with an empty cache of the compiler.

The file of results is added to, and what it has is not run again.  ``--report`` prints tables, and draws the
errors of the means against the seconds.
"""

import argparse
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.pictures import save
from benchmarks.common.posteriors import RECIPES, Posterior, load
from benchmarks.common.results import (
    Clock,
    Row,
    attempt,
    chosen,
    collect,
    finite,
    first_line,
    read,
    results_of,
)
from benchmarks.common.scoring import (
    MEAN_BOUND,
    OURS,
    STOCK,
    SlicedDistance,
    accuracy,
    draw,
    is_right,
    judge,
    redraw,
    train_ours,
    train_stock,
    worst_ratio,
    worst_ratio_of,
)
from benchmarks.common.tables import markdown, median, nats, number

NUMPYRO = ("numpyro.AutoBNAFNormal", "numpyro.AutoIAFNormal")
GUIDES = (*OURS, *STOCK, *NUMPYRO)
NUM_DRAWS = 10_000
HIGHEST = 20.0
"""The end of the figure's axis of errors, where larger ones are drawn."""
SHORT = {  # for the heads of tables
    "eight_schools-eight_schools_centered": "8 schools, centred",
    "eight_schools-eight_schools_noncentered": "8 schools, non-centred",
    "low_dim_gauss_mix-low_dim_gauss_mix": "Gaussian mixture",
    "gp_pois_regr-gp_pois_regr": "GP Poisson",
    "kidiq-kidscore_momhsiq": "kidiq",
    "sblri-blr": "sblri",
    "arK-arK": "AR(5)",
    "garch-garch11": "GARCH(1,1)",
}


def fit_one(posteriors: dict[str, Posterior], key: Row) -> Row:
    """The result of one task: trains a guide, draws, and scores."""
    posterior, guide_name, seed = posteriors[key["posterior"]], key["guide"], key["seed"]
    model, args = posterior.model, posterior.args
    result: Row = {}
    redrawn = None
    clock = Clock()
    if guide_name in NUMPYRO:
        from benchmarks.common import posteriors_numpyro

        draws_of, judge_it = posteriors_numpyro.train(guide_name, posterior.name, args, key["steps"], seed)
        result |= clock.read()
        sites = draws_of(NUM_DRAWS)
        result |= judge_it()
    else:
        if guide_name in OURS:
            guide, fitted = train_ours(guide_name, model, args, seed)
            result["fit"] = repr(fitted)
        else:
            guide = train_stock(guide_name, model, args, key["steps"], seed)
        result |= clock.read()
        torch.manual_seed(seed)
        sites, redrawn = draw(guide, args, NUM_DRAWS), redraw(guide, NUM_DRAWS)
        try:
            result |= judge(model, guide, args, seed)
        except Exception as error:  # the draws can be scored nevertheless
            result["diagnose_error"] = first_line(error)
    distance = SlicedDistance(posterior.pack(posterior.reference_sites()))
    for prefix, values in (("", sites), ("psis_", redrawn)):
        if values is not None:
            result |= accuracy(posterior.parameters(values), posterior.reference, prefix)
            result[f"{prefix}sliced"] = distance(posterior.pack(values))
    return finite(result)


def say(row: Row) -> str:
    if "error" in row:
        outcome = row["error"]
    else:
        verdict = f"k-hat {number(row.get('khat'))} {row.get('verdict') or ''}"
        outcome = f"mean {number(row['worst_mean'], 3)} sd ratio {number(worst_ratio(row))} "
        elbo = nats(row.get("elbo"))
        outcome += f"sliced {number(row['sliced'])} ELBO {elbo} {verdict} "
        outcome += f"{row['seconds']:.1f} s" + (" right" if is_right(row) else "")
    return f"{row['posterior']} {row['guide']} seed {row['seed']}: {outcome}"


# -- report --------------------------------------------------------------------------------------


def cell(rows: list[Row]) -> str:
    """Right of all, worst mean, worst ratio, seconds, over the seeds of one guide on one posterior."""
    if not rows:
        return ""
    if all("error" in row for row in rows):
        return "fails"
    ratio = worst_ratio_of(rows)
    figures = [number(median([row.get("worst_mean") for row in rows])), number(ratio)]
    seconds = number(float(np.median([row["seconds"] for row in rows if "seconds" in row])), 1)
    return f"{sum(map(is_right, rows))}/{len(rows)} · {' · '.join(figures)} · {seconds} s"


def spread(groups: dict[str, list[Row]]) -> float:
    """The largest difference of ELBOs between seeds, over posteriors; NaN with one seed."""
    ranges = []
    for rows in groups.values():
        elbos = [row["elbo"] if row.get("elbo") is not None else -math.inf for row in rows]
        if len(elbos) > 1:
            ranges.append(max(elbos) - min(elbos) if math.isfinite(max(elbos)) else math.inf)
    return max(ranges, default=math.nan)


def summary(guide: str, groups: dict[str, list[Row]]) -> list[str]:
    """One line over all posteriors."""
    rows = [row for group in groups.values() for row in group]
    right = [row for row in rows if is_right(row)]
    redrawn = [row for row in rows if "psis_worst_mean" in row]
    judged = [row for row in rows if row.get("verdict")]
    good = [row for row in judged if row["verdict"] == "good"]
    found = [row for row in right if row.get("verdict") in ("good", "usable")]
    cold = [row["seconds_cold"] for row in rows if row.get("seconds_cold") is not None]
    return [
        guide,
        f"{len(right)}/{len(rows)}",
        f"{sum(is_right(row, 'psis_') for row in redrawn)}/{len(redrawn)}" if redrawn else "–",
        number(median([row.get("worst_mean") for row in rows])),
        number(median([row.get("sliced") for row in rows])),
        f"{sum(not is_right(row) for row in good)} of {len(good)}" if judged else "–",
        f"{len(found)}/{len(right)}" if judged and right else "–",
        number(spread(groups)),
        number(float(np.median([row["seconds"] for row in rows if "seconds" in row] or [math.nan])), 1),
        number(float(np.median(cold or [math.nan])), 1),
    ]


def report(results: Path, figure: Path | None) -> None:
    rows = read(results)
    names = [name for name in RECIPES if any(row["posterior"] == name for row in rows)]
    guides = [name for name in GUIDES if any(row["guide"] == name for row in rows)]
    groups = {
        guide: {
            name: [row for row in rows if (row["guide"], row["posterior"]) == (guide, name)] for name in names
        }
        for guide in guides
    }
    print("Right of all seeds · median worst mean error, sd · worst sd ratio · median seconds:\n")
    lines = [[guide, *(cell(groups[guide][name]) for name in names)] for guide in guides]
    print(markdown(["guide", *(SHORT[name] for name in names)], lines))
    head = ["guide", "right", "right, resampled", "median worst mean", "median sliced"]
    head += ["“good” and not right", "right ones judged good or usable", "ELBO spread, nats"]
    print("\n" + markdown([*head, "seconds", "cold"], [summary(g, groups[g]) for g in guides]))
    errors = {(r["guide"], r["posterior"], r["error"]) for r in rows if "error" in r}
    print("".join(f"\n- {guide} on {name}: {error}" for guide, name, error in sorted(errors)))
    if figure is not None:
        plot(names, groups, figure, results)


def plot(names: list[str], groups: dict[str, dict[str, list[Row]]], path: Path, results: Path) -> None:
    """The worst error of a mean against the seconds, medians over seeds; one panel for each posterior."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    width, height = 3.1 * columns + 0.4, 2.5 * lines + 1.5
    grid, axes = pyplot.subplots(
        lines, columns, figsize=(width, height), sharex=True, sharey=True, squeeze=False
    )
    every = [rows for by_posterior in groups.values() for rows in by_posterior.values() if rows]
    known = [e for rows in every if math.isfinite(e := median([row.get("worst_mean") for row in rows]))]
    low, top = 0.7 * min([*known, 0.02]), min(2.0 * max([*known, 1.0]), HIGHEST)
    for axis, name in zip(axes.flat, names, strict=False):
        axis.axhspan(low, MEAN_BOUND, color="#e3f0de", zorder=0)
        for guide, by_posterior in groups.items():
            rows = [row for row in by_posterior[name] if "seconds" in row]
            if rows:
                error = median([row.get("worst_mean") for row in by_posterior[name]])
                seconds = float(np.median([row["cpu_seconds"] for row in rows]))
                filled = 2 * sum(map(is_right, rows)) > len(by_posterior[name])
                axis.plot(seconds, min(error, top / 1.3), **_style(guide, filled))
        axis.set_title(SHORT[name], fontsize=10)
        axis.set(xscale="log", yscale="log", ylim=(low, top))
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    grid.tight_layout(rect=(0.03, 1.1 / height, 1.0, 1.0))
    grid.supylabel("worst error of a posterior mean, sd", fontsize=10)
    label = "CPU seconds of a fit, with compilation; filled: most seeds right, standard deviations included"
    grid.text(0.5, 0.95 / height, label, ha="center", fontsize=10)
    handles = [Line2D([], [], label=guide, **_style(guide, True)) for guide in groups]
    grid.legend(handles=handles, loc="lower center", ncol=5, fontsize=8.5, frameon=False)
    save(grid, path, results, dpi=90)


def _style(guide: str, filled: bool) -> dict[str, Any]:
    """Colours for our guides, black for Pyro's, grey for NumPyro's."""
    if guide in OURS:
        place, color, markers = OURS.index(guide), f"C{OURS.index(guide)}", "osD^v<>"
    elif guide in STOCK:
        place, color, markers = list(STOCK).index(guide), "black", "osD^"
    else:
        place, color, markers = NUMPYRO.index(guide), "grey", "os"
    return {
        "marker": markers[place],
        "color": color,
        "markerfacecolor": color if filled else "none",
        "markersize": 7,
        "linestyle": "none",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a clone of posteriordb")
    parser.add_argument("--posteriors", nargs="+", default=[], help="names or their starts; default all")
    parser.add_argument("--guides", nargs="+", default=[], help="names or their starts; default all")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each guide on each posterior")
    parser.add_argument("--steps", type=int, default=3000, help="of Pyro's and NumPyro's guides")
    parser.add_argument("--isolate", action="store_true", help="each fit in a process of its own")
    parser.add_argument("--cold", action="store_true", help="ours with an empty and a full compiler's cache")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for a fit of its own process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=results_of("posteriordb"))
    parser.add_argument("--report", type=Path, help="print tables of this file and fit nothing")
    parser.add_argument("--figure", type=Path, help="with --report: draw to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report is not None:
        report(options.report, options.figure)
        return
    if options.data is None:
        parser.error("expected --data, a clone of github.com/stan-dev/posteriordb, or --report")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(options.threads)
    if options.one:
        key = json.loads(options.one)
        print(json.dumps(attempt(key, lambda key: fit_one(load(options.data, [key["posterior"]]), key))))
        return
    names, guides = chosen(options.posteriors, tuple(RECIPES)), chosen(options.guides, GUIDES)
    if importlib.util.find_spec("numpyro") is None and set(guides) & set(NUMPYRO):
        print("NumPyro is not installed: its guides are skipped (pip install numpyro)")
        guides = [guide for guide in guides if guide not in NUMPYRO]
    posteriors = load(options.data, names)
    keys: list[Row] = [
        {"posterior": name, "guide": guide, "seed": seed, "steps": None if guide in OURS else options.steps}
        for seed in range(options.seeds)
        for name in names
        for guide in guides
    ]

    def run(key: Row) -> Any:
        return fit_one(posteriors, key)

    collect(
        keys,
        options.output,
        run,
        say,
        apart=options.isolate or options.cold,
        cold=lambda key: options.cold and key["guide"] in OURS,
        timeout=options.timeout,
    )


if __name__ == "__main__":
    main()
