"""Sections on hierarchical models, latents in minibatches, refits and calibration."""

import numpy as np

from benchmarks.common.minibatch_truths import read_truths as minibatch_truths
from benchmarks.common.results import Row
from benchmarks.common.scoring import is_right, worst_ratio_of
from benchmarks.common.structured_truths import read_truths as structured_truths
from benchmarks.common.tables import markdown, median, nats, number
from benchmarks.fits.calibration import VERDICTS, by_model
from benchmarks.measured.posteriors import grouped
from benchmarks.measured.section import ADDED, Section


def ratios(row: Row) -> str:
    low, high = number(row.get("sd_low")), number(row.get("sd_high"))
    return low if low == high else f"{low} to {high}"


# -- by structure and flat -----------------------------------------------------------------------


def structured(rows: list[Row]) -> str:
    truths, lines = structured_truths(), []
    latest = {(row["model"], row["method"], row["seed"]): row for row in rows}
    for (model, method), group in grouped(list(latest.values()), "model", "method").items():
        for row in group:
            if "error" in row:
                lines.append(
                    [str(model), str(method), row["error"], *[""] * 4, row.get("commit", ADDED["structured"])]
                )
                continue
            log_z = truths.get(row.get("truth", ""), {}).get("log_z")
            figures = [number(row["cpu_seconds"], 1), f"{row['elbo']:.2f}", number(row["worst_mean"])]
            figures += [ratios(row), nats(log_z)]
            lines.append([str(model), str(method), *figures, row.get("commit", ADDED["structured"])])
    order = list(dict.fromkeys(row["model"] for row in rows))
    lines.sort(key=lambda line: (order.index(line[0]), line[1] != "structured"))
    return markdown(
        ["model", "guide", "seconds", "ELBO", "worst mean error, sd", "sd ratios", "log p(y)", "commit"],
        lines,
    )


STRUCTURED = Section(
    "What does a guide gain that knows the program?",
    "benchmarks.fits.structured",
    '`AutoRealNVP` at its defaults with `structure="auto"` (*structured*) and over one flat vector (*flat*); '
    "errors of the roots against quadrature, weighted draws or long runs of NUTS, float64, one seed. A run "
    "is stopped after 400 to 600 seconds.",
    structured,
    options="--seeds 1",
)


# -- twenty kinds --------------------------------------------------------------------------------


def hierarchical(rows: list[Row]) -> str:
    done = [row for row in rows if "error" not in row]
    counts = []
    for name, right in (("right", True), ("wrong", False)):
        own = [row for row in done if row["right"] is right]
        redrawn = sum(row["resampled_right"] for row in own)
        verdicts = [str(sum(row["verdict"] == verdict for row in own)) for verdict in VERDICTS]
        counts.append([f"{len(own)} that are {name}", *verdicts, str(redrawn)])
    kinds = []
    for (kind,), group in grouped(done, "kind").items():
        ratio = worst_ratio_of(group)
        seconds = (
            number(median([row[name] for row in group]), 1)
            for name in ("cpu_seconds", "cpu_seconds_diagnose")
        )
        right = f"{sum(row['right'] for row in group)} of {len(group)}"
        verdicts = ", ".join(dict.fromkeys(row["verdict"] for row in group))
        mean = number(max(row["worst_mean"] for row in group))
        kinds.append([str(kind), right, mean, number(ratio), verdicts, *seconds])
    head = ["kind", "right", "worst mean error, sd", "worst sd ratio", "verdicts", "fit, s", "`diagnose`, s"]
    return "\n\n".join(
        [markdown(["fits", *VERDICTS, "right after resampling"], counts), markdown(head, kinds)]
    )


HIERARCHICAL = Section(
    "Are fits of hierarchical models right, and does the verdict know?",
    "benchmarks.fits.hierarchical",
    "Twenty kinds of hierarchical models as users write them, with `a[group]` (plain) and `a[..., group]` "
    "where there is an index, against NUTS: `AutoRealNVP` and `fit` at their defaults. *Right*: every mean "
    "within .1 standard deviations, every standard deviation within 10 %.",
    hierarchical,
)


# -- minibatches ---------------------------------------------------------------------------------


def minibatches(rows: list[Row]) -> str:
    truths, lines = structured_truths() | minibatch_truths(), []
    for row in rows:
        if row["steps"] is not None:
            continue
        name = f"{row['model']}" + (f", {row['method']}" if row["method"] != "ours" else "")
        if "error" in row:
            lines.append([name, row["error"], *[""] * 6])
            continue
        log_z = truths.get(row.get("truth", ""), {}).get("log_z")
        bound = row.get("elbo", row.get("bound"))
        figures = [
            number(row["cpu_seconds"], 1),
            number(row.get("mebibytes"), 0),
            number(row.get("passes"), 1),
        ]
        figures += [number(row.get("worst_mean")), ratios(row), nats(bound)]
        lines.append([name, *figures, nats(log_z)])
    head = [
        "model",
        "seconds",
        "MiB",
        "passes over the data",
        "worst mean error, sd",
        "sd ratios",
        "ELBO",
        "log p(y)",
    ]
    return markdown(head, lines) if lines else ""


MINIBATCHES = Section(
    "How right are latents in minibatches?",
    "benchmarks.fits.minibatches",
    "Latents under a subsampled plate, `AutoRealNVP` and `fit` at their defaults, float64, one seed. "
    "Errors of the latents outside of the plate against quadrature or weighted draws; MiB are the peak of "
    "the resident set less what it was after the imports.",
    minibatches,
    options="--seeds 1",
)


# -- ten million rows ----------------------------------------------------------------------------


def ten_million(rows: list[Row]) -> str:
    lines = [
        [
            f"{row['rows']:,}",
            str(row["processes"]),
            number(row["seconds"], 0),
            number(row["user_seconds"] + row["system_seconds"], 0),
            " and ".join(number(value, 0) for value in row["mebibytes"]),
            number(row["mu_mean"], 3),
            number(row["mu_sd_ratio"], 3),
            number(row["theta_worst_mean"], 3),
            f"{number(row['theta_sd_low'], 3)} to {number(row['theta_sd_high'], 3)}",
        ]
        for row in rows
        if row["benchmark"] == "ten_million"
    ]
    head = ["rows", "processes", "wall seconds", "CPU seconds of the first", "MiB of each", "error of mu, sd"]
    head += ["sd ratio of mu", "worst error of theta, sd", "sd ratios of theta"]
    return markdown(head, lines) if lines else ""


TEN_MILLION = Section(
    "Ten million rows on disk: is a fit right, and how much memory does it take?",
    "benchmarks.scale.ten_million",
    "Ten million rows in 100,000 groups, of which the plate shows 200 a step; data read from a file that "
    "is larger than what a step holds. The posterior is known in closed form.",
    ten_million,
    results="scale",
)


# -- refits --------------------------------------------------------------------------------------


def refits(rows: list[Row]) -> str:
    lines = []
    for (model, change), group in grouped(
        [row for row in rows if "error" not in row], "model", "change"
    ).items():
        seconds = "cpu_seconds" if all("fresh_cpu_seconds" in row for row in group) else "seconds"
        fresh, again = (median([row[f"{kind}_{seconds}"] for row in group]) for kind in ("fresh", "refit"))
        mean = max(row["refit_worst_mean"] for row in group)
        ratio = worst_ratio_of(group, "refit_")
        figures = [number(fresh), number(again), f"{again / fresh:.0%}", number(mean), number(ratio)]
        right = f"{sum(is_right(row, 'refit_') for row in group)} of {len(group)}"
        lines.append([str(model), str(change), *figures, right])
    head = [
        "model",
        "change",
        "fresh, s",
        "from the earlier fit, s",
        "share",
        "worst mean error, sd",
        "worst sd ratio",
    ]
    return markdown([*head, "right"], lines)


REFITS = Section(
    "What does a fit take that starts from an earlier one?",
    "benchmarks.fits.refits",
    "`fit(..., init=previous)` after 5 % more rows, a narrower prior, or with a fifth of the rows left "
    "out, beside a fresh fit; errors of the roots against a resampled fit of another seed.",
    refits,
    options="--seeds 1",
)


# -- calibration ---------------------------------------------------------------------------------


def calibration(rows: list[Row]) -> str:
    lines = []
    for name, (found, seconds) in by_model(rows).items():
        counts = ", ".join(f"{len(found.among(verdict))} {verdict}" for verdict in VERDICTS)
        good = found.among("good")
        p, of_good = (number(min(each.adjusted().values())) for each in (found, good))
        lines.append([name, str(len(found)), counts, p, of_good, number(float(np.median(seconds)), 1)])
    head = [
        "model",
        "fits",
        "verdicts",
        "smallest p",
        "smallest p of the good",
        "wall seconds of a fit and verdict",
    ]
    return markdown(head, lines) if lines else ""


CALIBRATION = Section(
    "Are fits right on average over the data that the prior makes?",
    "benchmarks.fits.calibration",
    "Simulation-based calibration (`sbc`) of `AutoRealNVP` at its defaults: p values of uniform ranks, "
    "adjusted for their number, of all fits and of those that `diagnose` calls good. Below .05 in one of "
    "twenty lines at most where the guides are the posteriors. *schools*: eight schools, centred; "
    "*counts*: 60 counts in 12 groups.",
    calibration,
)

SECTIONS = (STRUCTURED, HIERARCHICAL, MINIBATCHES, TEN_MILLION, REFITS, CALIBRATION)
