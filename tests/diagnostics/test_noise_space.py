"""Chains over a guide's noise: no funnel holds them, and no mode is lost."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowvi import AutoRealNVP, diagnose, fit
from pyro_flowvi.diagnostics._ranks import rhat
from pyro_flowvi.diagnostics._spaces import noise_space, whitened_space
from pyro_flowvi.flows import FLOWS
from pyro_flowvi.transforms import Compose


def hierarchy(num):
    generator = torch.Generator().manual_seed(1)
    s = torch.rand(num, generator=generator) * 1.5 + 0.5
    y = 1.0 + 0.7 * torch.randn(num, generator=generator) + s * torch.randn(num, generator=generator)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("groups", num):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, s), obs=y)

    return model


def two_modes(dim):
    def model():
        loc = torch.zeros(2, dim)
        loc[1, 0] = 8.0
        parts = dist.Normal(loc, 1.0).to_event(1)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.5, 0.5])), parts))

    return model


class TestSpaces:
    def test_the_density_is_that_of_the_latents(self):
        torch.manual_seed(0)
        flow = Compose([FLOWS["realnvp"](3)])
        z = flow.forward_and_log_det(torch.randn(500, 3))[0].detach()

        def normal(z):
            return -0.5 * z.square().sum(-1), -z

        for space in (noise_space(normal, z, flow), whitened_space(normal, z)):
            u = space.draws[:5]
            points = space.latents(u)
            torch.testing.assert_close(space.coordinates(points), u, atol=1e-4, rtol=1e-4)
            at = u.clone().requires_grad_()
            jacobian = torch.func.vmap(torch.func.jacrev(lambda v, s=space: _differentiable(s, flow, v)))(at)
            log_det = torch.linalg.slogdet(jacobian)[1]
            expected = -0.5 * points.square().sum(-1) + log_det.detach()
            torch.testing.assert_close(space.density(u)[0], expected, atol=1e-4, rtol=1e-4)


def _differentiable(space, flow, v):
    if space.latents.__qualname__.startswith("noise_space"):
        return flow.forward_and_log_det(v.to(torch.get_default_dtype()))[0].double()
    return space.latents(v)


class TestVerdicts:
    @pytest.mark.long
    def test_a_right_fit_of_a_hierarchy_is_good(self):
        model = hierarchy(100)
        guide = AutoRealNVP(model)
        result = fit(model, guide, seed=0, progress=False)
        for seed in range(3):
            found = diagnose(model, guide, seed=seed, num_samples=1000, fit_result=result)
            assert found.verdict == "good"
            assert found.probes.rhat < 1.2

    @pytest.mark.long
    def test_a_wrong_scale_of_the_groups_is_not(self):
        model = hierarchy(100)
        guide = AutoRealNVP(model)
        fit(model, guide, seed=0, progress=False)
        layer = guide.affine
        with torch.no_grad():
            layer.log_scale[1] -= math.log(2.0)  # half of the spread of log tau
        found = diagnose(model, guide, seed=0, num_samples=1000)
        assert found.verdict == "poor"

    @pytest.mark.parametrize("dim", [2, 12])
    def test_a_mode_is_found_from_a_guide_at_the_other(self, dim):
        model = two_modes(dim)
        guide = AutoRealNVP(model, init_loc_fn=lambda site: torch.zeros(dim))
        guide.materialize()
        with torch.no_grad():
            guide.affine.log_scale.fill_(0.0)
        found = diagnose(model, guide, seed=0, num_samples=1000)
        assert found.probes.missed == pytest.approx(0.5, abs=0.2)
        assert found.verdict == "poor"


class TestRhat:
    def test_of_chains_that_agree(self):
        torch.manual_seed(0)
        ranks = torch.rand(40, 20, 3).numpy()
        assert rhat(ranks, ranks) < 1.1

    def test_within_modes(self):
        """Chains of two modes agree within each, slow ones of a ridge nowhere."""
        torch.manual_seed(0)
        states = torch.randn(40, 20, 2)
        apart = states + torch.tensor([20.0, 0.0]) * (torch.arange(20) % 2).reshape(1, 20, 1)
        slow = 0.1 * states + 2.0 * torch.linspace(-1, 1, 20).reshape(1, 20, 1)
        for values, agrees in ((apart, True), (slow, False)):
            flat = values.reshape(-1, 2)
            ranks = flat.argsort(0).argsort(0).reshape(40, 20, 2) / len(flat)
            assert (rhat(ranks.numpy(), values.numpy()) < 1.2) == agrees
