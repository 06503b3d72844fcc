"""Models, guides and exact gradients that the objectives are held against."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_flowvi import AutoFlow
from pyro_flowvi.transforms import LowerAffine

MEAN = torch.tensor([1.0, -2.0], dtype=torch.float64)
TRIL = torch.tensor([[1.5, 0.0], [0.8, 0.5]], dtype=torch.float64)
BETA = 0.3
FINITE = pytest.mark.filterwarnings("ignore:Encountered")


def target():
    return dist.MultivariateNormal(MEAN, scale_tril=TRIL)


def gaussian():
    pyro.sample("x", target())


def gradients(elbo, model, guide, params, num=150, args=()):
    """Estimates one below the other, shape ``(num, number of parameters)``."""
    rows = []
    for _ in range(num):
        loss = elbo.differentiable_loss(model, guide, *args)
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
    return torch.stack(rows)


def exact_gradient(loss, params):
    grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.reshape(-1) for grad in grads])


def z_scores(draws, exact):
    """Errors of the mean in standard errors; rounding, 1e-9, counts as none."""
    error = (draws.mean(0) - exact).abs()
    se = draws.std(0) / math.sqrt(len(draws))
    return torch.where(error < 1e-9, 0.0, error / se)


def assert_unbiased(draws, exact):
    assert exact.abs().max() > 0.05, "a gradient that could not be told from none"
    assert z_scores(draws, exact).max() < 4.5


# -- Gaussian guides, and their divergence from a Gaussian, by closed form ---------------------------
def flow_normal(guide):
    """The normal of a guide whose flow is affine, from the images of the origin and the unit vectors."""
    flow = guide.flow
    loc = flow(torch.zeros(2))
    return dist.MultivariateNormal(loc, scale_tril=(flow(torch.eye(2)) - loc).mT)


def perturb(guide, scale=0.3):
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(scale * torch.randn_like(param))
    return guide


def auto_normal(exactly):
    guide = AutoNormal(gaussian)
    guide()
    return perturb(guide), lambda: dist.Normal(guide.locs.x, guide.scales.x).to_event(1)


def auto_multivariate(exactly):
    guide = AutoMultivariateNormal(gaussian)
    guide()
    if exactly:
        with torch.no_grad():
            guide.loc.copy_(MEAN)
        guide.scale = TRIL.diagonal().clone()
        guide.scale_tril = TRIL / TRIL.diagonal().unsqueeze(-1)
    else:
        perturb(guide)
    return guide, guide.get_posterior


def auto_affine_flow(exactly):
    guide = AutoFlow(gaussian, LowerAffine, name="affine")
    guide()
    if exactly:
        set_affine(guide)
    else:
        perturb(guide)
    return guide, lambda: flow_normal(guide)


def set_affine(guide):
    with torch.no_grad():
        guide.affine.loc.copy_(MEAN)
        guide.affine.log_scale.copy_(TRIL.diagonal().log())
        guide.affine.lower.copy_(TRIL / TRIL.diagonal().unsqueeze(-1))


GUIDES = {"normal": auto_normal, "multivariate": auto_multivariate, "flow": auto_affine_flow}


def stored(*names):
    return [pyro.param(name).unconstrained() for name in names]
