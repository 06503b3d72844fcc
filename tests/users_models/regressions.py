"""Regressions of Pyro's tutorials and examples."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn

from .case import Case, Problem


class Line(PyroModule):
    """A linear layer with priors on its weights."""

    def __init__(self, width):
        super().__init__()
        self.layer = PyroModule[nn.Linear](width, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 2.0).expand([1, width]).to_event(2))
        self.layer.bias = PyroSample(dist.Normal(0.0, 5.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        noise = pyro.sample("noise", dist.Uniform(0.0, 4.0))
        mean = self.layer(x).squeeze(-1)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, noise), obs=y)


def line():
    """Truth: the weights in closed form given the noise, which is summed over a grid."""
    x = torch.randn(25, 2)
    y = x @ torch.tensor([1.5, -0.5]) + 0.7 + 0.6 * torch.randn(25)
    design = torch.cat([x, torch.ones(25, 1)], 1)
    prior = torch.tensor([4.0, 4.0, 25.0]).diag()
    noise = torch.linspace(0.2, 3.9, 1000)
    cov = design @ prior @ design.T + noise.square()[:, None, None] * torch.eye(25)
    share = dist.MultivariateNormal(torch.zeros(25), cov).log_prob(y).softmax(0)
    given = (prior @ design.T @ torch.linalg.solve(cov, y.expand(1000, 25).unsqueeze(-1))).squeeze(-1)

    def check(draws):
        assert torch.allclose(draws["layer.weight"].mean(0)[0], share @ given[:, :2], atol=0.03)
        assert torch.allclose(draws["layer.bias"].mean(0), share @ given[:, 2:], atol=0.03)
        assert torch.allclose(draws["noise"].mean(), share @ noise, atol=0.03)

    return Problem(Line(2), (x, y), check)


def clicks(x, y=None):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 2.0))
    logits = (x * weights.unsqueeze(-2)).sum(-1) + bias.unsqueeze(-1)
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def logistic():
    """Truth: quadrature over the three coefficients."""
    x = torch.randn(60, 2)
    y = torch.bernoulli((x @ torch.tensor([1.0, -2.0]) + 0.5).sigmoid())
    axis = torch.linspace(-4.0, 4.0, 61)
    grid = torch.cartesian_prod(axis, axis, axis)
    logits = grid[:, :2] @ x.T + grid[:, 2:]
    log_p = dist.Bernoulli(logits=logits).log_prob(y).sum(-1)
    log_p += dist.Normal(0.0, torch.tensor([1.0, 1.0, 2.0])).log_prob(grid).sum(-1)
    mean = log_p.softmax(0) @ grid

    def check(draws):
        found = torch.cat([draws["weights"], draws["bias"].unsqueeze(-1)], -1).mean(0)
        assert torch.allclose(found, mean, atol=0.04)

    return Problem(clicks, (x, y), check)


class Net(PyroModule):
    """Two layers with a prior on each weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two = PyroModule[nn.Linear](1, 4), PyroModule[nn.Linear](4, 1)
        for layer in (self.one, self.two):
            for name, value in list(layer.named_parameters()):
                prior = dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())
                setattr(layer, name, PyroSample(prior))

    def forward(self, x, y=None):
        mean = self.two(self.one(x).tanh()).squeeze(-1)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, 0.1), obs=y)


def network():
    x = torch.linspace(-2, 2, 20).unsqueeze(-1)
    return Problem(Net(), (x, x.squeeze(-1).sin() + 0.1 * torch.randn(20)))


def duration(friction, step=0.25):
    """How long a box slides down two metres, by steps."""
    acceleration = 9.8 * (math.sin(math.pi / 6) - friction * math.cos(math.pi / 6))
    if acceleration <= 0:
        return torch.tensor(1e3)
    time, speed, place = torch.zeros(()), torch.zeros(()), torch.zeros(())
    while place < 2.0:
        speed = (speed.square() + 2 * step * acceleration).sqrt()
        place = place + step
        time = time + step / speed
    return time


def box():
    """Truth: quadrature over the coefficient of friction."""

    def model(times):
        friction = pyro.sample("friction", dist.Uniform(0.0, 1.0))
        mean = duration(friction)
        with pyro.plate("runs", len(times)):
            pyro.sample("time", dist.Normal(mean, 0.02), obs=times)

    times = duration(torch.tensor(0.12)) + 0.02 * torch.randn(10)
    grid = torch.linspace(0.0, 0.3, 601)
    means = torch.stack([duration(friction) for friction in grid])
    share = dist.Normal(means, 0.02).log_prob(times[:, None]).sum(0).softmax(0)
    mean = share @ grid

    def check(draws):
        assert abs(draws["friction"].mean() - mean) < 0.001

    return Problem(model, (times,), check)


def correlations():
    """An LKJ prior; data without correlations, of scale 1."""

    def model(y):
        theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(3)).to_event(1))
        tril = pyro.sample("tril", dist.LKJCholesky(3, torch.ones(())))
        scale = theta.sqrt().unsqueeze(-1) * tril
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale), obs=y)

    def check(draws):
        cov = y.T @ y / len(y)  # which 100 rows decide
        found = draws["theta"].sqrt().unsqueeze(-1) * draws["tril"]
        assert torch.allclose((found @ found.mT).mean(0), cov, atol=0.12)

    y = torch.randn(100, 3)
    return Problem(model, (y,), check)


def grades():
    """Ordinal regression, cut points from a Dirichlet."""

    def model(x, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(4)))
        cuts = torch.logit(shares.cumsum(-1)[..., :-1])
        with pyro.plate("rows", len(x)):
            loc = (x * slope.unsqueeze(-1)).unsqueeze(-1) - cuts.unsqueeze(-2)
            above = torch.nn.functional.pad(loc.sigmoid(), (1, 0), value=1.0)
            probs = above - torch.nn.functional.pad(above[..., 1:], (0, 1), value=0.0)
            pyro.sample("y", dist.Categorical(probs), obs=y)

    x = torch.randn(80)
    y = dist.OrderedLogistic(x * 1.5, torch.tensor([-1.0, 0.0, 1.0])).sample()

    def check(draws):
        assert abs(draws["slope"].mean() - 1.5) < 3 * draws["slope"].std()

    return Problem(model, (x, y), check)


def interactions():
    """Sparse regression with all products of columns, as a Gaussian process."""

    def model(x, y):
        num, width = x.shape
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        eta = pyro.sample("eta", dist.HalfCauchy(0.1 * sigma))
        msq = pyro.sample("msq", dist.InverseGamma(3.0, 1.0))
        xisq = pyro.sample("xisq", dist.InverseGamma(3.0, 1.0))
        local = pyro.sample("local", dist.HalfCauchy(torch.ones(width)).to_event(1))
        noise = pyro.sample("noise", dist.InverseGamma(3.0, 1.0))
        twice = eta**4 * xisq / msq**2
        z = (msq.sqrt() * local / (msq + (eta * local).square()).sqrt()) * x
        dot, squares = z @ z.T, z.square() @ z.square().T
        kernel = 0.5 * twice * ((1 + dot) ** 2 - squares) + (eta**2 - twice) * dot + 1 - 0.5 * twice
        kernel = kernel + (noise + 1e-4) * torch.eye(num)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(num), covariance_matrix=kernel), obs=y)

    x = torch.randn(15, 4)
    return Problem(model, (x, x[:, 0] - x[:, 1] + 0.3 * x[:, 0] * x[:, 1] + 0.2 * torch.randn(15)))


CASES = [
    Case("line", "Bayesian regression, `PyroModule[nn.Linear]`", line),
    Case("logistic", "logistic regression (covtype's)", logistic),
    Case("network", "network with a prior on each weight", network),
    Case(
        "box",
        "`inclined_plane`: a simulator with `while`",
        box,
        compiled="eager",
        cause="read by Python",
        warns="CompileWarning",
        steps=60,
        remark="its Python reads the latent: draw by draw, after a warning that names the line",
    ),
    Case(
        "correlations",
        "`lkj`",
        correlations,
        svi_steps=250,
        remark="`to_event` on `theta`, without which Pyro's SVI refuses it",
    ),
    Case("grades", "ordinal regression", grades),
    Case("interactions", "`sparse_regression`", interactions, slow=True),
]
