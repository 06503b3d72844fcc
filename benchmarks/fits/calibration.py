"""Simulation-based calibration of ``AutoRealNVP`` at its defaults, and of what ``diagnose`` calls good.

    OMP_NUM_THREADS=1 python -m benchmarks.fits.calibration [--models NAME ...] [--parts 10]
        [--output benchmarks/results/calibration.jsonl]
    python -m benchmarks.fits.calibration --report benchmarks/results/calibration.jsonl
        [--figures FOLDER]

The models: *schools*, eight schools, centred; *counts*, Poisson counts of 60 rows in 12 groups, ``a[group]``;
*logistic*, answers, yes or no, of 100 rows with five columns.  Each part is ten data sets of the model's own
prior, with a fit, 1,000 draws and a verdict of each; ten parts, 100 fits.

The report has, for all fits of a model and for those of each verdict, the smallest p value, adjusted for the
number of scalars: below 0.05 in one of twenty lines at most where the guides are the posteriors.  Then the
p value of the joint log density by itself, and the seconds of a fit and its verdict.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.common.results import Clock, Row, chosen, collect, read, results_of
from benchmarks.common.tables import markdown, median, number
from pyro_flowvi import AutoRealNVP, Calibration, sbc
from pyro_flowvi.datasets import EIGHT_SCHOOLS

FITS, NUM_SAMPLES = 10, 1000
VERDICTS = ("good", "usable", "poor")
Args = tuple[Tensor, ...]


def schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def counts(group: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(1.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", int(group.max()) + 1):
        a = pyro.sample("a", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(a[group].exp()), obs=y)


def logistic(x: Tensor, y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.5))
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.5).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=a[..., None] + w @ x.T), obs=y)


def schools_args() -> Args:
    return tuple(torch.as_tensor(EIGHT_SCHOOLS[name]) for name in ("y", "sigma"))


def counts_args() -> Args:
    return torch.arange(60) // 5, torch.zeros(60)


def logistic_args() -> Args:
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    return x, torch.zeros(100)


MODELS: dict[str, tuple[Callable[..., None], Callable[[], Args]]] = {
    "schools": (schools, schools_args),
    "counts": (counts, counts_args),
    "logistic": (logistic, logistic_args),
}


def run(key: Row) -> Row:
    model, args = MODELS[key["model"]]
    clock = Clock()
    found = sbc(
        model,
        AutoRealNVP,
        *args(),
        num=FITS,
        num_samples=NUM_SAMPLES,
        verdicts=True,
        seed=key["part"],
        progress=False,
    )
    return {
        **clock.read(),
        "verdicts": found.verdicts,
        "failures": [why for _, why in found.failures],
        "notes": found.notes,
        "ranks": {name: ranks.tolist() for name, ranks in found.ranks.items()},
    }


def joined(rows: list[Row]) -> Calibration:
    """The parts of one model as one calibration."""
    verdicts = tuple(verdict for row in rows for verdict in row["verdicts"])
    failures = tuple((FITS * row["part"] + i, why) for row in rows for i, why in enumerate(row["failures"]))
    ranks = {
        name: np.concatenate([np.array(row["ranks"][name], dtype=np.int64) for row in rows])
        for name in rows[0]["ranks"]
    }
    notes: Counter[str] = Counter()
    for row in rows:
        notes.update(row["notes"])
    return Calibration(ranks, NUM_SAMPLES, FITS * len(rows), verdicts, failures, dict(notes))


def by_model(rows: list[Row]) -> dict[str, tuple[Calibration, list[float]]]:
    rows = [row for row in rows if "ranks" in row]
    return {
        name: (joined(own), [row["seconds"] / FITS for row in own])
        for name in MODELS
        if (own := sorted((row for row in rows if row["model"] == name), key=lambda row: row["part"]))
    }


def line(name: str, which: str, found: Calibration, seconds: str) -> list[str]:
    worst, p = next(iter(found.adjusted().items()))
    density = number(found.scalars["log density"][0], 3) if "log density" in found.scalars else "–"
    return [name, which, str(len(found)), f"{number(p)} ({worst})", density, found.verdict, seconds]


def report(path: Path) -> str:
    lines = []
    for name, (found, seconds) in by_model(read(path)).items():
        lines.append(line(name, "all", found, number(median(seconds), 1)))
        lines += [
            line(name, verdict, found.among(verdict), "") for verdict in VERDICTS if len(found.among(verdict))
        ]
    head = ["model", "fits", "number", "smallest adjusted p", "p of the log density", "calibrated?", "s"]
    return markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--parts", type=int, default=10)
    parser.add_argument("--output", type=Path, default=results_of("calibration"))
    parser.add_argument("--report", type=Path)
    parser.add_argument("--figures", type=Path)
    options = parser.parse_args()
    if options.report is not None:
        print(report(options.report))
        if options.figures is not None:
            for name, (found, _) in by_model(read(options.report)).items():
                found.plot()[0, 0].figure.savefig(options.figures / f"calibration_{name}.png", dpi=120)
        return
    keys = [
        {"model": name, "part": part}
        for name in chosen(options.models, tuple(MODELS))
        for part in range(options.parts)
    ]

    def say(row: Row) -> str:
        told: Any = row.get("error") or f"{row['seconds']:.0f} s, {dict(Counter(row['verdicts']))}"
        return f"{row['model']} {row['part']}: {told}"

    collect(keys, options.output, run, say)


if __name__ == "__main__":
    main()
