"""Hidden Markov models and other sequences of Pyro's examples."""

import argparse
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.epidemiology.models import SimpleSIRModel
from pyro.contrib.forecast import ForecastingModel
from pyro.infer import config_enumerate
from pyro.infer.reparam import DiscreteCosineReparam, LocScaleReparam, StableReparam
from pyro.ops.indexing import Vindex
from torch import nn

from pyro_flowvi import AutoIAF, FitDiverged

from .case import SMALL, Case, Problem, Refusal, summed

LENGTHS = (5, 3, 4, 5)
PARALLEL = {"enumerate": "parallel"}


def chorales():
    """Three tones of two states, four sequences of up to five chords."""
    state, chords = (torch.rand(4, 1) < 0.5).long().squeeze(-1), []
    tones = torch.tensor([[0.1, 0.1, 0.7], [0.9, 0.8, 0.1]])
    for _ in range(5):
        chords.append(torch.bernoulli(tones[state]))
        state = torch.where(torch.rand(4) < 0.2, 1 - state, state)
    return torch.stack(chords, 1)


def hidden_markov(kind):
    """``kind``: "plain", "regressive" (tones depend on those before), "factorial" (two chains)."""
    more = {"plain": [], "regressive": [2], "factorial": [2]}[kind]

    def model(sequences, lengths, args, include_prior=True):
        num, longest, tones = map(int, sequences.shape)
        assert lengths.max() <= longest
        shape = [2, *more, tones]
        with poutine.mask(mask=include_prior):
            stay = dist.Dirichlet(0.9 * torch.eye(2) + 0.1).to_event(1)
            probs_x = pyro.sample("probs_x", stay)
            probs_w = pyro.sample("probs_w", stay) if kind == "factorial" else None
            probs_y = pyro.sample("probs_y", dist.Beta(0.5, 0.9).expand(shape).to_event(len(shape)))
        tones_plate = pyro.plate("tones", tones, dim=-1)
        with pyro.plate("sequences", num, dim=-2):
            w = x = y = 0
            for t in pyro.markov(range(longest if args.jit else lengths.max())):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    if probs_w is not None:
                        w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]), infer=PARALLEL)
                    x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                    with tones_plate as tone:
                        other = {"regressive": y, "factorial": w}.get(kind)
                        probs = probs_y[x.squeeze(-1)] if kind == "plain" else probs_y[x, other, tone]
                        y = pyro.sample(f"y_{t}", dist.Bernoulli(probs), obs=sequences[:, t]).long()

    return Problem(model, (chorales(), torch.tensor(LENGTHS), argparse.Namespace(jit=False)))


def one_by_one():
    """Sequences in a Python loop, as ``hmm`` model 0."""

    def model(sequences, lengths):
        tones = sequences.shape[-1]
        probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(2) + 0.1).to_event(1))
        probs_y = pyro.sample("probs_y", dist.Beta(0.5, 0.9).expand([2, tones]).to_event(2))
        plate = pyro.plate("tones", tones, dim=-1)
        for i in pyro.plate("sequences", len(sequences)):
            x = 0
            for t in pyro.markov(range(lengths[i])):
                x = pyro.sample(f"x_{i}_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                with plate:
                    pyro.sample(f"y_{i}_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequences[i, t])

    return Problem(model, (chorales(), torch.tensor(LENGTHS)))


def summed_by_a_distribution():
    """``DiscreteHMM``, as ``hmm`` model 7; sequences of one length."""

    def model(sequences):
        num, _, tones = sequences.shape
        probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(2) + 0.1).to_event(1))
        probs_y = pyro.sample("probs_y", dist.Beta(0.5, 0.9).expand([2, tones]).to_event(2))
        with pyro.plate("sequences", num):
            first = torch.tensor([1.0, 0.0]).log()
            states = dist.DiscreteHMM(first, probs_x.log(), dist.Bernoulli(probs_y).to_event(1))
            pyro.sample("y", states, obs=sequences)

    return Problem(model, (chorales(),))


def seals():
    """Random effects of groups and of individuals on the transitions, a parameter for each state's steps."""

    def model(moves):
        positive = dist.constraints.positive
        shape = pyro.param("shape", lambda: torch.tensor([1.0, 3.0]), constraint=positive)
        rate = pyro.param("rate", lambda: torch.tensor([2.0, 1.0]), constraint=positive)
        with pyro.plate("group", moves.shape[1], dim=-1):
            group = pyro.sample("group_effect", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            with pyro.plate("individual", moves.shape[0], dim=-2):
                own = pyro.sample("own_effect", dist.Normal(torch.zeros(4), 1.0).to_event(1))
                logits, y = (group + own).unflatten(-1, (2, 2)), torch.tensor(0)
                for t in pyro.markov(range(moves.shape[2])):
                    step = dist.Categorical(logits=Vindex(logits)[..., y, :])
                    y = pyro.sample(f"y_{t}", step, infer=PARALLEL)
                    pyro.sample(f"step_{t}", dist.Gamma(shape[y], rate[y]), obs=moves[..., t])

    return Problem(model, (torch.rand(3, 2, 4) * 3 + 0.1,))


class DeepMarkov(nn.Module):
    """States by a gated network, tones by another one."""

    def __init__(self, tones=3, dim=2, width=5):
        super().__init__()
        self.emit = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, tones))
        self.gate = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim), nn.Sigmoid())
        self.proposed = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim))
        self.straight, self.scale = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.first = nn.Parameter(torch.zeros(dim))

    def forward(self, x, mask, annealing=1.0):
        pyro.module("deep_markov", self)
        z = self.first.expand(len(x), -1)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                gate, proposed, seen = self.gate(z), self.proposed(z), mask[:, t : t + 1]
                loc = (1 - gate) * self.straight(z) + gate * proposed
                scale = nn.functional.softplus(self.scale(proposed.relu()))
                with poutine.scale(scale=annealing):
                    state = dist.Normal(loc, scale).mask(seen).to_event(1)
                    z = pyro.sample(f"z_{t}", state)
                pyro.sample(f"x_{t}", dist.Bernoulli(logits=self.emit(z)).mask(seen).to_event(1), obs=x[:, t])


def deep_markov():
    return Problem(DeepMarkov(), (chorales(), torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(-1)))


def outbreak():
    """``sir_hmc``, states rounded at random: no density at most of the guide's draws."""
    population = 10

    def rounded(name, x):
        low = x.detach().floor()
        t = x - low
        return (low + pyro.sample(name, dist.Bernoulli(t * t * (3 - 2 * t)))).clamp(0, population)

    @config_enumerate
    def model(data):
        prob_s = pyro.sample("prob_s", dist.Uniform(0.0, 1.0))
        prob_i = pyro.sample("prob_i", dist.Uniform(0.0, 1.0))
        rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
        free = dist.Uniform(-0.5, population + 0.5).expand(data.shape).to_event(1)
        s_aux, i_aux = pyro.sample("s_aux", free), pyro.sample("i_aux", free)
        s, i = torch.tensor(population - 1.0), torch.tensor(1.0)
        for t, datum in pyro.markov(enumerate(data)):
            s_next, i_next = rounded(f"s_{t}", s_aux[..., t]), rounded(f"i_{t}", i_aux[..., t])
            new = s - s_next
            pyro.sample(f"s2i_{t}", dist.ExtendedBinomial(s, prob_s * i / population), obs=new)
            pyro.sample(f"i2r_{t}", dist.ExtendedBinomial(i, prob_i), obs=i - i_next + new)
            pyro.sample(f"obs_{t}", dist.ExtendedBinomial(new.clamp(min=0), rho), obs=datum)
            s, i = s_next, i_next

    return Problem(model, (torch.tensor([0.0, 1.0, 1.0, 2.0]),))


def relaxed_outbreak():
    """``CompartmentalModel`` as its own ``fit_svi`` trains it; that takes no guide."""
    sir = SimpleSIRModel(population=20, recovery_time=3.0, data=torch.tensor([0.0, 1, 1, 3, 2, 1]))
    sir.relaxed, sir.num_quant_bins = True, 1
    return Problem(sir._relaxed_model)


def stable():
    """Heavy-tailed returns, with Stable's density replaced by Gaussian latents."""

    def model(returns):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        stability = pyro.sample("stability", dist.Uniform(1.0, 2.0))
        with pyro.plate("days", len(returns)):
            pyro.sample("r", dist.Stable(stability, 0.0, scale, 0.0), obs=returns)

    return Problem(poutine.reparam(model, {"r": StableReparam()}), (torch.randn(10),))


def volatility():
    def model(returns):
        num = len(returns)
        start = pyro.sample("start", dist.Normal(0.0, 1.0)).unsqueeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.5)).unsqueeze(-1)
        v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([num]).to_event(1))
        with pyro.plate("days", num):
            pyro.sample("r", dist.Normal(0.0, (start + sigma * v.cumsum(-1)).exp()), obs=returns)

    return Problem(poutine.reparam(model, {"v": DiscreteCosineReparam()}), (torch.randn(20),))


class Trend(ForecastingModel):
    def model(self, zero_data, covariates):
        bias = pyro.sample("bias", dist.Normal(0.0, 10.0))[..., None, None]
        weight = pyro.sample("weight", dist.Normal(0.0, 0.3))[..., None, None]
        drift_scale = pyro.sample("drift_scale", dist.LogNormal(-2.0, 1.0))[..., None, None]
        with self.time_plate, poutine.reparam(config={"drift": LocScaleReparam()}):
            drift = pyro.sample("drift", dist.Normal(zero_data, drift_scale).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0))[..., None, None]
        self.predict(dist.Normal(0.0, scale), drift.cumsum(-2) + bias + weight * covariates)


def trend():
    """Simulated with a bias of 5 and a weight of .3."""
    time = torch.arange(12.0).unsqueeze(-1)

    def check(draws):
        assert abs(draws["bias"].mean() - 5) < 3 * draws["bias"].std()
        assert abs(draws["weight"].mean() - 0.3) < 3 * draws["weight"].std()

    return Problem(Trend(), (5.0 + 0.3 * time + 0.3 * torch.randn(12, 1), time), check)


BY_ARGS = {
    "compiled": "eager",
    "cause": "an argument is a Namespace",
    "remark": "its options come as a `Namespace`, which a graph cannot watch as an argument: pass tensors",
}

CASES = [
    Case("hmm_plain", "`hmm`, model 1", partial(hidden_markov, "plain"), loss=summed(2), **BY_ARGS),
    Case(
        "hmm_regressive",
        "`hmm`, model 2",
        partial(hidden_markov, "regressive"),
        loss=summed(2),
        slow=True,
        **BY_ARGS,
    ),
    Case(
        "hmm_factorial",
        "`hmm`, model 3",
        partial(hidden_markov, "factorial"),
        loss=summed(2),
        slow=True,
        **BY_ARGS,
    ),
    Case("hmm_one_by_one", "`hmm`, model 0: a loop", one_by_one, loss=summed(1), slow=True),
    Case("hmm_summed", "`hmm`, model 7: `DiscreteHMM`", summed_by_a_distribution),
    Case(
        "seals",
        "`mixed_hmm`, random effects",
        seals,
        loss=summed(2),
        behind=True,
        slow=True,
        fit_options={"lr": 0.02},
    ),
    Case(
        "deep_markov",
        "`dmm`, sequences in full",
        deep_markov,
        partial(AutoIAF, **SMALL),
        "`AutoIAF`",
        slow=True,
        fit_options={"lr": 0.02},
    ),
    Case(
        "outbreak",
        "`sir_hmc`, states rounded at random",
        outbreak,
        loss=summed(0),
        refusal=Refusal(FitDiverged, "draws where the model has no density"),
        remark="densities are zero around almost all states, for Pyro's guides too: NUTS",
    ),
    Case(
        "relaxed_outbreak",
        "`contrib.epidemiology`, relaxed",
        relaxed_outbreak,
        remark="`fit_svi` takes no guide: the model is its private `_relaxed_model`",
    ),
    Case(
        "stable",
        "stable returns, `StableReparam`",
        stable,
        compiled="eager",
        cause="read by Python",
        svi_steps=400,
        slow=True,
        remark="Pyro's code for Stable reads the parameters",
    ),
    Case("volatility", "stochastic volatility, `DiscreteCosineReparam`", volatility),
    Case("trend", "`ForecastingModel`, `LocScaleReparam`", trend),
]
