import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowvi import AutoPlanar
from pyro_flowvi._program.devices import check_devices


def model(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(slope * x, 1.0).to_event(1), obs=y)


def test_names_argument_and_devices():
    x, y = torch.ones(3), torch.zeros(3)
    guide = AutoPlanar(model, num_layers=2).materialize(x, y)
    check_devices(model, guide, (x,), {"y": y})
    with pytest.raises(ValueError, match=r"y: expected data on the guide's device .*, got a tensor on meta"):
        check_devices(model, guide, (x,), {"y": y.to("meta")})
    with pytest.raises(ValueError, match=r"args\[1\]: .*got a tensor on meta"):
        check_devices(model, guide, (x, [y.to("meta")]), {})


def test_a_guide_without_parameters_takes_any():
    y = torch.zeros(3, device="meta")
    check_devices(model, AutoPlanar(model, num_layers=2), (y, y), {})
    check_devices(model, lambda x, y: None, (y, y), {})


def test_a_model_that_moves_its_data():
    def moves(x, y):
        model(torch.ones_like(x, device=torch.get_default_device()), None)

    guide = AutoPlanar(model, num_layers=2).materialize(torch.ones(3), torch.zeros(3))
    check_devices(moves, guide, (torch.ones(3, device="meta"), None), {})
