"""What the benchmark of minibatches found: a table, what is asked beside what was found, and curves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.minibatch_models import TASKS
from benchmarks.common.minibatch_truths import read_truths
from benchmarks.common.results import Row, settings
from benchmarks.common.scoring import worst_ratio
from benchmarks.common.tables import markdown, median, nats, number

ARGUMENTS = "20,000 groups of counts"
VAES = {"VAE on digits": "digits", "VAE on MNIST": "MNIST"}
MODELS = (*TASKS, *VAES)
METHODS = ("ours", "full", "list", "normal", "by hand")


@dataclass(frozen=True)
class Target:
    """What is asked of our guide on a model; None where nothing is.

    :param below: nats that the ELBO may be below log p(y).
    :param gap: nats for each row by which it may be below that of free messages, or else below log p(y).
    :param new: error of the means of new rows, in standard deviations.
    """

    mean: float | None = None
    sd: tuple[float, float] | None = None
    seconds: float | None = None
    mebibytes: float | None = None
    below: float | None = None
    gap: float | None = None
    new: float | None = None


GROUPS = Target(0.1, (0.93, 1.07), 10.0)
FEW_GROUPS = Target(0.12, (0.95, 1.05), 15.0, below=1.0)
REGRESSION = Target(0.1, (0.9, 1.1), 60.0)
TARGETS = {
    "10,000 normal groups": GROUPS,
    "10,000 normal groups, by index": GROUPS,
    "1,000,000 normal groups": Target(0.2, (0.9, 1.1), 120.0, 1024.0),
    "2,000 Poisson groups": FEW_GROUPS,
    "2,000 binomial groups": FEW_GROUPS,
    "20,000 slopes": Target(0.15, (0.93, 1.07)),
    ARGUMENTS: Target(gap=0.05, new=0.1),
    "logistic regression": REGRESSION,
    "logistic regression, loader": REGRESSION,
}


def worst(rows: list[Row], name: str) -> float:
    return max((math.inf if row.get(name) is None else row[name] for row in rows), default=math.nan)


def middle(rows: list[Row], name: str) -> float:
    return median([row.get(name) for row in rows]) if rows else math.nan


def line(model: str, method: str, rows: list[Row], log_z: float | None) -> list[str]:
    done = [row for row in rows if "error" not in row]
    if not done:
        return [model, method, rows[0]["error"], *["–"] * 7]
    scored = "worst_mean" in done[0]
    ratios = (
        f"{number(min(r['sd_low'] for r in done))} to {number(worst(done, 'sd_high'))}" if scored else "–"
    )
    bound = next((name for name in ("elbo", "bound") if name in done[0]), None)
    return [
        model,
        method,
        number(middle(rows, "seconds")),
        number(middle(rows, "mebibytes"), 0),
        f"{middle(rows, 'taken'):.0f}",
        number(middle(rows, "passes")) if "passes" in done[0] else "–",
        f"{number(worst(rows, 'worst_mean'), 3)} ({done[0]['worst_name']})" if scored else "–",
        ratios,
        nats(None if bound is None else middle(rows, bound)),
        nats(log_z),
    ]


def check(model: str, rows: Mapping[str, list[Row]], log_z: float | None) -> list[list[str]]:
    """What is asked of ours, what was found, and whether that is enough.

    :param rows: of the model, by method.
    """
    lines: list[list[str]] = []
    own = rows.get("ours", [])

    def add(what: str, value: float, asked: float | None, at_most: bool = True) -> None:
        if asked is not None and not math.isnan(value):
            met = value <= asked if at_most else value >= asked
            bound = f"at {'most' if at_most else 'least'} {asked:g}"
            lines.append([model, what, number(value, 3), bound, "+" if met else "-"])

    if model in VAES:
        if own and rows.get("by hand"):
            add("bound", middle(own, "bound"), middle(rows["by hand"], "bound"), False)
        return lines
    target = TARGETS[model]
    if not own:
        return lines
    add("worst mean of the roots, sd", worst(own, "worst_mean"), target.mean)
    if target.sd is not None:
        add("lowest sd ratio", min(row.get("sd_low") or 0.0 for row in own), target.sd[0], False)
        add("highest sd ratio", worst(own, "sd_high"), target.sd[1])
    add("seconds", middle(own, "seconds"), target.seconds)
    add("MiB", middle(own, "mebibytes"), target.mebibytes)
    if log_z is not None:
        add("log p(y) - ELBO", log_z - middle(own, "elbo"), target.below)
    if target.gap is not None:
        free = middle(rows["full"], "elbo") if rows.get("full") else log_z
        if free is not None:
            add(
                "nats a group below free messages",
                (free - middle(own, "elbo")) / TASKS[model]().size,
                target.gap,
            )
    add("worst mean of a new row, sd", worst(own, "new_worst_mean"), target.new)
    return lines


def latest_of(rows: list[Row]) -> list[Row]:
    """Where a run was repeated, the last of its rows counts."""
    return list({(row["model"], row["method"], row["seed"], row["steps"]): row for row in rows}.values())


def report(rows: list[Row]) -> None:
    latest = [row for row in latest_of(rows) if row["steps"] is None]
    truths = read_truths()
    print(settings(latest))
    head = [
        "model",
        "guide",
        "seconds",
        "MiB",
        "steps",
        "passes",
        "worst mean, sd",
        "sd ratios",
        "ELBO or bound",
    ]
    lines, checks = [], []
    for model in MODELS:
        names = {row["truth"] for row in latest if row["model"] == model and "truth" in row}
        log_z = truths.get(next(iter(names), ""), {}).get("log_z")
        groups = {
            method: [row for row in latest if (row["model"], row["method"]) == (model, method)]
            for method in METHODS
        }
        lines += [line(model, method, some, log_z) for method, some in groups.items() if some]
        checks += check(model, groups, log_z)
    print(markdown([*head, "log p(y)"], lines))
    if checks:
        print("\n" + markdown(["model", "target", "found", "asked", ""], checks))
    failed = {(row["model"], row["method"], row["error"]) for row in latest if "error" in row}
    print("".join(f"\n- {method} on {model}: {error}" for model, method, error in sorted(failed)))


def draw(rows: list[Row], path: Path) -> None:
    """The worst mean and the worst ratio against passes over the data, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from pyro_flowvi.plotting import COLOURS

    points = [
        row for row in latest_of(rows) if row["steps"] is not None and row.get("worst_mean") is not None
    ]
    models = [model for model in MODELS if any(row["model"] == model for row in points)]
    picture, grid = pyplot.subplots(2, len(models), figsize=(3.2 * len(models), 5.4), squeeze=False)
    for column, model in enumerate(models):
        for colour, method in zip(COLOURS, METHODS, strict=False):
            own = [row for row in points if (row["model"], row["method"]) == (model, method)]
            steps = sorted({row["steps"] for row in own})
            groups = [[row for row in own if row["steps"] == count] for count in steps]
            if not groups:
                continue
            passes = [middle(group, "passes") for group in groups]
            off = [middle(group, "worst_mean") for group in groups]
            ratio = [
                median([abs(math.log(max(worst_ratio(row), 1e-9))) for row in group]) for group in groups
            ]
            for axis, values in zip(grid[:, column], (off, ratio), strict=True):
                axis.loglog(passes, values, "o-", color=colour, markersize=4, label=method)
        grid[0, column].set_title(model, fontsize=9)
        grid[1, column].set_xlabel("passes over the data")
    grid[0, 0].set_ylabel("worst mean, sd")
    grid[1, 0].set_ylabel("worst |log sd ratio|")
    grid[0, 0].legend(fontsize=8)
    picture.tight_layout()
    picture.savefig(path, dpi=110)
    pyplot.close(picture)
