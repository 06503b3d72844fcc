"""The benchmark of minibatches: its models, their posteriors, its peers, its report."""

import json
import math
from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.distributions import HalfNormal, Normal, Poisson

from benchmarks.common import digits_vae, structured_truths
from benchmarks.common import minibatch_models as models
from benchmarks.common import minibatch_report as told
from benchmarks.common import minibatch_truths as truths
from benchmarks.fits import minibatches as bench
from tests.benchmarks.test_structured import latents


@pytest.fixture(autouse=True)
def _float64():
    """As the benchmark has it, whatever the default type is."""
    torch.set_default_dtype(torch.float64)


BY_PLATE = {
    "normal groups": partial(models.groups, 12, "normal", 4),
    "Poisson groups": partial(models.groups, 12, "Poisson", 4),
    "binomial groups": partial(models.groups, 12, "binomial", 4),
    "slopes": partial(models.slopes, 12, 4),
    "logistic regression": partial(models.logistic, 12, 3, 4),
}
BY_ARGUMENTS = {
    "by index": partial(models.groups, 12, "normal", 4, by_index=True),
    "counts": partial(models.counts_by_arguments, 12, 4),
    "loader": partial(models.logistic, 12, 3, 4, loader=True),
}


def parts_of(task, name):
    """The model on each row once: programs and their arguments."""
    if name in BY_PLATE:
        plate = "rows" if "logistic" in name else models.PLATE
        for rows in task.rows():
            yield poutine.condition(task.problem.model, {plate: rows}), task.problem.args, rows
        return
    for rows in task.rows():
        args = (*task.problem.args, rows) if name == "by index" else tuple(d[rows] for d in task.problem.args)
        yield task.problem.model, args, rows


@pytest.mark.parametrize("name", BY_PLATE | BY_ARGUMENTS)
def test_minibatches_add_up_to_the_full_model(name):
    task = (BY_PLATE | BY_ARGUMENTS)[name]()
    pyro.set_rng_seed(0)
    trace = poutine.trace(task.full.model).get_trace(*task.full.args)
    values = {site: trace.nodes[site]["value"] for site in latents(trace)}
    total = 0.0
    for model, args, rows in parts_of(task, name):
        own = {site: value[rows] if site in task.locals else value for site, value in values.items()}
        total += poutine.trace(poutine.condition(model, own)).get_trace(*args).log_prob_sum()
    torch.testing.assert_close(total / (task.size // task.batch), trace.log_prob_sum())


@pytest.mark.parametrize("name", BY_ARGUMENTS)
def test_an_epoch_has_each_row_once(name):
    task = BY_ARGUMENTS[name]()
    batches = iter(task.batches(3))
    for _ in range(2 if name != "loader" else 1):
        seen = torch.cat([next(batches)[-1] for _ in range(3)])
        whole = torch.arange(12) if name == "by index" else task.problem.args[-1]
        assert seen.flatten().sort().values.equal(whole.flatten().sort().values)


def test_the_truth_has_the_roots_of_all_tasks():
    known = truths.read_truths()
    for name, task in models.TASKS.items():
        if name in told.TARGETS and "1,000,000" not in name and "regression" not in name:
            problem = task().full
            pyro.set_rng_seed(0)
            trace = poutine.trace(problem.model).get_trace(*problem.args)
            sites = {site: trace.nodes[site]["value"].unsqueeze(0) for site in problem.roots}
            assert problem.of_roots(sites).keys() <= known[problem.truth]["scalars"].keys()
    assert len(known["logistic regression"]["scalars"]) == 51
    assert all(row.get("ess", 1e4) > 1000 for row in truths.own_truths().values())


@pytest.mark.parametrize("name", ["normal groups", "slopes"])
def test_marginals_of_roots_are_those_with_the_locals(name):
    problem = BY_PLATE[name]().problem
    points = 0.3 * torch.randn(5, 6 if name == "slopes" else 2, generator=torch.Generator().manual_seed(0))
    own = {"slopes": truths.slopes, "normal groups": truths.normal_groups}[name](problem)
    other = {"slopes": structured_truths.slopes, "normal groups": structured_truths.normal_groups}[name](
        problem
    )
    assert own.names == other.names
    torch.testing.assert_close(own.given(points)[0], other.given(points)[0])


def test_quadrature_of_repeated_counts():
    task = models.counts_by_arguments(12, 4)
    (y,), mu, tau = task.problem.args, 0.7, 0.8
    found, means, variances = truths.repeated_counts(task.problem).given(torch.tensor([[mu, math.log(tau)]]))
    grid = torch.linspace(-8.0, 8.0, 4001)

    def joint(counts):
        terms = Poisson(grid.exp()[:, None, None]).log_prob(counts).sum(-1)
        return (terms + Normal(mu, tau).log_prob(grid)[:, None]).exp()

    roots = Normal(0.0, 5.0).log_prob(torch.tensor(mu)) + HalfNormal(2.0).log_prob(torch.tensor(tau))
    expected = torch.trapezoid(joint(y), grid, dim=0).log().sum() + roots + math.log(tau)
    torch.testing.assert_close(found[0], expected, rtol=1e-7, atol=0.0)
    new = joint(models.counts(truths.NEW_GROUPS, truths.NEW_SEED))
    shares = new / torch.trapezoid(new, grid, dim=0)
    mean = torch.trapezoid(shares * grid[:, None], grid, dim=0)
    variance = torch.trapezoid(shares * (grid[:, None] - mean).square(), grid, dim=0)
    torch.testing.assert_close(means["new theta"][0], mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variances["new theta"][0], variance, rtol=1e-4, atol=0.0)


def test_weighted_draws_of_a_regression():
    problem = models.logistic(40, 1, 4).problem
    found = truths.regression(problem)
    axis = torch.linspace(-4.0, 4.0, 401)
    b, w = torch.meshgrid(axis, axis, indexing="ij")
    x, y = problem.args
    logits = b[..., None] + w[..., None] * x[:, 0]
    log_p = torch.distributions.Bernoulli(logits=logits).log_prob(y).sum(-1)
    log_p = log_p + Normal(0.0, 2.0).log_prob(b) + Normal(0.0, 1.0).log_prob(w)
    shares = log_p.flatten().softmax(0).reshape(log_p.shape)
    assert found["log_z"] == pytest.approx(float(log_p.logsumexp((0, 1)) + 2 * math.log(0.02)), abs=0.02)
    for name, value in (("b", b), ("w[1]", w)):
        mean = float((shares * value).sum())
        sd = float((shares * (value - mean).square()).sum().sqrt())
        assert found["scalars"][name] == pytest.approx([mean, sd], abs=0.02)


@pytest.mark.parametrize("method", ["list", "normal"])
@pytest.mark.parametrize("name", ["normal groups", "logistic regression"])
def test_peers_run(monkeypatch, name, method):
    task = BY_PLATE[name]
    monkeypatch.setattr(bench, "TASKS", {"small": task})
    problem = task().problem
    scalars = {scalar: [0.0, 1.0] for scalar in ("mu", "log tau", "b", "w[1]", "w[2]", "w[3]")}
    monkeypatch.setattr(bench, "read_truths", lambda: {problem.truth: {"scalars": scalars}})
    row = bench.posterior({"model": "small", "method": method, "seed": 0, "steps": 4})
    assert row["taken"] == 4
    assert row["passes"] == pytest.approx(4 * 4 / 12)
    assert math.isfinite(row["worst_mean"])
    assert row["worst_name"] in scalars


def test_the_bound_of_all_rows_is_that_of_the_full_model():
    """The guide's draws are all but points: the bound is the density there, and the entropy."""
    task = BY_PLATE["normal groups"]()

    def guide(y, known):
        pyro.sample("mu", pyro.distributions.Normal(1.0, 1e-9))
        pyro.sample("tau", pyro.distributions.LogNormal(0.0, 1e-9))
        with pyro.plate(models.PLATE, len(y), subsample_size=task.batch) as rows:
            pyro.sample("theta", pyro.distributions.Normal(y[rows], 1e-9))

    found = bench.elbo(task, guide, draws=2000)
    y, noise = task.problem.args
    point = {"mu": torch.tensor(1.0), "tau": torch.tensor(1.0), "theta": y}
    trace = poutine.trace(poutine.condition(task.full.model, point)).get_trace(y, noise)
    entropy = (2 + len(y)) * (0.5 * math.log(2.0 * math.pi * math.e) + math.log(1e-9))
    assert found == pytest.approx(float(trace.log_prob_sum()) + entropy, abs=1.0)


def test_the_vae_has_the_bound_of_its_formula():
    torch.manual_seed(0)
    pyro.clear_param_store()
    vae = digits_vae.VAE(6, 2, 5).double()
    x = torch.bernoulli(torch.full((4, 6), 0.5))
    loc, log_scale = vae.encoder(x).chunk(2, -1)
    divergence = torch.distributions.kl_divergence(Normal(loc, log_scale.exp()), Normal(0.0, 1.0)).sum()
    z = loc + log_scale.exp() * torch.randn(20_000, 4, 2)
    logits = vae.decoder(z)
    fit = -torch.nn.functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    elbo = Trace_ELBO(20_000, vectorize_particles=True, max_plate_nesting=1)
    expected = float((fit.sum((-2, -1)).mean() - divergence).detach())
    assert -elbo.loss(vae.model, vae.guide, x) == pytest.approx(expected, abs=0.1)


def row(method, seed, **more):
    scores = {"worst_mean": 0.05, "worst_name": "mu", "sd_low": 0.97, "sd_high": 1.04, "elbo": -7.0}
    key = {"model": "2,000 Poisson groups", "method": method, "seed": seed, "steps": None}
    costs = {"seconds": 2.0, "mebibytes": 100.0, "taken": 30, "passes": 3.0}
    return {**key, **scores, **costs, "truth": "2,000 Poisson groups", "setting": "here", **more}


def test_targets(monkeypatch):
    monkeypatch.setitem(
        told.TARGETS, "2,000 Poisson groups", told.Target(0.1, (0.98, 1.07), 2.0, 50.0, below=0.1)
    )
    rows = {"ours": [row("ours", seed, seconds=seconds) for seed, seconds in enumerate((1.0, 9.0, 3.0))]}
    found = [tuple(line[1:3]) + (line[4],) for line in told.check("2,000 Poisson groups", rows, -6.95)]
    assert found == [
        ("worst mean of the roots, sd", "0.050", "+"),
        ("lowest sd ratio", "0.970", "-"),
        ("highest sd ratio", "1.040", "+"),
        ("seconds", "3.000", "-"),
        ("MiB", "100.00", "-"),
        ("log p(y) - ELBO", "0.050", "+"),
    ]
    vaes = {name: [{"bound": bound}] for name, bound in (("ours", -20.0), ("by hand", -21.0))}
    assert [line[2:] for line in told.check("VAE on digits", vaes, None)] == [["-20.00", "at least -21", "+"]]


def test_report_and_figure(capsys, tmp_path):
    failed = {"model": "20,000 slopes", "method": "ours", "seed": 0, "steps": None, "error": "stopped"}
    rows = [row("ours", 0), row("list", 0, worst_mean=30.0), failed]
    rows += [row("ours", 0, steps=steps, passes=steps / 10, worst_mean=1.0 / steps) for steps in (1, 30, 100)]
    rows = [json.loads(json.dumps(line)) for line in rows]
    told.report(rows)
    text = capsys.readouterr().out
    assert (
        "| 2,000 Poisson groups | ours | 2.00 | 100 | 30 | 3.00 | 0.050 (mu) | 0.97 to 1.04 | -7.00 |" in text
    )
    assert "- ours on 20,000 slopes: stopped" in text
    pytest.importorskip("matplotlib")
    told.draw(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_plan():
    keys = bench.plan(["20,000 slopes", "VAE on digits"], list(bench.METHODS), 1, curve=False)
    assert [(key["model"][:3], key["method"]) for key in keys] == [
        *(("20,", method) for method in ("ours", "full", "list", "normal")),
        *(("VAE", method) for method in ("ours", "by hand")),
    ]
    curve = bench.plan(["2,000 Poisson groups"], ["ours"], 1, curve=True)
    assert [key["steps"] for key in curve] == list(bench.BUDGETS)
