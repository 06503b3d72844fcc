"""Networks trained along with a guide of ours, deep exponential families, Gaussian processes."""

from functools import partial
from itertools import pairwise

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro.contrib.bnn import HiddenLayer
from pyro.contrib.cevae import CEVAE
from pyro.nn import PyroSample
from torch import nn

from pyro_flowvi import AutoRealNVP

from .case import SMALL, Case, Problem, Refusal, summed


def images(num=40):
    """Of eight pixels, with two factors."""
    return torch.bernoulli((2 * torch.randn(num, 2) @ torch.randn(2, 8)).sigmoid())


def network(*sizes):
    layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers[:-1] for part in (layer, nn.Softplus())], layers[-1])


def vae(batch_size=None):
    decoder = network(2, 6, 8)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), batch_size) as rows:
            z = pyro.sample("latent", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x[rows])

    return Problem(model, (images(),))


def conditional_vae():
    prior, decoder = network(4, 6, 4), network(6, 8, 4)

    def model(x, y=None):
        pyro.module("prior", prior)
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = prior(x).chunk(2, -1)
            z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            logits = decoder(torch.cat([z, x.expand((*z.shape[:-1], 4))], -1))
            pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)

    return Problem(model, tuple(images().split(4, -1)))


def labels_and_styles():
    """``ss_vae`` without labels: they are summed out."""
    decoder = network(4, 6, 8)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            one_hot = dist.OneHotCategorical(torch.ones(2) / 2)
            y = pyro.sample("y", one_hot, infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            both = torch.cat(torch.broadcast_tensors(y, z), -1)
            pyro.sample("x", dist.Bernoulli(logits=decoder(both)).to_event(1), obs=x)

    return Problem(model, (images(20),))


def documents():
    """A topic model with a batch norm behind the decoder."""
    decoder = nn.Sequential(nn.Linear(3, 10, bias=False), nn.BatchNorm1d(10, affine=False))

    def model(docs):
        pyro.module("decoder", decoder)
        with pyro.plate("documents", len(docs)):
            logits = pyro.sample("logtheta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("obs", dist.Multinomial(12, logits=decoder(logits.softmax(-1))), obs=docs)

    return Problem(model, (dist.Multinomial(12, torch.ones(10) / 10).sample((15,)),))


def gammas():
    """``sparse_gamma_def`` with two layers, weights in one long plate each."""

    def model(x):
        num, pixels = x.shape
        with pyro.plate("top_weights", 6):
            w_top = pyro.sample("w_top", dist.Gamma(0.5, 0.3)).unflatten(-1, (2, 3))
        with pyro.plate("bottom_weights", 3 * pixels):
            w_bottom = pyro.sample("w_bottom", dist.Gamma(0.5, 0.3)).unflatten(-1, (3, pixels))
        with pyro.plate("data", num):
            z_top = pyro.sample("z_top", dist.Gamma(0.5, 0.5).expand([2]).to_event(1))
            z_mid = pyro.sample("z_mid", dist.Gamma(0.5, 0.5 / (z_top @ w_top)).to_event(1))
            pyro.sample("obs", dist.Poisson(z_mid @ w_bottom).to_event(1), obs=x)

    return Problem(model, (torch.poisson(torch.full((8, 5), 2.0)),))


def causal():
    """CEVAE's own model, a row with latents each."""
    cevae = CEVAE(feature_dim=3, outcome_dist="bernoulli", latent_dim=2, hidden_dim=6, num_layers=2)
    x = torch.randn(30, 3)
    t = torch.bernoulli(torch.full((30,), 0.5))
    return Problem(cevae.model, (x, t, torch.bernoulli((x[:, 0] + t).sigmoid())))


def kernel_with_priors():
    """Truth: quadrature over both parameters of the kernel."""
    x = torch.linspace(0.0, 4.0, 12)
    y = x.sin() + 0.1 * torch.randn(12)
    kernel = gp.kernels.RBF(input_dim=1)
    kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 1.0))
    kernel.variance = PyroSample(dist.LogNormal(0.0, 1.0))
    regression = gp.models.GPRegression(x, y, kernel, noise=torch.tensor(0.01))
    axis = torch.linspace(-2.5, 4.5, 120)
    length, variance = (each.flatten().exp() for each in torch.meshgrid(axis, axis, indexing="ij"))
    cov = variance[:, None, None] * (-0.5 * ((x[:, None] - x) / length[:, None, None]).square()).exp()
    cov = cov + (0.01 + regression.jitter) * torch.eye(12)
    log_p = dist.MultivariateNormal(torch.zeros(12), cov).log_prob(y)
    log_p += dist.Normal(0.0, 1.0).log_prob(length.log()) + dist.Normal(0.0, 1.0).log_prob(variance.log())
    share = log_p.softmax(0)

    def check(draws):
        for site, exact in (("kernel.lengthscale", length), ("kernel.variance", variance)):
            assert abs(draws[site].log().mean() - share @ exact.log()) < 0.05

    return Problem(regression.model, check=check)


def values_of_a_process():
    x = torch.linspace(-2.0, 2.0, 10)
    kernel = gp.kernels.RBF(input_dim=1)
    model = gp.models.VariationalGP(x, (x > 0).to(x), kernel, likelihood=gp.likelihoods.Binary())
    return Problem(model.model)


def coin():
    def model(y):
        p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    return Problem(model, (torch.tensor([1.0, 0.0, 1.0]),))


def objects():
    """``air``: whether another object is there is a discrete latent of each step."""
    decoder = nn.Linear(2, 6)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            image, present = torch.zeros(6), torch.ones(len(x), 1)
            for t in range(2):
                present = pyro.sample(f"z_pres_{t}", dist.Bernoulli(0.5 * present).to_event(1))
                z = pyro.sample(f"z_what_{t}", dist.Normal(torch.zeros(2), 1.0).mask(present).to_event(1))
                image = image + decoder(z) * present
            pyro.sample("x", dist.Normal(image, 0.3).to_event(1), obs=x)

    return Problem(model, (torch.randn(5, 6),))


def hidden_layer():
    def model(x, y):
        layer = HiddenLayer(x, torch.zeros(2, 4), torch.ones(2, 4), non_linearity=torch.tanh)
        hidden = pyro.sample("hidden", layer)
        weights = pyro.sample("weights", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=(hidden * weights).sum(-1)), obs=y)

    return Problem(model, (torch.randn(5, 2), torch.ones(5)))


NETWORKS = {"fit_options": {"lr": 0.02}}

CASES = [
    Case("vae", "`vae`, all images", vae, **NETWORKS),
    Case(
        "vae_in_parts",
        "`vae`, minibatches by index",
        partial(vae, 10),
        behind=True,
        slow=True,
        remark="messages in tables, by the plate's indices",
        **NETWORKS,
    ),
    Case(
        "vae_encoder",
        "`vae`, an encoder",
        vae,
        partial(AutoRealNVP, amortize="auto", **SMALL),
        '`AutoRealNVP`, `amortize="auto"`',
        compiled="eager",
        cause="something that changes between steps",
        remark="the compiled loss is another one, which the check of the first steps finds",
        steps=600,
        slow=True,
        **NETWORKS,
    ),
    Case("conditional_vae", "`cvae`", conditional_vae, slow=True, **NETWORKS),
    Case(
        "labels_and_styles",
        "`ss_vae`, no labels",
        labels_and_styles,
        loss=summed(1),
        behind=True,
        slow=True,
        **NETWORKS,
    ),
    Case(
        "documents",
        "ProdLDA, a batch norm in the decoder",
        documents,
        warns="CompileWarning",
        steps=60,
        slow=True,
        remark="batch norm in training couples a batch: draw by draw, after a warning",
        **NETWORKS,
    ),
    Case(
        "gammas",
        "`sparse_gamma_def`, two layers",
        gammas,
        unsteady=True,
        slow=True,
        remark="`diagnose` says poor after 200 steps",
    ),
    Case("causal", "`contrib.cevae`", causal, slow=True, **NETWORKS),
    Case("kernel_with_priors", "`contrib.gp`: `GPRegression`, priors on the kernel", kernel_with_priors),
    Case(
        "values_of_a_process",
        "`contrib.gp`: `VariationalGP`, binary",
        values_of_a_process,
        warns="CompileWarning",
        slow=True,
        remark="its `model` draws numbers that no site holds: draw by draw, after a warning",
    ),
    Case(
        "coin",
        "maximum likelihood, no latents",
        coin,
        refusal=Refusal(ValueError, "at least one continuous latent site, got none"),
        remark="there is nothing to infer: Pyro's empty guide",
    ),
    Case(
        "objects",
        "`air`",
        objects,
        refusal=Refusal(ValueError, "site 'z_pres_0': expected a continuous latent"),
        remark="a discrete latent that is not summed out, with a baseline in the example",
    ),
    Case(
        "hidden_layer",
        "`contrib.bnn`: `HiddenLayer`",
        hidden_layer,
        refusal=Refusal(ValueError, "what its support is, got HiddenLayer"),
        remark="a distribution without a support; Pyro's autoguides cannot draw it either",
    ),
]
