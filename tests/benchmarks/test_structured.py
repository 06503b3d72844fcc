"""The benchmark of structured guides: its models, their posteriors with the locals integrated, its report."""

import math
from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample

from benchmarks.common import structured_models as models
from benchmarks.common import structured_truths as truths
from benchmarks.fits import structured as bench
from benchmarks.fits.structured import Target


@pytest.fixture(autouse=True)
def _float64():
    """As the benchmark has it, whatever the default type is."""
    torch.set_default_dtype(torch.float64)


def radon(num_houses=300):
    data = models.Data(0)
    county, floor = data.integers(0, 85, num_houses), data.integers(0, 2, num_houses).double()
    y = 1.0 + 0.4 * data.normal(85)[county] - 0.6 * floor + 0.7 * data.normal(num_houses)
    return models.radon_slopes_of(county, floor, y)


GAUSSIAN = {
    "eight schools": models.eight_schools,
    "normal groups": partial(models.groups, 20, "normal"),
    "slopes in a plate": partial(models.slopes_in_a_plate, 10),
    "slopes by row": partial(models.slopes_by_row, 10),
    "three levels": partial(models.three_levels, 4, 3, 2),
    "radon slopes": radon,
    "walk in a loop": partial(models.walk_in_a_loop, 12),
    "walk at once": partial(models.walk_at_once, 12),
}


def marginal_of(problem):
    name = "100 normal groups" if "normal" in problem.truth else problem.truth
    return truths.MARGINALS[name](problem)


def site_values(problem, u, names):
    """Values of the hyperparameters that the marginal has as coordinates, and the log Jacobian."""
    values, log_det = {}, torch.zeros(())
    for name, kind in problem.roots.items():
        full = f"{kind} {name}".strip()
        parts = [value for key, value in zip(names, u, strict=True) if key.split("[")[0] == full]
        if not parts:
            continue
        value = torch.stack(parts) if len(parts) > 1 else parts[0]
        if kind == "log":
            values[name], log_det = value.exp(), log_det + value.sum()
        elif kind == "artanh":
            rho = value.tanh()
            rest = (1.0 - rho**2).sqrt()
            zero = torch.zeros(())
            values[name] = torch.stack([torch.stack([1.0 + zero, zero]), torch.stack([rho, rest])])
            log_det = log_det + (1.0 - rho**2).log()
        else:
            values[name] = value
    return values, log_det


def latents(trace):
    return [site for site in trace.stochastic_nodes if not isinstance(trace.nodes[site]["fn"], _Subsample)]


@pytest.mark.parametrize("name", GAUSSIAN)
def test_the_marginal_is_the_integral_of_the_model(name):
    """The log joint is quadratic in the locals: log ∫ exp is its maximum and the determinant there."""
    problem = GAUSSIAN[name]()
    marginal = marginal_of(problem)
    u = 0.3 * torch.randn(len(marginal.names), generator=torch.Generator().manual_seed(0))
    fixed, log_det = site_values(problem, u, marginal.names)
    trace = poutine.trace(poutine.condition(problem.model, data=fixed)).get_trace(*problem.args)
    shapes = {site: trace.nodes[site]["value"].shape for site in latents(trace)}
    sizes = [math.prod(shape) for shape in shapes.values()]

    def log_joint(z):
        parts = z.split(sizes)
        values = {s: part.reshape(shape) for (s, shape), part in zip(shapes.items(), parts, strict=True)}
        model = poutine.condition(problem.model, data={**fixed, **values})
        return poutine.trace(model).get_trace(*problem.args).log_prob_sum() + log_det

    zero = torch.zeros(sum(sizes))
    hessian = torch.autograd.functional.hessian(log_joint, zero)
    gradient = torch.autograd.functional.jacobian(log_joint, zero)
    mode = torch.linalg.solve(-hessian, gradient)
    expected = log_joint(mode) + 0.5 * len(zero) * math.log(2 * math.pi) - 0.5 * torch.logdet(-hessian)
    found, means, variances = marginal.given(u.unsqueeze(0))
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)

    sites = dict(zip(shapes, mode.split(sizes), strict=True))
    spread = dict(zip(shapes, torch.inverse(-hessian).diagonal().split(sizes), strict=True))
    for site in means.keys() & shapes.keys():
        torch.testing.assert_close(means[site].flatten(), sites[site])
        torch.testing.assert_close(variances[site].flatten(), spread[site])


@pytest.mark.parametrize("likelihood", ["Poisson", "binomial"])
def test_quadrature_of_counts(likelihood):
    problem = models.groups(30, likelihood)
    name = f"2,000 {likelihood} groups"
    problem = models.Problem(name, problem.model, problem.args, problem.roots, problem.locals)
    mu, log_tau = 0.7, -0.2
    found, means, variances = truths.MARGINALS[name](problem).given(torch.tensor([[mu, log_tau]]))
    grid, log_terms = torch.linspace(-9.0, 9.0, 2001), []
    for value in grid:
        fixed = {"mu": torch.tensor(mu), "tau": torch.tensor(log_tau).exp(), "theta": value.expand(30)}
        trace = poutine.trace(poutine.condition(problem.model, data=fixed)).get_trace(*problem.args)
        trace.compute_log_prob()
        log_terms.append(trace.nodes["theta"]["log_prob"] + trace.nodes["y"]["log_prob"])
        roots = trace.nodes["mu"]["log_prob"] + trace.nodes["tau"]["log_prob"] + log_tau
    terms = torch.stack(log_terms).exp()
    total = torch.trapezoid(terms, grid, dim=0)
    mean = torch.trapezoid(terms * grid[:, None], grid, dim=0) / total
    variance = torch.trapezoid(terms * (grid[:, None] - mean).square(), grid, dim=0) / total
    torch.testing.assert_close(found[0], total.log().sum() + roots, rtol=1e-7, atol=0.0)
    torch.testing.assert_close(means["theta"][0], mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variances["theta"][0], variance, rtol=1e-4, atol=0.0)


def test_the_truth_has_what_the_problems_compare():
    known = truths.read_truths()
    for name, make in models.MODELS.items():
        if name != "radon slopes":  # its data are elsewhere
            problem = make()
            pyro.set_rng_seed(0)
            trace = poutine.trace(problem.model).get_trace(*problem.args)
            sites = {s: trace.nodes[s]["value"].unsqueeze(0) for s in latents(trace)}
            if problem.truth in known:
                assert problem.coordinates(sites).keys() <= known[problem.truth]["scalars"].keys()
    for row in known.values():
        assert row.get("rhat", 1.0) < 1.01
        assert row.get("ess", 1e4) > 400


def test_forms_of_one_model_have_one_density():
    plate, rows = models.slopes_in_a_plate(6), models.slopes_by_row(6)
    pyro.set_rng_seed(0)
    trace = poutine.trace(plate.model).get_trace(*plate.args)
    values = {s: trace.nodes[s]["value"] for s in latents(trace)}
    other = poutine.trace(poutine.condition(rows.model, data=values)).get_trace(*rows.args)
    torch.testing.assert_close(trace.log_prob_sum(), other.log_prob_sum())

    shocks, loop = models.volatility_at_once(9), models.volatility_in_a_loop(9)
    trace = poutine.trace(shocks.model).get_trace(*shocks.args)
    values = {s: trace.nodes[s]["value"] for s in ("mu", "phi", "s", "noise")}
    h = shocks.locals(values)["h"]
    states = {f"h_{t}": value for t, value in enumerate(h)} | values
    other = poutine.trace(poutine.condition(loop.model, data=states)).get_trace(*loop.args)
    # dh / dnoise is triangular, with s on its diagonal and the stationary scale first.
    rho = 2.0 * values["phi"] - 1.0
    log_det = 9 * values["s"].log() - 0.5 * (1.0 - rho**2).log()
    torch.testing.assert_close(trace.log_prob_sum(), other.log_prob_sum() + log_det)


def as_they_are(problem, values):
    return values, 0.0


def horseshoe_noise(problem, values):
    scale = values["tau"] * values["lam"]
    return {**values, "noise": values["w"] / scale}, scale.log().sum()


def spatial_noise(problem, values):
    """Of the centred sites, and the log determinant."""
    factor, scale = problem.args[0], values["sigma"] * (1.0 - values["rho"]).sqrt()
    loc = values["sigma"] * values["rho"].sqrt() * values["phi"]
    noise = {
        "spatial_noise": torch.linalg.solve(factor, values["phi"]),
        "noise": (values["effect"] - loc) / scale,
    }
    return values | noise, len(loc) * scale.log() + factor.diagonal().log().sum()


@pytest.mark.parametrize(
    ("make", "to_noise"),
    [
        (partial(models.horseshoe, 20, 5), horseshoe_noise),
        (partial(models.irt_2pl, 8, 5), as_they_are),
        (partial(models.volatility_at_once, 9), as_they_are),
        (partial(models.spatial, 4), spatial_noise),
        (partial(models.crossed_factors, 50), as_they_are),
    ],
    ids=["horseshoe", "IRT 2PL", "volatility", "BYM2", "crossed factors"],
)
def test_nuts_runs_on_the_same_density(make, to_noise):
    pytest.importorskip("numpyro")
    import jax.numpy as jnp
    from numpyro.infer.util import log_density

    from benchmarks.common import structured_numpyro

    problem = make()
    pyro.set_rng_seed(0)
    trace = poutine.trace(problem.model).get_trace(*problem.args)
    values, log_det = to_noise(problem, {s: trace.nodes[s]["value"] for s in latents(trace)})
    params = {name: jnp.asarray(value.numpy()) for name, value in values.items()}
    program = structured_numpyro.PROGRAMS[problem.truth]
    found, _ = log_density(program, structured_numpyro.arrays(problem.args), {}, params)
    assert float(found) == pytest.approx(float(trace.log_prob_sum() + log_det), rel=1e-9)


def row(method, seed, **more):
    scores = {"worst_mean": 0.05, "worst_name": "mu", "sd_low": 0.97, "sd_high": 1.04}
    scores |= {f"local_{name}": value for name, value in scores.items()}
    scores |= {"elbo": -7.0, "elbo_se": 0.01, "seconds": 2.0, "cpu_seconds": 2.0, "steps": 100}
    key = {"model": "three levels", "method": method, "seed": seed, "truth": "three levels"}
    return {**key, **scores, "stop_reason": "converged", "setting": "here", **more}


def test_targets():
    rows = [row("structured", seed, seconds=seconds) for seed, seconds in enumerate((1.0, 9.0, 3.0))]
    rows[2] |= {"sd_low": 0.9, "elbo": -7.2}
    flat = [row("flat", 0, elbo=-7.05, seconds=10.0)]
    target = Target(0.1, (0.93, 1.07), 2.0, below=0.1, above_flat=0.1, times_flat=0.5)
    found = [tuple(line[1:3]) + (line[4],) for line in bench.check("m", target, rows, flat, -6.95)]
    assert found == [
        ("worst mean of the roots, sd", "0.050", "+"),
        ("lowest sd ratio", "0.900", "-"),
        ("highest sd ratio", "1.040", "+"),
        ("seconds", "3.000", "-"),
        ("log p(y) - ELBO", "0.050", "+"),
        ("ELBO above the flat guide's", "0.050", "-"),
        ("seconds / the flat guide's", "0.300", "+"),
    ]


def test_report(capsys):
    failed = {"model": "three levels", "method": "flat", "seed": 0, "error": "stopped after 600 s"}
    bench.report([row("structured", 0), row("structured", 1), failed])
    text = capsys.readouterr().out
    assert "| three levels | structured | 2.00 | 2.00 | 100, converged | -7.000 ± 0.010 |" in text
    assert "- flat on three levels: stopped after 600 s" in text
