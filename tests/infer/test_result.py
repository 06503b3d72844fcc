"""How the result of a fit prints."""

import pickle
import xml.etree.ElementTree as ET

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_flowvi import AutoPlanar, FitDiverged, FitResult, fit


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def result(stop_reason="completed", **more):
    return FitResult(None, torch.tensor([2.0, 1.0]), 1.0, {}, stop_reason, 0.5, **more)


def test_one_line_once_it_has_converged():
    line = "FitResult(converged: 2 steps in 0.5 s, loss 2.00 -> 1.00, started at the best Gaussian (laplace)"
    done = result("converged", converged=True, start="laplace")
    assert repr(done) == str(done) == f"{line})"
    more = result("converged", converged=True, start="laplace", num_dropped=3, num_restarts=1)
    assert repr(more) == f"{line}, 3 particles without a finite density, 1 restart)"
    assert repr(result("completed", converged=True)).count("\n") == 0


def test_singular_and_plural():
    one = result("converged", converged=True, num_dropped=1, num_skipped=1, num_restarts=1)
    assert repr(one).endswith("1 particle without a finite density, 1 step skipped, 1 restart)")
    two = result("converged", converged=True, num_dropped=2, num_skipped=2, num_restarts=2)
    assert repr(two).endswith("2 particles without a finite density, 2 steps skipped, 2 restarts)")
    for part in ("1 step skipped", "1 restart"):
        assert part in one._repr_html_()
    for steps, words in ((0, "0 steps in"), (1, "1 step in"), (2, "2 steps in")):
        assert words in repr(FitResult(None, torch.ones(steps), 1.0, {}, "completed", 0.5))


@pytest.mark.parametrize(
    ("stop_reason", "what"),
    [
        ("completed", "take a larger num_steps"),
        ("no more batches", "give more batches"),
        ("interrupted", "checkpoint="),
    ],
)
def test_what_to_do_next(stop_reason, what):
    first, second = repr(result(stop_reason)).splitlines()
    assert first == f"FitResult({stop_reason}: 2 steps in 0.5 s, loss 2.00 -> 1.00)"
    assert second.startswith("  not converged")
    assert what in second
    assert what in result(stop_reason)._repr_html_()


@pytest.mark.parametrize("make", [lambda model: AutoPlanar(model, 2), AutoNormal])
def test_the_advice_can_be_followed(make):
    y, guide = torch.ones(5), make(model)
    short = fit(model, guide, y, num_steps=2, lr=1e-3, seed=0, progress=False)
    assert not short.converged
    options = {"init": short} if "fit(..., init=result)" in repr(short) else {}
    assert bool(options) == isinstance(guide, AutoPlanar)
    longer = fit(model, guide, y, seed=0, progress=False, **options)
    assert longer.best_loss <= short.best_loss + 0.01
    assert longer.converged


def test_html():
    done = result(start="previous", num_skipped=2)
    text = [part.strip() for part in ET.fromstring(done._repr_html_()).itertext() if part.strip()]
    assert text[:2] == ["completed", "(not converged)"]
    for part in ("2", "0.5", "2.00 -> 1.00", "the earlier guide", "2 steps skipped"):
        assert part in text
    assert text[-1].startswith("not converged, the ELBO may still rise")
    assert "color" not in done._repr_html_()
    converged = result("converged", converged=True)._repr_html_()
    assert "where the guide stood" in converged
    assert "not converged" not in converged


def test_a_failure_in_float32_advises_float64():
    """A square that overflows in float32, and is 1e40 in float64."""

    def overflowing(y):
        x = pyro.sample("x", dist.Normal(y.new_zeros(()), 1.0))
        pyro.factor("far", -(1e20 * (1.0 + x * x)).square() * 1e-40 + (0.0 * y).sum())

    y = torch.zeros(3)
    assert not torch.tensor(1e20, dtype=torch.float32).square().isfinite()
    with pyro.validation_enabled(False), pytest.raises(FitDiverged, match="take float64") as error:
        fit(overflowing, AutoNormal(overflowing), y.float(), num_steps=20, seed=0, progress=False)
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.float32) == (str(error.value), True)
    pyro.clear_param_store()
    result = fit(overflowing, AutoNormal(overflowing), y.double(), num_steps=20, seed=0, progress=False)
    assert bool(result.losses.isfinite().all())
    assert "float64" not in str(FitDiverged(3, "x", torch.zeros(3)))
