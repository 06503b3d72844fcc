"""Machine code draws in the program's order: with one seed, what eager torch draws."""

import pytest
import torch

from pyro_flowvi._compile.inductor import lower


def rows_then_noise(x):
    rows = torch.randperm(10)[:4]
    return (x[rows] * torch.normal(torch.zeros(4), torch.ones(4)),)


def noise_then_rows(x):
    noise = torch.normal(torch.zeros(4), torch.ones(4))
    return (x[torch.randperm(10)[:4]] * noise,)


def used_in_reverse(x):
    first, second, third = torch.randn(3), torch.poisson(x + 1.0), torch.bernoulli(torch.full((5,), 0.3))
    return third * x[0], second * third.sum(), first * second.sum()


@pytest.mark.parametrize("function", [rows_then_noise, noise_then_rows, used_in_reverse])
def test_draws_are_those_of_eager_torch(function):
    x = torch.arange(1.0, 11.0)
    step = lower(function, [x], 0)
    for seed in range(3):
        torch.manual_seed(seed)
        found = [value.clone() for value in step(x)]
        torch.manual_seed(seed)
        torch.testing.assert_close(found, list(function(x)))
