"""The benchmark of the time to a right posterior: which runs it makes, and what it reports of them."""

import math
from functools import partial

import numpy as np
import pyro
import pytest
import torch

from benchmarks.fits import time_to_right as bench

LIST = list(bench.MODELS)


def row(model, method, repeat, seconds, **more):
    scores = {"worst_mean": 0.05, "sd_low": 0.97, "sd_high": 1.04}
    if method == "fit":
        scores |= {"elbo": -7.0, "seconds_again": 0.5 * seconds, "same_again": True}
    key = {"model": model, "method": method, "repeat": repeat, "seed": repeat % bench.SEEDS}
    return {**key, "seconds": seconds, **scores, **more}


def test_the_methods_take_turns_model_by_model():
    keys = bench.plan(LIST, ["fit", "NUTS"], 5)
    assert len(keys) == 5 * (2 * len(LIST) - 1)
    assert [(k["model"], k["method"]) for k in keys[:3]] == [
        (LIST[0], "fit"),
        (LIST[0], "NUTS"),
        (LIST[1], "fit"),
    ]
    assert [key["seed"] for key in keys if key["model"] == LIST[0] and key["method"] == "fit"] == [
        0, 1, 2, 0, 1,
    ]  # fmt: skip


def test_targets():
    rows = [row(name, "fit", r, s) for name in bench.RECIPES for r, s in enumerate((1.0, 3.0, 1.8))]
    rows += [row(name, "NUTS", r, 10.0) for name in bench.RECIPES for r in range(3)]
    rows += [row(bench.PLAIN, "fit", 0, 12.0), row(bench.BROADCASTING, "fit", 0, 6.0)]
    rows[4] |= {"worst_mean": 0.11}
    groups = {
        (method, name): bench.Group([r for r in rows if (r["method"], r["model"]) == (method, name)])
        for method in bench.METHODS
        for name in bench.MODELS
    }
    found = [(what, value, met) for what, value, _, met in bench.targets(groups)]
    assert found == [
        ("seconds, median of the eight", "1.80", "+"),
        ("seconds, most of the eight", "1.80", "+"),
        ("ratio to NUTS, median", "0.18", "+"),
        ("ratio to NUTS, highest", "0.18", "+"),
        ("runs on the eight that are not right", "1", "-"),
        ("first fit of a process / second, median of the eight", "2.00", "-"),
        ("radon with a[county], seconds", "12.0", "+"),
        ("radon with a[county] / a[..., county]", "2.00", "-"),
    ]


@pytest.mark.parametrize("failed", [1, 2])
def test_a_failed_run_is_neither_right_nor_fast(failed):
    error = [
        {"model": LIST[0], "method": "fit", "repeat": r, "seed": r, "error": "No"} for r in range(failed)
    ]
    group = bench.Group([row(LIST[0], "fit", 2, 1.0), *error])
    assert math.isinf(group.seconds())
    assert group.right == f"1/{1 + failed}"


def test_runs_of_one_seed_are_to_be_the_same():
    rows = [row(LIST[0], "fit", repeat, 1.0, elbo=-7.0 - repeat % 3) for repeat in range(5)]
    assert bench.Group(rows).repeats_itself
    assert not bench.Group([*rows[:4], rows[4] | {"elbo": -7.5}]).repeats_itself
    assert not bench.Group([*rows[:4], rows[4] | {"same_again": False}]).repeats_itself


def test_report(capsys):
    bench.report([row(LIST[0], "fit", 0, 2.0), row(LIST[0], "NUTS", 0, 8.0)])
    lines = capsys.readouterr().out.splitlines()
    cells = "2.00 | 1.00 | 8.00 | 0.25 | 1/1 | 1/1 | 0.05 | 1.04 | -7.00 (0.00)"
    assert f"| {bench.SHORT[LIST[0]]} | {cells} |" in lines


@pytest.mark.long
@pytest.mark.parametrize("method", ["fit", "NUTS"])
def test_a_run_against_a_closed_form(method):
    """Prior N(0, 1) and one observation 2 of unit variance: N(1, 1/2), and p(y) = N(2; 0, 2)."""
    if method == "NUTS":
        pytest.importorskip("numpyro")

    def model(p, dist, y):
        p.sample("y", dist.Normal(p.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    def for_numpyro():
        import numpyro

        return partial(model, numpyro, numpyro.distributions), (2.0,)

    torch.set_default_dtype(torch.float64)
    reference = {"x": 1.0 + np.sqrt(0.5) * np.random.default_rng(0).normal(size=40_000)}
    for_pyro = partial(model, pyro, pyro.distributions), (torch.tensor(2.0),)
    problem = bench.Problem(*for_pyro, for_numpyro, bench.scalars, reference, 1000)
    found = (bench.run_fit if method == "fit" else bench.run_nuts)(problem, 0)
    assert bench.is_right(found)
    assert found["seconds"] > 0.0
    if method == "fit":
        assert found["elbo"] == pytest.approx(-1.0 - 0.5 * math.log(4.0 * math.pi), abs=0.01)
        assert found["same_again"]
