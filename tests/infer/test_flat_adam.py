"""Adam on flat tensors against that of torch."""

import pytest
import torch

from pyro_flowvi._compile.optimizers import FlatParameters, Rule, flatten


def gradients(steps, shapes):
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    return [[torch.randn(shape, **options) for shape in shapes] for _ in range(steps)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_at_given_rates_are_those_of_torch(weight_decay):
    shapes = [(3,), (), (2, 4)]
    start = gradients(1, shapes)[0]
    theirs = [value.clone().requires_grad_() for value in start]
    optim = torch.optim.Adam(theirs, weight_decay=weight_decay)
    ours = [value.clone() for value in start]
    flat = FlatParameters(ours, rule=Rule(weight_decay=weight_decay))
    for step, grads in enumerate(gradients(20, shapes)):
        lr = 0.1 / (1 + step)
        optim.param_groups[0]["lr"] = lr
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        optim.step()
        flat.step_in_place(flatten(grads), lr)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-12, atol=1e-14)


def test_what_is_adam_itself():
    assert Rule((0.5, 0.9), 1e-3).is_plain
    assert Rule(decoupled=True).is_plain  # of no decay
    for variant in ({"weight_decay": 0.1}, {"clip": 10.0}, {"decay": 0.99}, {"centered": True}):
        assert not Rule(**variant).is_plain
    assert not Rule(pyro_form=True).is_plain
