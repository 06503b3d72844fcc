"""Loops of one's own around Pyro's ELBO module: DistributedDataParallel on two processes, and Lightning."""

import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch.nn.parallel import DistributedDataParallel

from pyro_flowvi import AutoFlowMixture, AutoRealNVP

pytestmark = pytest.mark.long

SIZE, STEPS, RATE = 2, 3, 1e-2


def hierarchy(y):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


def y():
    return torch.linspace(-1.0, 3.0, 6)


OBJECTIVE = {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 1}
GUIDES = {
    "flow": (lambda: AutoRealNVP(hierarchy, num_layers=2, structure=None), Trace_ELBO),
    "structured": (lambda: AutoRealNVP(hierarchy, num_layers=2, structure="program"), Trace_ELBO),
    "mixture": (lambda: AutoFlowMixture(hierarchy, num_components=2, num_layers=2), TraceEnum_ELBO),
}


def made(name, seed):
    """The ELBO as a module, of a guide that is set up."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide, objective = GUIDES[name][0](), GUIDES[name][1]
    guide.materialize(y())
    module = objective(**OBJECTIVE)(hierarchy, guide)
    assert list(module.parameters())
    return module


def noise(step, rank):
    pyro.set_rng_seed(1000 + 10 * step + rank)


def state(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def process(rank, name, folder):
    """One of two, whose guide starts elsewhere than the other's and whose draws are its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=SIZE
    )
    try:
        module = made(name, seed=rank)
        parallel = DistributedDataParallel(module, find_unused_parameters=True)
        optim = torch.optim.Adam(parallel.parameters(), RATE)
        for step in range(STEPS):
            noise(step, rank)
            optim.zero_grad()
            parallel(y()).backward()
            optim.step()
        torch.save(state(module), folder / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def alone(name):
    """One process that takes the mean of both gradients."""
    module = made(name, seed=0)
    optim = torch.optim.Adam(module.parameters(), RATE)
    for step in range(STEPS):
        optim.zero_grad()
        for rank in range(SIZE):
            noise(step, rank)
            (module(y()) / SIZE).backward()
        optim.step()
    return state(module)


@pytest.mark.parametrize("name", GUIDES)
def test_two_processes_take_the_steps_of_one(name, tmp_path):
    torch.multiprocessing.spawn(process, (name, tmp_path), nprocs=SIZE)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(SIZE))
    torch.set_default_dtype(torch.float64)
    start, expected = state(made(name, seed=0)), alone(name)
    assert one.keys() == other.keys() == expected.keys()
    for key in expected:
        assert torch.equal(one[key], other[key]), key
        torch.testing.assert_close(one[key], expected[key], rtol=1e-9, atol=1e-10)
    assert any(not torch.equal(one[key], start[key]) for key in start)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GUIDES)
def test_lightning(name, tmp_path):
    lightning = pytest.importorskip("lightning")
    torch.set_default_dtype(torch.float64)
    module = made(name, seed=0)

    class Fit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.elbo = module

        def training_step(self, batch, index):
            noise(index, 0)
            return self.elbo(y())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), RATE)

    again = copy.deepcopy(state(module))
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Fit(), torch.utils.data.DataLoader(torch.zeros(STEPS, 1)))
    found = state(module)
    module.load_state_dict(again)
    optim = torch.optim.Adam(module.parameters(), RATE)
    for step in range(STEPS):
        noise(step, 0)
        optim.zero_grad()
        module(y()).backward()
        optim.step()
    for key, value in state(module).items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-10)
