"""The table of priors in unconstrained coordinates, against draws mapped there."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to
from torch.distributions.transforms import AffineTransform, ExpTransform, SigmoidTransform

from pyro_flowvi._program.packing import Latent, Packing
from pyro_flowvi._program.priors import normal_prior, read_priors

NUM_DRAWS = 100_000


def tensor(*values):
    return torch.tensor(values)


def prior_of(fn):
    """As a site of this distribution has it."""
    latent = Latent.of({"fn": fn, "value": fn.sample()})
    return normal_prior(latent, fn)


def unconstrained(fn, num=NUM_DRAWS):
    return biject_to(fn.support).inv(fn.sample((num,)))


def check_by_draws(fn):
    """Mean and standard deviation within five of their standard errors."""
    found, draws = prior_of(fn), unconstrained(fn)
    assert not found.joint
    assert found.loc.shape == found.scale.shape == draws.shape[1:]
    mean, sd = draws.mean(0), draws.std(0)
    assert ((found.loc - mean).abs() <= 5.0 * sd / math.sqrt(len(draws))).all()
    fourth = ((draws - mean) / sd).pow(4).mean(0)
    assert ((found.scale / sd).log().abs() <= 2.5 * ((fourth - 1.0) / len(draws)).sqrt() + 1e-4).all()


TABLE = {
    "Normal": lambda: dist.Normal(tensor(-1.0, 30.0), tensor(0.1, 5.0)),
    "LogNormal": lambda: dist.LogNormal(tensor(-1.0, 2.0), tensor(0.1, 3.0)),
    "HalfNormal": lambda: dist.HalfNormal(tensor(0.01, 40.0)),
    "HalfCauchy": lambda: dist.HalfCauchy(tensor(0.01, 40.0)),
    "Gamma": lambda: dist.Gamma(tensor(0.5, 2.0, 80.0), tensor(3.0, 0.01, 20.0)),
    "Chi2": lambda: dist.Chi2(tensor(1.0, 20.0)),
    "InverseGamma": lambda: dist.InverseGamma(tensor(0.5, 3.0, 80.0), tensor(3.0, 0.01, 20.0)),
    "Exponential": lambda: dist.Exponential(tensor(0.01, 7.0)),
    "Beta": lambda: dist.Beta(tensor(0.7, 2.0, 30.0), tensor(2.0, 1.0, 90.0)),
    "Uniform": lambda: dist.Uniform(tensor(-3.0, 0.0), tensor(10.0, 1.0)),
    "StudentT": lambda: dist.StudentT(tensor(9.0, 30.0), tensor(0.0, -5.0), tensor(0.1, 3.0)),
    "Laplace": lambda: dist.Laplace(tensor(-2.0, 0.0), tensor(0.1, 3.0)),
    "Logistic": lambda: dist.Logistic(tensor(-2.0, 0.0), tensor(0.1, 3.0)),
    "Gumbel": lambda: dist.Gumbel(tensor(-2.0, 0.0), tensor(0.1, 3.0)),
}


@pytest.mark.parametrize("name", TABLE)
class TestTable:
    def test_mean_and_sd(self, name):
        check_by_draws(TABLE[name]())

    def test_wrapped(self, name):
        """Rows, events and masks change shapes, and nothing else."""
        own = TABLE[name]()
        expected, batch = prior_of(own), own.batch_shape
        for fn in (
            own.to_event(1),
            own.expand([4, *batch]),
            own.mask(False),
            own.expand([3, 4, *batch]).to_event(2).mask(torch.ones(3, dtype=torch.bool)),
            own.to_event(1).expand([4]),
        ):
            found, shape = prior_of(fn), fn.sample().shape
            assert not found.joint
            assert found.loc.shape == found.scale.shape == shape
            torch.testing.assert_close(found.loc, expected.loc.expand(shape))
            torch.testing.assert_close(found.scale, expected.scale.expand(shape))


@pytest.mark.parametrize(("df", "factor"), [(1.0, 3.0), (2.5, 3.0), (3.0, 3.0), (5.0, 5.0 / 3.0)])
def test_student_t_of_few_degrees_of_freedom(df, factor):
    """With two and fewer the variance of draws does not settle: the scale is that of three."""
    found = prior_of(dist.StudentT(df, 1.0, 2.0))
    assert found.loc == 1.0
    assert found.scale == pytest.approx(2.0 * math.sqrt(factor))


def test_cauchy_by_its_quantiles():
    """It has no moments: a normal with this scale has about the middle 70 % of its draws in common."""
    fn = dist.Cauchy(tensor(-3.0), tensor(0.5))
    found = prior_of(fn)
    assert found.loc == -3.0
    inside = ((unconstrained(fn) - found.loc).abs() < found.scale).double().mean()
    assert inside == pytest.approx(0.683, abs=0.03)


class TestTransformed:
    def test_affine(self):
        steps = [AffineTransform(tensor(1.0, -2.0), -3.0), AffineTransform(0.5, tensor(0.1, 2.0))]
        check_by_draws(dist.TransformedDistribution(dist.Normal(tensor(2.0, 1.0), 0.7), steps))

    def test_exponential_of_affine(self):
        steps = [AffineTransform(tensor(1.0, -2.0), -0.4), ExpTransform()]
        check_by_draws(dist.TransformedDistribution(dist.Normal(tensor(2.0, 1.0), 0.7), steps))

    def test_of_an_event(self):
        base = dist.Normal(tensor(2.0, 1.0), tensor(0.3, 0.7)).to_event(1)
        fn = dist.TransformedDistribution(base, [AffineTransform(1.0, 2.0), ExpTransform()])
        check_by_draws(fn)

    def test_expanded(self):
        fn = dist.TransformedDistribution(dist.Normal(1.0, 2.0), [AffineTransform(1.0, 2.0)])
        check_by_draws(fn.expand([3]).to_event(1))

    @pytest.mark.parametrize(
        ("base", "steps"),
        [
            (dist.Normal(0.0, 1.0), [ExpTransform(), AffineTransform(1.0, 2.0)]),
            (dist.Normal(0.0, 1.0), [SigmoidTransform()]),
            (dist.HalfNormal(1.0), [AffineTransform(0.0, 2.0)]),
        ],
    )
    def test_what_is_no_normal(self, base, steps):
        assert prior_of(dist.TransformedDistribution(base, steps)) is None


class TestMultivariateNormal:
    covariance = ((2.0, 0.5), (0.5, 0.3))

    def test_moments(self):
        fn = dist.MultivariateNormal(tensor(1.0, -2.0), torch.tensor(self.covariance))
        found, draws = prior_of(fn), unconstrained(fn)
        assert found.joint
        assert torch.equal(found.scale, found.scale.tril())
        torch.testing.assert_close(found.scale @ found.scale.mT, torch.tensor(self.covariance))
        torch.testing.assert_close(draws.T.cov(), found.scale @ found.scale.mT, rtol=0.05, atol=0.02)
        torch.testing.assert_close(draws.mean(0), found.loc, rtol=0.0, atol=0.03)

    @pytest.mark.parametrize("how", ["covariance_matrix", "precision_matrix", "scale_tril"])
    def test_rows(self, how):
        matrix = torch.tensor(self.covariance)
        given = {
            "covariance_matrix": matrix,
            "precision_matrix": matrix.inverse(),
            "scale_tril": torch.linalg.cholesky(matrix),
        }
        fn = dist.MultivariateNormal(torch.randn(4, 2), **{how: given[how]})
        for each in (fn, fn.expand([3, 4]), fn.to_event(1), fn.mask(torch.tensor([True, False, True, True]))):
            found, shape = prior_of(each), each.sample().shape
            assert found.joint
            assert found.loc.shape == shape
            assert found.scale.shape == (*shape, 2)
            torch.testing.assert_close(found.loc, fn.loc.expand(shape))
            torch.testing.assert_close(found.scale @ found.scale.mT, matrix.expand(*shape, 2))

    def test_of_one_number(self):
        found = prior_of(dist.MultivariateNormal(torch.zeros(3, 1), torch.full((1, 1), 4.0)))
        assert not found.joint
        assert found.loc.shape == found.scale.shape == (3, 1)
        assert (found.scale == 2.0).all()


UNKNOWN = {
    "Dirichlet": lambda: dist.Dirichlet(torch.ones(3)),
    "LKJCholesky": lambda: dist.LKJCholesky(3, 2.0),
    "VonMises": lambda: dist.VonMises(0.0, 1.0),
    "Weibull": lambda: dist.Weibull(1.0, 1.0),
    "ImproperUniform": lambda: dist.ImproperUniform(dist.constraints.real, (), ()),
    "Pareto": lambda: dist.Pareto(1.0, 2.0),
    "MixtureSameFamily": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0)
    ),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(
        torch.zeros(3), torch.ones(3, 1), torch.ones(3)
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name):
    fn = UNKNOWN[name]()
    value = torch.zeros(()) if name == "ImproperUniform" else fn.sample()
    assert normal_prior(Latent.of({"fn": fn, "value": value}), fn) is None


def test_shapes_in_plates():
    """What a program writes without rows has them in its plates."""

    def model():
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("columns", 3, dim=-1):
            a = pyro.sample("a", dist.Normal(1.0, tau))
            with pyro.plate("rows", 4, dim=-2):
                pyro.sample("b", dist.LogNormal(a, 0.5))
                pyro.sample("c", dist.MultivariateNormal(torch.zeros(2), tau * torch.eye(2)))
                pyro.sample("d", dist.Dirichlet(torch.ones(2)))

    sites = poutine.trace(model).get_trace().nodes
    packing = Packing({name: sites[name] for name in ("tau", "a", "b", "c", "d")})
    z = torch.randn(packing.dim)
    free = packing.split(z)
    found = read_priors(model, (), {}, packing, free)
    assert set(found) == {"tau", "a", "b", "c"}
    tau = free["tau"].exp()
    torch.testing.assert_close(found["a"].loc, torch.ones(3))
    torch.testing.assert_close(found["a"].scale, tau.expand(3))
    torch.testing.assert_close(found["b"].loc, free["a"].expand(4, 3))
    torch.testing.assert_close(found["b"].scale, torch.full((4, 3), 0.5))
    torch.testing.assert_close(found["c"].scale, (tau.sqrt() * torch.eye(2)).expand(4, 3, 2, 2))


def test_half_normal_of_a_tiny_scale_in_float32():
    fn = dist.HalfNormal(torch.tensor(1e-30, dtype=torch.float32))
    found = prior_of(fn)
    assert found.loc.dtype == torch.float32
    assert found.loc == pytest.approx(math.log(1e-30) - 0.635, abs=1e-2)
    assert found.scale == pytest.approx(1.1107, abs=1e-3)
