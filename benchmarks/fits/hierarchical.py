"""Whether fits of hierarchical models, as users write them, are right, and whether the verdict knows.

    OMP_NUM_THREADS=1 python -m benchmarks.fits.hierarchical --reference [--kinds NAME ...]
    OMP_NUM_THREADS=1 python -m benchmarks.fits.hierarchical [--kinds NAME ...] [--forms plain broadcasting]
        [--seeds 3] [--limit 600] [--core 0] [--output hierarchical.jsonl]
    python -m benchmarks.fits.hierarchical --report hierarchical.jsonl

The models are the twenty kinds of ``common/hierarchical_models.py``, each with ``a[group]`` (*plain*) and
with ``a[..., group]`` (*broadcasting*) where it has an index.  The radon's data are posteriordb's, from the
clone that the environment variable PYRO_FLOWVI_POSTERIORDB names; without it those kinds are left out.

``--reference`` runs NumPyro's NUTS, 4 chains of 2,000 draws after 2,000 (two kinds have independent draws of
their exact posteriors), and adds what it finds to ``benchmarks/results/hierarchical_reference.json``; what is
there is not run again.

A run is ``AutoRealNVP``, ``pyro_flowvi.fit`` and ``pyro_flowvi.diagnose`` with the fit's result, all at their
defaults, in float64, in a process of its own with one thread and one core, the compiler's cache empty.  A fit
is *right* where of 10,000 draws every mean is within 0.1 standard deviations of the reference and every
standard deviation within 0.9 to 1.1 of it, over the roots in their coordinates and ten elements of each local
site.  The file also has the errors of as many draws that are resampled, ``resampled_...``: they are what the
verdict "usable" tells to use.  What the file of results has is not run again.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

import pyro_flowvi
from benchmarks.common.hierarchical_models import FORMS, KINDS
from benchmarks.common.results import Clock, Row, attempt, chosen, collect, read, results_of, settings
from benchmarks.common.scoring import draw, is_right, redraw, train_ours, worst_ratio
from benchmarks.common.structured_truths import errors, read_truths
from benchmarks.common.tables import markdown, number
from benchmarks.fits.time_to_right import FIRST_CORE, XLA_FLAGS

REFERENCE = Path(__file__).parents[1] / "results" / "hierarchical_reference.json"
NUM_DRAWS, SECONDS = 10_000, 60.0
RADON = tuple(name for name in KINDS if name.startswith("radon"))
VERDICTS = ("good", "usable", "poor")


def run_one(key: Row) -> Row:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        return fit_one(key, read_truths(REFERENCE)[key["kind"]])


def fit_one(key: Row, reference: Row, **options: Any) -> Row:
    """``options`` are those of ``fit``."""
    problem, seed = KINDS[key["kind"]].problem(key["form"]), key["seed"]
    clock = Clock()
    guide, fitted = train_ours("AutoRealNVP", problem.model, problem.args, seed, **options)
    row = clock.read() | {"steps": len(fitted.losses), "stop_reason": fitted.stop_reason}
    pyro.set_rng_seed(seed)
    row |= errors(problem.coordinates(draw(guide, problem.args, NUM_DRAWS)), reference)
    row["right"] = is_right(row)
    clock = Clock()
    found = pyro_flowvi.diagnose(problem.model, guide, *problem.args, seed=seed, fit_result=fitted)
    row |= clock.read("_diagnose") | {
        name: getattr(found, name) for name in ("verdict", "elbo", "elbo_se", "ess", "khat", "num_samples")
    }
    row |= {"reasons": list(found.reasons), "advice": list(found.advice)}
    pyro.set_rng_seed(seed)
    if (resampled := redraw(guide, NUM_DRAWS)) is not None:
        again = errors(problem.coordinates(resampled), reference)
        row |= {f"resampled_{name}": value for name, value in again.items()}
        row["resampled_right"] = is_right(row, "resampled_")
    # Kilobytes, but bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return row | {"peak_mb": peak / (2**20 if sys.platform == "darwin" else 2**10)}


def say(row: Row) -> str:
    head = f"{row['kind']}, {row['form']}, seed {row['seed']}"
    if "error" in row:
        return f"{head}: {row['error']}"
    text = f"{head}: {'right' if row['right'] else 'wrong'}, {row['verdict']}, mean {mean_text(row)}, "
    return f"{text}sd {ratio_text(row)}, {number(row['seconds'])} s + {number(row['seconds_diagnose'])} s"


def mean_text(row: Row, prefix: str = "") -> str:
    return f"{number(row[f'{prefix}worst_mean'])} ({row[f'{prefix}worst_name']})"


def ratio_text(row: Row, prefix: str = "") -> str:
    ratio = worst_ratio(row, prefix)
    side = "low" if ratio == row[f"{prefix}sd_low"] else "high"
    return f"{number(ratio)} ({row[f'{prefix}sd_{side}_name']})"


# -- report --------------------------------------------------------------------------------------

HEAD = ("kind", "form", "seed", "draws", "verdict", "worst mean, sd", "worst sd ratio", "resampled", "k-hat")
HEAD += ("ESS", "fit, s (CPU)", "diagnose, s (CPU)", "peak MB")


def line(row: Row) -> list[str]:
    head = [row["kind"], row["form"], str(row["seed"])]
    if "error" in row:
        return [*head, row["error"], *["–"] * 9]
    return [
        *head,
        "right" if row["right"] else "wrong",
        row["verdict"],
        mean_text(row),
        ratio_text(row),
        ("right" if row["resampled_right"] else "wrong") if "resampled_right" in row else "–",
        number(row["khat"]),
        f"{number(row['ess'], 0)} of {row['num_samples']}",
        *(
            f"{number(row[f'seconds{of}'], 1)} ({number(row[f'cpu_seconds{of}'], 1)})"
            for of in ("", "_diagnose")
        ),
        number(row["peak_mb"], 0),
    ]


def summary(rows: list[Row]) -> list[list[str]]:
    """What is asked for and what was found; a run that failed is not right."""
    done = [row for row in rows if "error" not in row]
    right = sum(row["right"] for row in done)

    def count(is_right: bool, verdict: str) -> int:
        return sum(row["right"] is is_right and row["verdict"] == verdict for row in done)

    usable = sum(row["verdict"] == "usable" and row.get("resampled_right") is False for row in done)
    slow = sum(row["seconds"] > SECONDS for row in done)
    found = [
        ("right", f"{right} of {len(rows)}", "at least 80 %", right >= 0.8 * len(rows)),
        ("wrong and good", str(count(False, "good")), "0", not count(False, "good")),
        ("right and poor", str(count(True, "poor")), "0", not count(True, "poor")),
        (f"fits of more than {SECONDS:.0f} s", str(slow), "0", not slow),
        ("failed", str(len(rows) - len(done)), "0", len(rows) == len(done)),
    ]
    lines = [[what, number, asked, "+" if met else "-"] for what, number, asked, met in found]
    lines.append(["usable, and the resampled draws wrong", str(usable), "", ""])
    return lines


def verdicts(rows: list[Row]) -> list[list[str]]:
    """How many of the right and of the wrong fits have each verdict."""
    done = [row for row in rows if "error" not in row]
    return [
        [name, *(str(sum(r["right"] is is_right and r["verdict"] == v for r in done)) for v in VERDICTS)]
        for name, is_right in (("right", True), ("wrong", False))
    ]


def report(rows: list[Row]) -> None:
    order = {name: i for i, name in enumerate(KINDS)}
    rows = sorted(rows, key=lambda row: (order.get(row["kind"], len(order)), row["form"], row["seed"]))
    print(settings(rows))
    print(markdown(HEAD, map(line, rows)))
    print("\n" + markdown(["", *VERDICTS], verdicts(rows)))
    print("\n" + markdown(["of the runs", "found", "asked", ""], summary(rows)))
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    diagnosed = [row["seconds_diagnose"] for row in rows if "seconds_diagnose" in row]
    if seconds:
        middle = " and ".join(number(float(np.median(values)), 1) for values in (seconds, diagnosed))
        most = " and ".join(number(max(values), 1) for values in (seconds, diagnosed))
        print(f"\nSeconds of fit and of diagnose: {middle} in the median, {most} at most.")


# -- runs ----------------------------------------------------------------------------------------


def plan(kinds: list[str], forms: list[str], seeds: int) -> list[Row]:
    """The runs, in their order; the seeds come last, so that all kinds are seen early."""
    return [
        {"kind": kind, "form": form, "seed": seed}
        for seed in range(seeds)
        for kind in kinds
        for form in forms
        if form in KINDS[kind].forms
    ]


def add_references(kinds: list[str]) -> None:
    from benchmarks.common import hierarchical_numpyro

    for name in kinds:
        if name in read_truths(REFERENCE):
            continue
        row = hierarchical_numpyro.compute(KINDS[name])
        known = read_truths(REFERENCE)
        known = {kind: row if kind == name else known[kind] for kind in KINDS if kind in {*known, name}}
        lines = [f"{json.dumps(kind)}: {json.dumps(value)}" for kind, value in known.items()]
        REFERENCE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(name, {key: value for key, value in row.items() if key != "scalars"}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=[], help="names or their starts; default all")
    parser.add_argument("--forms", nargs="+", default=[], help="of plain and broadcasting; default both")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each form of each kind")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a run")
    parser.add_argument("--core", type=int, default=FIRST_CORE, help="core to run on; -1 for any")
    parser.add_argument("--output", type=Path, default=results_of("hierarchical"))
    parser.add_argument("--reference", action="store_true", help="run NUTS, and fit nothing")
    parser.add_argument("--report", type=Path, help="print tables of this file and run nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report is not None:
        report(read(options.report))
        return
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    if options.core >= 0:
        os.sched_setaffinity(0, {options.core})
    if options.one:
        print(json.dumps(attempt(json.loads(options.one), run_one)))
        return
    kinds = chosen(options.kinds, tuple(KINDS))
    if "PYRO_FLOWVI_POSTERIORDB" not in os.environ and set(kinds) & set(RADON):
        print("PYRO_FLOWVI_POSTERIORDB names no clone of posteriordb: the radon's kinds are skipped")
        kinds = [name for name in kinds if name not in RADON]
    if options.reference:
        # Before JAX is imported.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
        add_references(kinds)
        return
    keys = plan(kinds, chosen(options.forms, tuple(FORMS)), options.seeds)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    collect(keys, options.output, run_one, say, apart=True, timeout=options.limit)


if __name__ == "__main__":
    main()
