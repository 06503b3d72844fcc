"""A posterior that is flat along a direction is improper: the sites are named, and nothing else is."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO

from pyro_flowvi import AutoPlanar, diagnose, fit
from pyro_flowvi._program.flat_directions import flat_sites
from pyro_flowvi._program.log_density import UnconstrainedModel
from tests import zoo


def improper(name, *shape, support=constraints.real):
    fn = dist.ImproperUniform(support, (), ())
    return pyro.sample(name, fn.expand(shape).to_event(len(shape)))


def observe(loc, scale=1.0):
    pyro.sample("y", dist.Normal(loc, scale), obs=torch.tensor(1.0))


def unused():
    improper("a")
    observe(pyro.sample("b", dist.Normal(0.0, 1.0)))


def sum_of_two():
    observe(improper("a") + improper("b") + pyro.sample("c", dist.Normal(0.0, 1.0)))


def sum_of_one_vector():
    improper("seen")
    observe(improper("a", 5).sum(-1))
    pyro.sample("x", dist.Normal(improper("d"), 1.0), obs=torch.tensor(0.0))


def in_units():
    observe(1e6 * improper("a") + 1e-6 * improper("b"))


def product_of_scales():
    observe(0.0, improper("a", support=constraints.positive) * improper("b", support=constraints.positive))


def masked():
    with poutine.mask(mask=False):
        a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    observe(a - b)


FLAT = {
    unused: ["a"],
    sum_of_two: ["a", "b"],
    sum_of_one_vector: ["seen", "a"],
    in_units: ["a", "b"],
    product_of_scales: ["a", "b"],
    masked: ["a", "b"],
}


def proper_prior_decides():
    observe(improper("a") + pyro.sample("b", dist.Normal(0.0, 1.0)))


def bounded():
    improper("a", support=constraints.unit_interval)
    observe(pyro.sample("b", dist.Normal(0.0, 1.0)))


def simplex():
    pyro.sample("p", dist.ImproperUniform(constraints.simplex, (), (3,)))


def nearly_collinear():
    x = torch.linspace(0.0, 1.0, 50)
    design = torch.stack([x**k for k in range(5)], -1)
    with pyro.plate("rows", 50):
        pyro.sample("y", dist.Normal((improper("b", 5).unsqueeze(-2) * design).sum(-1), 0.1), obs=x.sin())


def far_and_wide():
    a = improper("a")
    with pyro.plate("rows", 20):
        pyro.sample("y", dist.Normal(a.unsqueeze(-1), 1e6), obs=torch.linspace(0.0, 1e7, 20))


def mean_and_scale():
    a, s = improper("a"), improper("s", support=constraints.positive)
    with pyro.plate("rows", 20):
        pyro.sample("y", dist.Normal(a.unsqueeze(-1), s.unsqueeze(-1)), obs=torch.linspace(0.0, 1.0, 20))


PROPER = [proper_prior_decides, bounded, simplex, nearly_collinear, far_and_wide, mean_and_scale]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestDirections:
    @pytest.mark.parametrize("model", FLAT, ids=lambda model: model.__name__)
    def test_flat(self, model, dtype):
        torch.set_default_dtype(dtype)
        assert flat_sites(UnconstrainedModel(model)) == FLAT[model]

    @pytest.mark.parametrize("model", PROPER, ids=lambda model: model.__name__)
    def test_proper(self, model, dtype):
        torch.set_default_dtype(dtype)
        assert flat_sites(UnconstrainedModel(model)) == []


def test_the_zoo_is_proper():
    for model, args in zoo.make_zoo().values():
        try:
            density = UnconstrainedModel(model, args)
        except (ValueError, NotImplementedError):
            continue
        assert flat_sites(density) == []


def test_fit_refuses():
    guide = AutoPlanar(sum_of_two)
    with pytest.raises(ValueError, match=r"flat along a direction of the sites \['a', 'b'\]"):
        fit(sum_of_two, guide, progress=False)


def test_a_reason_in_the_verdict():
    guide = AutoPlanar(sum_of_two)
    svi = SVI(sum_of_two, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(100):
        svi.step()
    found = diagnose(sum_of_two, guide, num_samples=200, probes=False)
    assert found.verdict == "poor"
    assert any("improper: it is flat along a direction of the sites ['a', 'b']" in r for r in found.reasons)
