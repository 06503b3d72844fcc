"""The benchmark of hierarchical models: its forms, NUTS on them, its references, a run and its report."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample

from benchmarks.common import structured_truths as truths
from benchmarks.common.hierarchical_models import KINDS
from benchmarks.common.structured_problem import Data
from benchmarks.fits import hierarchical as bench


@pytest.fixture(autouse=True)
def _float64():
    """As the benchmark has it, whatever the default type is."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture(autouse=True)
def _radon(monkeypatch):
    """Made-up houses, since the radon's data are elsewhere."""

    def houses():
        data = Data(0)
        county, floor = data.integers(0, 85, 200), data.integers(0, 2, 200).double()
        return county, floor, 1.0 - 0.6 * floor + 0.7 * data.normal(200)

    for name in bench.RADON:
        kind = KINDS[name]
        monkeypatch.setitem(KINDS, name, replace(kind, data=houses))


def drawn(problem):
    """A draw of the latents from the prior, and the trace that it is in."""
    pyro.set_rng_seed(0)
    trace = poutine.trace(problem.model).get_trace(*problem.args)
    sites = [s for s in trace.stochastic_nodes if not isinstance(trace.nodes[s]["fn"], _Subsample)]
    return {site: trace.nodes[site]["value"] for site in sites}, trace


@pytest.mark.parametrize("name", KINDS)
def test_both_forms_have_one_density(name):
    kind = KINDS[name]
    values, trace = drawn(kind.problem("broadcasting"))
    for form in kind.forms:
        problem = kind.problem(form)
        other = poutine.trace(poutine.condition(problem.model, data=values)).get_trace(*problem.args)
        torch.testing.assert_close(other.log_prob_sum(), trace.log_prob_sum())


@pytest.mark.parametrize("name", KINDS)
def test_the_broadcasting_form_broadcasts(name):
    """The log densities of three draws at once are those one by one."""
    problem = KINDS[name].problem("broadcasting")
    pyro.set_rng_seed(0)

    def three(*args):
        with pyro.plate("particles", 3, dim=-2):
            problem.model(*args)

    trace = poutine.trace(three).get_trace(*problem.args)
    trace.compute_log_prob()
    sites = [s for s in trace.stochastic_nodes if not isinstance(trace.nodes[s]["fn"], _Subsample)]
    total = sum(trace.nodes[s]["log_prob"].sum(-1) for s in (*sites, *trace.observation_nodes))
    for i in range(3):
        values = {}
        for site in sites:
            node = trace.nodes[site]
            value = node["value"][i]
            # A site outside of the model's plates has a 1 where they would be.
            if node["fn"].batch_shape[-1] == 1:
                value = value.squeeze(-1 - node["fn"].event_dim)
            values[site] = value
        one = poutine.trace(poutine.condition(problem.model, data=values)).get_trace(*problem.args)
        torch.testing.assert_close(total[i], one.log_prob_sum())


@pytest.mark.parametrize("name", KINDS)
def test_nuts_runs_on_the_same_density(name):
    pytest.importorskip("numpyro")
    import jax.numpy as jnp
    from numpyro.infer.util import log_density

    from benchmarks.common import hierarchical_numpyro

    kind = KINDS[name]
    problem = kind.problem("broadcasting")
    values, trace = drawn(problem)
    params = {site: jnp.asarray(value.numpy()) for site, value in values.items()}
    program = hierarchical_numpyro.program(kind)
    found, _ = log_density(program, hierarchical_numpyro.arrays(problem.args), {}, params)
    assert float(found) == pytest.approx(float(trace.log_prob_sum()), rel=1e-9)


def test_the_references_are_of_what_is_compared():
    known = truths.read_truths(bench.REFERENCE)
    assert list(known) == list(KINDS)
    for name, row in known.items():
        problem = KINDS[name].problem("broadcasting")
        sites = {site: value.unsqueeze(0) for site, value in drawn(problem)[0].items()}
        assert problem.coordinates(sites).keys() == row["scalars"].keys()
        assert row["rhat"] < 1.01
        assert row["ess"] > 1000
        for _, sd, *errors in row["scalars"].values():
            assert max(errors) < 0.05 * sd


def test_the_reference_of_eight_schools_is_that_of_quadrature():
    exact = truths.read_truths()["eight schools"]["scalars"]
    for name, (mean, sd, mean_error, sd_error) in truths.read_truths(bench.REFERENCE)["eight schools"][
        "scalars"
    ].items():
        assert mean == pytest.approx(exact[name][0], abs=4.0 * mean_error)
        assert sd == pytest.approx(exact[name][1], abs=4.0 * sd_error)


@pytest.mark.long
def test_the_reference_of_autoregressions_is_that_of_the_integrated_model():
    """The units' effects are integrated in closed form, and the rest weighted."""
    unit, lag, y = KINDS["autoregressions"].data()
    design = torch.stack([torch.ones_like(lag), lag], -1)
    pieces = design[:, :, None] * design[:, None], design * y[:, None], y.square(), torch.ones_like(y)
    data = [piece.new_zeros(unit.max() + 1, *piece.shape[1:]).index_add(0, unit, piece) for piece in pieces]

    def given(u):
        m, scales = u[:, :2], u[:, 2:].exp()
        log_p, *moments = truths.grouped_regression(m, torch.diag_embed(scales[:, :2]), scales[:, 2], *data)
        log_p = log_p + dist.Normal(0.0, torch.tensor([2.0, 1.0])).log_prob(m).sum(-1)
        log_p = log_p + truths.log_prior(scales, dist.HalfNormal(torch.tensor([1.0, 0.5, 1.0]))).sum(-1)
        return log_p, *({"c": value[..., 0], "r": value[..., 1]} for value in moments)

    names = ("mc", "mr", "log tc", "log tr", "log sigma")
    exact = truths.Marginal(names, given, start=-0.5, num_weighted=100_000).moments()["scalars"]
    reference = truths.read_truths(bench.REFERENCE)["autoregressions"]["scalars"]
    assert exact.keys() == reference.keys()
    for name, (mean, sd, mean_error, sd_error) in reference.items():
        assert mean == pytest.approx(exact[name][0], abs=4.0 * mean_error)
        assert sd == pytest.approx(exact[name][1], abs=4.0 * sd_error)


@pytest.mark.long
@pytest.mark.parametrize("form", ["plain", "broadcasting"])
def test_a_run(form):
    name = "meta-analysis"
    key = {"kind": name, "form": form, "seed": 0}
    row = key | bench.fit_one(key, truths.read_truths(bench.REFERENCE)[name], num_steps=5)
    assert row["steps"] == 5
    assert row["verdict"] in bench.VERDICTS
    assert row["resampled_sd_low"] <= row["resampled_sd_high"]
    assert row["peak_mb"] > 50.0
    assert len(bench.line(row)) == len(bench.HEAD)
    assert bench.say(row).startswith(f"meta-analysis, {form}, seed 0: ")


def row(form, seed, right, verdict, **more):
    key = {"kind": "poll", "form": form, "seed": seed, "right": right, "verdict": verdict}
    scores = {"worst_mean": 0.05, "worst_name": "mu", "sd_low": 0.8, "sd_low_name": "log t_age"}
    scores |= {"sd_high": 1.1, "sd_high_name": "beta", "resampled_right": True, "khat": 0.4, "ess": 2000.0}
    scores |= {"num_samples": 4000, "seconds": 9.0, "cpu_seconds": 8.0, "peak_mb": 500.0}
    scores |= {"seconds_diagnose": 3.0, "cpu_seconds_diagnose": 2.5}
    return {**key, **scores, "setting": "here", **more}


def test_report(capsys):
    rows = [
        row("plain", 0, True, "good"),
        row("plain", 1, True, "poor", seconds=61.0),
        row("plain", 2, False, "good"),
        row("broadcasting", 0, False, "usable", resampled_right=False),
        {"kind": "poll", "form": "broadcasting", "seed": 1, "error": "stopped after 600 s"},
    ]
    bench.report(rows)
    text = capsys.readouterr().out
    assert "| poll | plain | 0 | right | good | 0.05 (mu) | 0.80 (log t_age) | right | 0.40 |" in text
    assert "| right | 1 | 0 | 1 |" in text
    assert "| wrong | 1 | 1 | 0 |" in text
    for line in (
        "| right | 2 of 5 | at least 80 % | - |",
        "| wrong and good | 1 | 0 | - |",
        "| right and poor | 1 | 0 | - |",
        "| fits of more than 60 s | 1 | 0 | - |",
        "| failed | 1 | 0 | - |",
        "| usable, and the resampled draws wrong | 1 |",
    ):
        assert line in text


def test_a_kind_without_an_index_has_one_form():
    keys = bench.plan(["eight schools", "raters"], ["plain", "broadcasting"], 2)
    assert [(key["kind"], key["form"], key["seed"]) for key in keys] == [
        (kind, form, seed)
        for seed in (0, 1)
        for kind, form in (("eight schools", "broadcasting"), ("raters", "plain"), ("raters", "broadcasting"))
    ]
