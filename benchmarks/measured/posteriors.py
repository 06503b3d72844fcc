"""Sections on fits of posteriors that are known: real ones, and targets with a density in closed form."""

import math

import numpy as np

from benchmarks.common.results import Row
from benchmarks.common.scoring import MEAN_BOUND, RATIO_BOUNDS, is_right, worst_ratio, worst_ratio_of
from benchmarks.common.tables import markdown, median, number
from benchmarks.fits.posteriordb import SHORT
from benchmarks.measured.section import Section, listed

RIGHT = (
    f"*Right*: every mean within {MEAN_BOUND:g} standard deviations of the reference, and every ratio of "
    f"standard deviations within {RATIO_BOUNDS[0]:g} to {RATIO_BOUNDS[1]:g}."
)


def grouped(rows: list[Row], *names: str) -> dict[tuple[object, ...], list[Row]]:
    """Rows by the values of these entries, in the order in which they come."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def spread(values: list[float], digits: int = 2) -> str:
    """The median, and the range of several."""
    if not values:
        return "–"
    text = number(float(np.median(values)), digits)
    low, high = (number(value, digits) for value in (min(values), max(values)))
    return text if len(values) < 2 or low == high else f"{text} ({low} to {high})"


def share(rows: list[Row], prefix: str = "") -> str:
    return f"{sum(is_right(row, prefix) for row in rows)} of {len(rows)}" if rows else "–"


def worst(rows: list[Row], name: str) -> float:
    """The largest; infinite where a run has none."""
    return max((math.inf if row.get(name) is None else row[name] for row in rows), default=math.nan)


# -- time to a right posterior -------------------------------------------------------------------

FEW = (
    "eight_schools-eight_schools_centered",
    "garch-garch11",
    "arK-arK",
    "low_dim_gauss_mix-low_dim_gauss_mix",
    "gp_pois_regr-gp_pois_regr",
    "radon, a[..., county]",
)
"""Those of README's table."""
HEAD = ["posterior", "`fit`, s", "NUTS, s", "`fit` right", "NUTS right"]


def line_of_times(name: str, fits: list[Row], nuts: list[Row]) -> list[str]:
    fit_seconds, nuts_seconds = (
        [row["cpu_seconds"] for row in rows if "cpu_seconds" in row] for rows in (fits, nuts)
    )
    return [SHORT.get(name, name), spread(fit_seconds), spread(nuts_seconds), share(fits), share(nuts)]


def times(rows: list[Row], names: tuple[str, ...] | None = None) -> str:
    groups = grouped(rows, "model", "method")
    models = names or tuple(dict.fromkeys(str(row["model"]) for row in rows))
    lines, more = [], []
    for name in models:
        fits, nuts = (groups.get((name, method), []) for method in ("fit", "NUTS"))
        if not fits and not nuts:
            continue
        line = line_of_times(name, fits, nuts)
        scored = [row for row in fits if row.get("worst_mean") is not None]
        ratio = worst_ratio_of(scored)
        more.append([*line, number(worst(fits, "worst_mean")), number(ratio), listed(fits + nuts, "commit")])
        lines.append(line)
    if names is not None:
        return markdown(HEAD, lines) if lines else ""
    return markdown([*HEAD, "`fit`: worst mean, sd", "worst sd ratio", "commit"], more)


TIME_TO_RIGHT = Section(
    "How long does a right posterior take?",
    "benchmarks.fits.time_to_right",
    "From the call of `fit` (`AutoRealNVP`, all at its defaults) to the end of training, and of NumPyro's "
    "NUTS (4 vectorised chains, 1,000 + 1,000 draws) from its construction to the last draw, tracing and "
    "compilation included; each run in a process of its own, on one machine and one day, float64. "
    f"Medians over the runs, with their range. {RIGHT}",
    times,
    options="--data DIR --repeats 3",
)


# -- posteriordb ---------------------------------------------------------------------------------


def posteriors(rows: list[Row]) -> str:
    lines = []
    for (guide,), group in grouped(rows, "guide").items():
        redrawn = [row for row in group if "psis_worst_mean" in row]
        judged = [row for row in group if row.get("verdict")]
        good = [row for row in judged if row["verdict"] == "good"]
        seconds = [row["cpu_seconds"] for row in group if "cpu_seconds" in row]
        failed = sum("error" in row for row in group)
        lines.append(
            [
                f"{guide}" + (f" ({failed} failed)" if failed else ""),
                share(group),
                share(redrawn, "psis_"),
                number(median([row.get("worst_mean") for row in group])),
                number(median([row.get("sliced") for row in group])),
                f"{len(good)}, of them right {sum(map(is_right, good))}" if judged else "–",
                number(float(np.median(seconds)), 1) if seconds else "–",
            ]
        )
    head = ["guide", "right", "right, resampled", "median of the worst mean error, sd"]
    head += ["median sliced W2 over its floor", "judged good", "median seconds"]
    return markdown(head, lines)


POSTERIORDB = Section(
    "How right are guides on real posteriors?",
    "benchmarks.fits.posteriordb",
    "Eight posteriors of posteriordb, against its reference draws, float64. Ours are trained by `fit` at "
    "its defaults; guides of Pyro and NumPyro, where there are any, with 3,000 steps of 16 particles. A "
    f"run is a posterior with a seed. {RIGHT}",
    posteriors,
    picture=("posteriordb.png", "Errors of the means against seconds, for each posterior and guide"),
    options="--data DIR",
)


# -- hard targets --------------------------------------------------------------------------------


def hard_targets(rows: list[Row]) -> str:
    lines = []
    for (target, fit), group in grouped(rows, "target", "fit").items():
        done = sorted((row for row in group if row.get("elbo") is not None), key=lambda row: -row["elbo"])
        if not done:
            lines.append([str(target), str(fit), "fails", *[""] * 5])
            continue
        row = done[(len(done) - 1) // 2]
        ratio = worst_ratio(row, scale="width")
        right = "yes" if is_right(row, scale="width") else "no"
        kl = f"{number(-row['elbo'], 3)} ± {number(row['elbo_se'], 3)}"
        figures = [kl, number(row["worst_mean"]), number(ratio), right, row["verdict"]]
        lines.append([str(target), str(fit), *figures, number(row["cpu_seconds"], 1)])
    head = ["target", "fit", "KL(q ‖ p), nats", "worst mean error, sd", "worst ratio of widths", "right"]
    return markdown([*head, "verdict", "seconds"], lines)


HARD_TARGETS = Section(
    "What happens on hard targets, and does the verdict say so?",
    "benchmarks.fits.hard_targets",
    "Normalised targets, so that minus the ELBO is the divergence itself; fits of `AutoRealNVP` at the "
    "defaults, and with too few steps, or by guides that cannot have the shape by themselves (planar "
    "layers, Gaussians). Ours draw latents by the model's own priors, so that a funnel or a banana whose "
    "priors are its shape is no hard target for them. Scale is measured from the 5 % to the 95 % quantile, "
    "since standard deviations of heavy tails are noise, and *right* is by it. With several seeds, the one "
    "of median divergence.",
    hard_targets,
    options="--seeds 1",
)


# -- the demo ------------------------------------------------------------------------------------


def demo(rows: list[Row]) -> str:
    lines = []
    for (guide,), group in grouped(rows, "guide").items():
        verdicts = ", ".join(dict.fromkeys(row["verdict"] for row in group))
        khats = [row["khat"] for row in group if row["khat"] is not None]
        elbo = f"{np.median([row['elbo'] for row in group]):.2f}"
        errors, seconds = ([row[name] for row in group] for name in ("worst_mean", "seconds"))
        lines.append([str(guide), elbo, spread(khats), verdicts, spread(errors), spread(seconds, 1)])
    head = ["guide", "ELBO, nats", "PSIS k-hat", "verdict", "worst mean error, sd", "wall seconds"]
    return markdown(head, lines)


DEMO = Section(
    "What does the demo show?",
    "benchmarks.fits.demo",
    "`python -m pyro_flowvi demo`: centred eight schools with four guides. Errors are against a long run "
    "of NUTS in the non-centred form, which the package has. Seconds are wall seconds of the fit, beside "
    "other work.",
    demo,
    options="--seeds 3",
)


# -- energies and dimensions ---------------------------------------------------------------------


def energies(rows: list[Row]) -> str:
    rows = [row for row in rows if not row["quick"] and row["annealed"]]
    names = list(rows[0]["energies"]) if rows else []
    lines = [
        [
            row["family"].replace("_", " "),
            str(row["K"]),
            *(number(row["energies"][name]["kl"], 3) for name in names),
            number(max(row["energies"][name]["se"] for name in names), 3),
            f"{row['steps']:,}",
            str(row["seeds"]),
            number(row["cpu_seconds"], 1),
        ]
        for row in rows
    ]
    head = ["flow", "K", *names, "largest s.e.", "steps", "seeds", "seconds"]
    return markdown(head, lines) if lines else ""


ENERGIES = Section(
    "How near do flows come to the four energies of Rezende and Mohamed (2015)?",
    "benchmarks.fits.energies",
    "Exact KL(q ‖ p) in nats, medians of the seeds, one setting for each family; K counts layers, for "
    "couplings half-layers. Seconds are those of one training, compilation apart.",
    energies,
    picture=("energies.png", "Densities of the four energies and of the fitted flows"),
)


def dimensions(rows: list[Row]) -> str:
    lines = []
    for (dim, guide, steps), group in grouped(rows, "dim", "guide", "steps").items():
        by_target = {row["target"]: row for row in group}
        kls = [
            f"{by_target[name]['kl']:.3g} ± {by_target[name]['kl_se']:.1g}" if name in by_target else "–"
            for name in ("correlated", "funnel")
        ]
        seconds = number(max(row["cpu_seconds"] for row in group), 1)
        lines.append([f"{dim:,}", str(guide), f"{group[0]['parameters']:,}", f"{steps:,}", seconds, *kls])
    head = ["d", "guide", "parameters", "steps, at most", "seconds, at most", "KL correlated", "KL funnel"]
    return markdown(head, lines)


DIMENSIONS = Section(
    "What does a dimension cost?",
    "benchmarks.fits.dimensions",
    "A Gaussian whose neighbouring coordinates are correlated by .9, and Neal's funnel; KL(q ‖ p) in nats "
    "after `fit` at its defaults, but for the steps. One seed.",
    dimensions,
    options="--eager",
)

SECTIONS = (TIME_TO_RIGHT, POSTERIORDB, HARD_TARGETS, DEMO, ENERGIES, DIMENSIONS)
