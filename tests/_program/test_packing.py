"""Latents as one vector: there and back, against the transforms of torch."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_flowvi._program.packing import Packing


def model():
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("none", dist.Normal(torch.zeros(0), 1.0).to_event(1))
    with pyro.plate("rows", 3):
        pyro.sample("p", dist.Dirichlet(torch.ones(4)))


@pytest.fixture
def packed():
    nodes = poutine.trace(model).get_trace().nodes
    return Packing({name: nodes[name] for name in ("scale", "none", "p")})


@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
def test_there_and_back(packed, batch):
    z = torch.randn(*batch, 1 + 3 * 3)
    values = packed.constrain(z)
    assert {name: value.shape for name, value in values.items()} == {
        "scale": batch,
        "none": (*batch, 0),
        "p": (*batch, 3, 4),
    }
    stick = torch.distributions.StickBreakingTransform()
    parts = z[..., 1:].unflatten(-1, (3, 3))
    truth = z[..., 0] + stick.log_abs_det_jacobian(parts, stick(parts)).sum(-1)
    assert torch.allclose(values["p"], stick(parts))
    again, log_det = packed.unconstrain(values)
    assert torch.allclose(again, z)
    assert torch.allclose(log_det, truth)
    checked, also, inside = packed.pack(values, z)
    assert torch.equal(checked, again)
    assert torch.allclose(also, truth)
    assert inside.shape == batch
    assert inside.all()


def test_values_outside_are_marked(packed):
    values = packed.constrain(torch.randn(4, 10))
    values["scale"][2] = -1.0
    z, log_det, inside = packed.pack(values, torch.zeros(()))
    assert inside.tolist() == [True, True, False, True]
    assert z.isfinite().all()
    assert log_det.isfinite().all()


@pytest.mark.parametrize("wrong", [torch.zeros(4, 2, 4), torch.full((4, 3, 4), torch.nan)])
def test_wrong_values_are_refused(packed, wrong):
    values = packed.constrain(torch.randn(4, 10))
    with pytest.raises(ValueError, match=r"samples\['p'\]: expected shape \(\*, 3, 4\) without NaN"):
        packed.pack({**values, "p": wrong}, torch.zeros(()))
    with pytest.raises(ValueError, match="samples: expected the sites"):
        packed.pack({"p": values["p"]}, torch.zeros(()))


def test_logarithms():
    sites = {
        "mu": dist.Normal(torch.zeros(2), 1.0),
        "tau": dist.HalfCauchy(torch.ones(2)).to_event(1),
        "late": dist.Pareto(3.0, 2.0),
        "share": dist.Beta(1.0, 1.0),
        "mix": dist.Dirichlet(torch.ones(3)),
    }
    trace = {name: {"fn": fn, "value": fn.sample()} for name, fn in sites.items()}
    packing = Packing(trace, {"tau": torch.tensor([True, False])})
    found = dict(zip(packing.names(), packing.logarithms().tolist(), strict=True))
    assert {name for name, is_log in found.items() if is_log} == {"tau[1]", "late"}
    assert len(found) == packing.dim
