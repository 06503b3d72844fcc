"""What a GPU could do differently: ``-m cuda`` runs it on one, with ``--device cpu`` or ``second`` elsewhere.

``--device second`` is :mod:`tests.second_device`, which tells on any machine whether tensors of two devices
meet.  Tests run with data and model on the device by hand, in float32, and with the device as torch's
default, in float64.
"""

import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.optim import Adam

from pyro_flowvi import AutoRealNVP, CompiledSVI, FlowVAE, VMoNF, diagnose, fit
from pyro_flowvi._program.devices import check_devices
from pyro_flowvi.flows import FLOWS
from pyro_flowvi.models import Minibatches, MLPDecoder, MLPEncoder
from tests.guides import GUIDES, KINDS

cuda = pytest.mark.cuda
pytestmark = pytest.mark.filterwarnings("ignore:.*eager.*")
WAYS = ["by hand", "default"]


def regression(x, y):
    weights = pyro.sample("weights", dist.Normal(torch.zeros_like(x[0]), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones_like(y[0])))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(weights @ x.mT, scale), obs=y)


def one_by_one(x, y):
    """The same, written so that it runs for one draw at a time."""
    weights = pyro.sample("weights", dist.Normal(torch.zeros_like(x[0]), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones_like(y[0])))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ weights, scale), obs=y)


def rows_of_a_plate(y, device=None):
    centre = pyro.sample("centre", dist.Normal(torch.zeros_like(y[0]), 1.0))
    with pyro.plate("rows", len(y), subsample_size=20, device=device) as i:
        own = pyro.sample("own", dist.Normal(centre, 1.0))
        pyro.sample("y", dist.Normal(own, 0.5), obs=y[i])


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


@pytest.fixture
def place(way, device):
    if way == "default" and device.type != "cpu":
        torch.set_default_device(device)
    return device


@pytest.fixture
def data(way, place):
    dtype = {"by hand": torch.float32, "default": torch.float64}[way]
    x = torch.randn(40, 3, dtype=torch.float64, device="cpu")
    y = x @ torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64, device="cpu")
    y = y + 0.5 * torch.randn(40, dtype=torch.float64, device="cpu")
    torch.set_default_dtype(dtype)
    return x.to(place, dtype), y.to(place, dtype)


def lie_on(device, tensors):
    return all(t.device.type == device.type for t in tensors)


@cuda
@pytest.mark.parametrize("key", FLOWS)
def test_registry_round_trip(key, place):
    flow = FLOWS[key](4, num_layers=2, hidden=(5,)).to(place)
    x = torch.randn(7, 4, device=place)
    y, log_det = flow.forward_and_log_det(x)
    back, inverse_log_det = flow.inverse_and_log_det(y)
    assert lie_on(place, (y, log_det, back))
    assert torch.allclose(back, x, atol=1e-4)
    assert torch.allclose(log_det, -inverse_log_det, atol=1e-4)


@cuda
@pytest.mark.parametrize("kind", GUIDES)
def test_guide_contract(kind, data, place):
    guide = GUIDES[kind](regression).materialize(*data)
    svi = SVI(regression, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    assert all(torch.tensor(svi.step(*data)).isfinite() for _ in range(2))
    draws = guide.sample_posterior(5)
    assert lie_on(place, [*draws.values(), *guide.parameters(), *guide.median().values()])
    assert {value.dtype for value in draws.values()} == {data[0].dtype}
    assert guide.log_prob(draws).isfinite().all()


# Probes run over the noise of the one guide and over the latents of the other.
@cuda
@pytest.mark.parametrize(("kind", "way"), [*zip(KINDS, WAYS * 2, strict=True)], indirect=["way"])
def test_fit_and_diagnose(kind, data, place):
    guide = GUIDES[kind](regression)
    result = fit(regression, guide, *data, num_steps=40, seed=0, progress=False, compile=False)
    assert lie_on(place, guide.parameters())
    assert abs(float(guide.sample_posterior(500)["weights"].mean(0)[0]) - 1.0) < 0.4
    assert result.best_loss < 60.0
    probes = kind in ("realnvp", "cif")
    diagnosis = diagnose(regression, guide, *data, num_samples=500, probes=probes)
    assert diagnosis.verdict


@cuda
def test_moved_after_set_up(data, place):
    guide = AutoRealNVP(one_by_one, num_layers=2).materialize(*data)
    guide.to("cpu").to(place)
    fit(one_by_one, guide, *data, num_steps=5, seed=0, progress=False)
    assert lie_on(place, guide.sample_posterior(3).values())


@cuda
def test_compiled_svi_equals_eager(data, place, request):
    if place.type not in ("cpu", "cuda"):
        pytest.skip("nothing is compiled for this device")
    losses = []
    for choice in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoRealNVP(regression, num_layers=2)
        svi = CompiledSVI(regression, guide, Adam({"lr": 1e-2}), Trace_ELBO(), compile=choice)
        losses.append(svi.run(50, *data, progress=False).cpu())
        assert svi.compiled == choice
    assert torch.allclose(
        *(x.double() for x in losses), rtol=1e-2 if data[0].dtype == torch.float32 else 1e-6
    )


@cuda
@pytest.mark.parametrize("told", [True, False], ids=["indices on the device", "indices anywhere"])
def test_rows_of_a_subsampled_plate(told, place):
    y = torch.randn(100, device=place)
    guide = AutoRealNVP(rows_of_a_plate)
    device = str(place) if told else None
    fit(rows_of_a_plate, guide, y, device=device, num_steps=30, seed=0, progress=False)
    assert lie_on(place, guide.parameters())


@cuda
def test_mixture(place):
    x = torch.cat([torch.randn(50, 2) - 3.0, torch.randn(50, 2) + 3.0]).to(place)
    vmonf = VMoNF(2, 2, num_layers=2, hidden=(8,)).to(place)
    svi = SVI(vmonf.model, vmonf.guide, Adam({"lr": 1e-2}), TraceEnum_ELBO(max_plate_nesting=1))
    assert torch.tensor(svi.step(x)).isfinite()
    assert lie_on(place, [vmonf.responsibilities(x), vmonf.sample(5)])


@cuda
def test_flow_vae(place):
    encoder, decoder = MLPEncoder((1, 4, 4), (16,)), MLPDecoder(2, (1, 4, 4), (16,))
    vae = FlowVAE(encoder, decoder, "planar", num_layers=2, amortize="hypernetwork").to(place)
    batches = Minibatches(torch.rand(100, 1, 4, 4).to(place), 20)
    fit(vae.model, vae.guide, batches=batches, num_steps=10, num_particles=1, lr=1e-2, progress=False)
    assert lie_on(place, [vae.log_prob(batches(0), 10), vae.sample(3)])


@cuda
def test_data_elsewhere(data, place):
    if place.type == "cpu":
        pytest.skip("the CPU alone")
    guide = AutoRealNVP(regression, num_layers=2).materialize(*data)
    with pytest.raises(ValueError, match=rf"y: .*guide's device {place.type}.*, got a tensor on cpu"):
        check_devices(regression, guide, data[:1], {"y": data[1].cpu()})


@pytest.mark.long
def test_on_a_second_device():
    # One of the fits: its thousands of operations, each checked in Python, take a minute.
    chosen = ["-k", "not test_fit_and_diagnose or realnvp"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "--device", "second", *chosen, __file__]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:]
