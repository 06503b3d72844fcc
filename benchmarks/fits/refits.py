"""Time and errors of fits that start from an earlier one, beside those of fresh fits.

    OMP_NUM_THREADS=1 python -m benchmarks.fits.refits [--models NAME ...] [--changes NAME ...] [--seeds 3]
        [--output benchmarks/results/refits.jsonl]
    python -m benchmarks.fits.refits --report benchmarks/results/refits.jsonl

The models: a *regression* of 1,000 answers, yes or no, on 20 columns; *groups*, 1,000 counts, each with a
rate of its own; *slopes*, 300 groups with an intercept and a slope under an LKJ prior.  The changes: *new
rows*, 5 % more rows or groups; *hyperparameters*, priors with half the width; *fold*, a fifth of the rows or
groups left out.

An earlier guide is fitted before the clock runs.  Then a fresh fit and a refit take turns, in one process
and with one thread, from the construction of ``AutoRealNVP`` to the end of ``fit``, at its defaults.

Errors are those of *right* in ``scoring.py``, of 20,000 draws: over the regression's coefficients, and over
the roots of the others, against the truth.  That is of importance-weighted draws of another fit
(``resample``, 10,000 of 40,000), whose k-hat is in the file.  Figures of the report are medians over seeds,
of errors the worst.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_flowvi
from benchmarks.common.results import Clock, Row, chosen, collect, read, results_of
from benchmarks.common.scoring import Array, accuracy, is_right, scalars, train_ours, worst_ratio
from benchmarks.common.tables import markdown, median, number

CHANGES = ("new rows", "hyperparameters", "fold")
NUM_DRAWS, NUM_TRUTH, EARLIER_SEED, TRUTH_SEED = 20_000, 10_000, 100, 101

Args = tuple[Tensor, ...]
Model = Callable[..., Any]


def regression(width: float) -> Model:
    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 5.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), width).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=a[..., None] + w @ x.T), obs=y)

    return model


def groups(width: float) -> Model:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(width))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Poisson(theta.exp()), obs=y)

    return model


def slopes(width: float) -> Model:
    def model(x: Tensor, y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        t = pyro.sample("t", dist.HalfNormal(width * torch.ones(2)).to_event(1))
        factor = pyro.sample("C", dist.LKJCholesky(2, 2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(width))
        with pyro.plate("groups", len(y)):
            ab = pyro.sample("ab", dist.MultivariateNormal(m, scale_tril=t[..., :, None] * factor))
            mean = ab[..., :1] + ab[..., 1:] * x
            pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)

    return model


def regression_data(rows: int) -> Args:
    x = torch.randn(rows, 20)
    logits = 0.5 + x @ torch.linspace(-1.0, 1.0, 20)
    return x, torch.bernoulli(torch.sigmoid(logits))


def groups_data(rows: int) -> Args:
    return (torch.poisson((1.0 + 0.7 * torch.randn(rows)).exp()),)


def slopes_data(rows: int) -> Args:
    x, noise = torch.randn(rows, 8), torch.randn(rows, 2)
    a, b = 1.0 + 0.8 * noise[:, :1], -0.5 + 0.5 * (0.87 * noise[:, 1:] - 0.5 * noise[:, :1])
    return x, a + b * x + torch.randn(rows, 8)


MODELS: dict[str, tuple[Callable[[float], Model], Callable[[int], Args], int]] = {
    "regression": (regression, regression_data, 1000),
    "groups": (groups, groups_data, 1000),
    "slopes": (slopes, slopes_data, 300),
}
LOCAL = ("theta", "ab")
WIDTH = 2.0


def roots(sites: dict[str, Tensor]) -> dict[str, Array]:
    """Of positive ones their logarithms, of the correlation its artanh."""
    positive = {name: sites[name].log() for name in ("tau", "t", "sigma") if name in sites}
    corr = {"C": sites["C"][:, 1, 0].atanh()} if "C" in sites else {}
    return scalars({n: v for n, v in (sites | positive | corr).items() if n not in LOCAL})


def problem(name: str, change: str | None) -> tuple[Model, Args]:
    """The model and its data, after a change or before any."""
    make, draw, size = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = draw(round(1.05 * size))
    rows = {"new rows": round(1.05 * size), "fold": round(0.8 * size)}.get(str(change), size)
    width = 0.5 * WIDTH if change == "hyperparameters" else WIDTH
    return make(width), tuple(values[:rows] for values in data)


_earlier: dict[str, Any] = {}
_truths: dict[tuple[str, str], tuple[dict[str, Array], float]] = {}


def earlier(name: str) -> Any:
    if name not in _earlier:
        _earlier[name] = train_ours("AutoRealNVP", *problem(name, None), EARLIER_SEED)[0]
    return _earlier[name]


def truth(name: str, change: str) -> tuple[dict[str, Array], float]:
    if (name, change) not in _truths:
        model, args = problem(name, change)
        guide, _ = train_ours("AutoRealNVP", model, args, TRUTH_SEED)
        khat = pyro_flowvi.diagnose(model, guide, *args, num_samples=4000, probes=False).khat
        _truths[name, change] = roots(guide.sample_posterior(NUM_TRUTH, resample=True)), float(khat)
    return _truths[name, change]


def run_one(key: Row) -> Row:
    model, args = problem(key["model"], key["change"])
    previous = earlier(key["model"])
    reference, khat = truth(key["model"], key["change"])
    result: Row = {"khat_of_truth": khat}
    for kind, options in (("fresh", {}), ("refit", {"init": previous})):
        clock = Clock()
        guide, fitted = train_ours("AutoRealNVP", model, args, key["seed"], **options)
        result |= {f"{kind}_{name}": value for name, value in clock.read().items()}
        result[f"{kind}_steps"] = len(fitted.losses)
        result[f"{kind}_start"] = fitted.start
        torch.manual_seed(key["seed"])
        result |= accuracy(roots(guide.sample_posterior(NUM_DRAWS)), reference, f"{kind}_")
        result[f"{kind}_loss"] = fitted.best_loss
    return result


def say(row: Row) -> str:
    head = f"{row['model']}, {row['change']}, seed {row['seed']}"
    if "error" in row:
        return f"{head}: {row['error']}"
    share = row["refit_seconds"] / row["fresh_seconds"]
    error = f"mean {number(row['refit_worst_mean'], 3)} sd ratio {number(worst_ratio(row, 'refit_'), 3)}"
    seconds = [number(row[f"{kind}_seconds"]) for kind in ("fresh", "refit")]
    return f"{head}: {seconds[0]} s, refit {seconds[1]} s ({share:.0%}), {error}"


def line(rows: list[Row]) -> list[str]:
    """One of the table."""

    def worst(kind: str) -> list[str]:
        mean = max(row.get(f"{kind}_worst_mean") or math.inf for row in rows)
        ratio = max((worst_ratio(row, f"{kind}_") for row in rows), key=lambda value: abs(math.log(value)))
        return [number(mean), number(ratio)]

    fresh, again = (median([row.get(f"{kind}_seconds") for row in rows]) for kind in ("fresh", "refit"))
    right = sum(is_right(row, "refit_") for row in rows)
    share = median([row["refit_seconds"] / row["fresh_seconds"] for row in rows])
    steps = median([row["refit_steps"] for row in rows])
    figures = [number(fresh), number(again), f"{share:.0%}", f"{steps:.0f}", *worst("fresh"), *worst("refit")]
    return [rows[0]["model"], rows[0]["change"], *figures, f"{right}/{len(rows)}"]


def report(rows: list[Row]) -> None:
    good = [row for row in rows if "error" not in row]
    head = ["model", "change", "fresh, s", "refit, s", "refit / fresh", "steps", "mean, sd", "sd ratio"]
    head += ["refit: mean, sd", "sd ratio", "right"]
    found = [
        [row for row in good if (row["model"], row["change"]) == (name, change)]
        for name in MODELS
        for change in CHANGES
    ]
    print(markdown(head, [line(group) for group in found if group]))
    print("".join(f"\n- {say(row)}" for row in rows if "error" in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[], help="names or their starts; default all")
    parser.add_argument("--changes", nargs="+", default=[], help="names or their starts; default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=results_of("refits"))
    parser.add_argument("--report", type=Path, help="print the table of this file and run nothing")
    options = parser.parse_args()
    if options.report is not None:
        report(read(options.report))
        return
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    keys = [
        {"model": name, "change": change, "seed": seed}
        for name in chosen(options.models, tuple(MODELS))
        for change in chosen(options.changes, CHANGES)
        for seed in range(options.seeds)
    ]
    collect(keys, options.output, run_one, say)
    report(read(options.output))


if __name__ == "__main__":
    main()
