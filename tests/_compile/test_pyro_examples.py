"""CompiledSVI on the examples of Pyro's documentation, with small made-up data.

Each runs compiled and agrees with Pyro's SVI, or runs eagerly after one warning that says why and where.
"""

import argparse
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_flowvi import CompiledSVI
from pyro_flowvi._compile import policy
from pyro_flowvi.infer import CompileWarning

HERE = __file__


def both(train, **options):
    """Trains with Pyro's SVI and with a compiled one from the same seed; the compiled one, once they agree.

    :param train: gets a function that makes the SVI from its four arguments; returns the losses.
    """
    made = []

    def make(*args):
        made.append(CompiledSVI(*args, compile=True, **options))
        return made[0]

    outcomes = []
    for maker in (SVI, make):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        losses = train(maker)
        params = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
        outcomes.append((torch.tensor(losses), params))
    (expected_losses, expected), (losses, params) = outcomes
    tolerance = 1e-8 if torch.get_default_dtype() == torch.float64 else 1e-2
    assert torch.allclose(losses, expected_losses, rtol=tolerance, atol=tolerance)
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(params[name], value, rtol=tolerance, atol=tolerance), name
    assert made[0].compiled
    assert made[0].cause is None
    return made[0]


def falls_back(train, monkeypatch):
    """The message of the one warning with which a training under "auto" stays eager, as Pyro's own does."""
    monkeypatch.setattr(policy, "STEPS_BEFORE", 2)
    outcomes = []
    for maker in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CompileWarning)
            outcomes.append(train(maker))
    assert outcomes[0] == outcomes[1]
    (warning,) = [w for w in caught if issubclass(w.category, CompileWarning)]
    assert warning.filename == HERE  # it points at the call of ``step``
    return str(warning.message)


# Bayesian regression (tutorial "Bayesian Regression").


class BayesianRegression(PyroModule):
    def __init__(self, in_features):
        super().__init__()
        self.linear = PyroModule[nn.Linear](in_features, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, in_features]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


def test_bayesian_regression():
    x = torch.randn(40, 3)
    y = x @ torch.tensor([1.0, -1.0, 0.5]) + 0.3 * torch.randn(40)

    def train(make):
        model = BayesianRegression(3)
        svi = make(model, AutoDiagonalNormal(model), pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
        return [svi.step(x, y) for _ in range(30)]

    both(train)


# Variational autoencoder (tutorial "Variational Autoencoders").


class Decoder(nn.Module):
    def __init__(self, z_dim, hidden_dim, pixels):
        super().__init__()
        self.hidden = nn.Linear(z_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, pixels)

    def forward(self, z):
        return torch.sigmoid(self.out(nn.functional.softplus(self.hidden(z))))


class Encoder(nn.Module):
    def __init__(self, z_dim, hidden_dim, pixels):
        super().__init__()
        self.pixels = pixels
        self.hidden = nn.Linear(pixels, hidden_dim)
        self.loc = nn.Linear(hidden_dim, z_dim)
        self.log_scale = nn.Linear(hidden_dim, z_dim)

    def forward(self, x):
        hidden = nn.functional.softplus(self.hidden(x.reshape(-1, self.pixels)))
        return self.loc(hidden), torch.exp(self.log_scale(hidden))


class VAE(nn.Module):
    def __init__(self, z_dim=3, hidden_dim=10, pixels=36):
        super().__init__()
        self.encoder = Encoder(z_dim, hidden_dim, pixels)
        self.decoder = Decoder(z_dim, hidden_dim, pixels)
        self.z_dim = z_dim

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros(torch.Size((x.shape[0], self.z_dim)))
            z_scale = x.new_ones(torch.Size((x.shape[0], self.z_dim)))
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            image = self.decoder.forward(z)
            pixels = dist.Bernoulli(image, validate_args=False).to_event(1)
            pyro.sample("obs", pixels, obs=x.reshape(-1, image.shape[-1]))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder.forward(x)
            pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))


@pytest.mark.slow
def test_vae():
    """Epochs of shuffled minibatches, of which the last is smaller: two graphs."""
    images = torch.rand(70, 1, 6, 6).round()

    def train(make):
        vae = VAE()
        svi = make(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        losses = []
        for _ in range(12):
            losses += [svi.step(x) for (x,) in DataLoader(TensorDataset(images), 32, shuffle=True)]
            losses.append(svi.evaluate_loss(images))
        return losses

    both(train)


# Gaussian mixture (tutorial "Gaussian Mixture Model").

POINTS = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0], dtype=torch.float64)


@config_enumerate
def mixture(data, components=2):
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(components)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", components):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)


def mixture_guide(data):
    def init_loc_fn(site):
        if site["name"] == "weights":
            return torch.ones(2) / 2
        if site["name"] == "scale":
            return (data.var() / 2).sqrt()
        return data[torch.multinomial(torch.ones(len(data)), 2)]

    shown = poutine.block(mixture, expose=["weights", "locs", "scale"])
    return AutoDelta(shown, init_loc_fn=init_loc_fn)


@pytest.mark.slow
def test_gaussian_mixture():
    """A point estimate with assignments summed over; then the assignments' probabilities, the rest held."""
    data = POINTS.to(torch.get_default_dtype())
    elbo = TraceEnum_ELBO(max_plate_nesting=1)

    def train(make):
        global_guide = mixture_guide(data)
        svi = make(mixture, global_guide, pyro.optim.Adam({"lr": 0.1, "betas": [0.8, 0.99]}), elbo)
        start = svi.loss(mixture, global_guide, data)
        losses = [start] + [svi.step(data) for _ in range(100)]
        locs = sorted(global_guide(data)["locs"].tolist())
        assert locs[0] == pytest.approx(0.5, abs=0.5)
        assert locs[1] == pytest.approx(11.0, abs=0.5)
        return losses

    both(train)

    def train_assignments(make):
        global_guide = mixture_guide(data)

        @config_enumerate
        def full_guide(data):
            with poutine.block(hide_types=["param"]):
                global_guide(data)
            with pyro.plate("data", len(data)):
                probs = pyro.param(
                    "assignment_probs",
                    torch.ones(len(data), 2) / 2,
                    constraint=dist.constraints.unit_interval,
                )
                pyro.sample("assignment", dist.Categorical(probs))

        svi = make(mixture, full_guide, pyro.optim.Adam({"lr": 0.2}), elbo)
        return [svi.step(data) for _ in range(60)]

    both(train_assignments)


def test_gaussian_mixture_with_hooks(monkeypatch):
    """The tutorial watches the norms of gradients, which a compiled step does not have one by one."""
    data = POINTS.to(torch.get_default_dtype())

    def train(make):
        global_guide = mixture_guide(data)
        optim = pyro.optim.Adam({"lr": 0.1, "betas": [0.8, 0.99]})
        svi = make(mixture, global_guide, optim, TraceEnum_ELBO(max_plate_nesting=1))
        losses, norms = [svi.loss(mixture, global_guide, data)], []
        for param in global_guide.parameters():
            param.register_hook(lambda g: norms.append(g.norm().item()))
        losses += [svi.step(data) for _ in range(6)]
        assert len(norms) >= 18
        return losses

    message = falls_back(train, monkeypatch)
    assert "value that depends on parameters" in message
    assert HERE in message
    assert "register_hook(lambda g: norms.append(g.norm().item()))" in message


# Hidden Markov model (examples/hmm.py, model 1).


def hidden_markov(sequences, lengths, hidden_dim=3, batch_size=None, include_prior=True):
    num_sequences, max_length, data_dim = map(int, sequences.shape)
    assert lengths.shape == (num_sequences,)
    assert lengths.max() <= max_length
    with poutine.mask(mask=include_prior):
        probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(hidden_dim) + 0.1).to_event(1))
        probs_y = pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand([hidden_dim, data_dim]).to_event(2))
    tones_plate = pyro.plate("tones", data_dim, dim=-1)
    with pyro.plate("sequences", num_sequences, batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        x = 0
        for t in pyro.markov(range(lengths.max())):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"})
                with tones_plate:
                    tones = dist.Bernoulli(probs_y[x.squeeze(-1)])
                    pyro.sample(f"y_{t}", tones, obs=sequences[batch, t])


def chorales():
    lengths = torch.tensor([4, 2, 3, 4])
    return torch.randint(2, (4, 5, 3)).to(torch.get_default_dtype()), lengths


def trains_hidden_markov(model, *args, steps=40, **kwargs):
    def train(make):
        guide = AutoDelta(poutine.block(model, expose=["probs_x", "probs_y"]))
        elbo = TraceEnum_ELBO(max_plate_nesting=2)
        svi = make(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
        return [svi.step(*args, **kwargs) for _ in range(steps)]

    return train


@pytest.mark.slow
def test_hidden_markov():
    """Python reads ``lengths``, which stays the same."""
    both(trains_hidden_markov(hidden_markov, *chorales(), hidden_dim=3))


@pytest.mark.slow
def test_hidden_markov_other_lengths():
    """Another tensor of the same shape means another loop and another graph."""
    sequences, lengths = chorales()
    shorter = torch.tensor([3, 2, 3, 1])

    def train(make):
        guide = AutoDelta(poutine.block(hidden_markov, expose=["probs_x", "probs_y"]))
        elbo = TraceEnum_ELBO(max_plate_nesting=2)
        svi = make(hidden_markov, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
        return [svi.step(sequences, which) for which in [lengths] * 10 + [shorter] * 10]

    both(train)


def test_hidden_markov_in_batches(monkeypatch):
    """Which sequences are drawn decides how many steps the loop has."""
    train = trains_hidden_markov(hidden_markov, *chorales(), steps=6, batch_size=2)
    message = falls_back(train, monkeypatch)
    assert "random draws" in message
    assert HERE in message
    assert "for t in pyro.markov(range(lengths.max())):" in message


def test_hidden_markov_with_a_namespace(monkeypatch):
    """The example's own signature: a graph would hold the command line's options, which may change."""

    def model(sequences, lengths, args, batch_size=None):
        hidden_markov(sequences, lengths, args.hidden_dim, batch_size)

    args = argparse.Namespace(hidden_dim=3)
    message = falls_back(trains_hidden_markov(model, *chorales(), args=args, steps=6), monkeypatch)
    assert "Namespace" in message
