"""A Gaussian for all data from that of a part."""

import torch

from pyro_flowvi.init import Gaussian
from pyro_flowvi.init.from_all_data import effort_of, find_in_frame


def test_a_normal_far_off_in_its_units():
    """Its own start is 40 of its standard deviations from the mean, and three times too wide."""
    torch.set_default_dtype(torch.float64)
    factor = torch.tensor([[0.1, 0.0], [0.05, 0.02]])
    mean, precision = torch.tensor([3.0, -2.0]), torch.linalg.inv(factor @ factor.T)
    counted = []

    def value_and_grad(z):
        counted.append(len(z))
        gradient = -(z - mean) @ precision
        return 0.5 * ((z - mean) * gradient).sum(-1), gradient

    rough = Gaussian((mean + 4.0 * factor.sum(-1)).unsqueeze(0), 3.0 * factor.unsqueeze(0), ("laplace",))
    best = find_in_frame(value_and_grad, rough, effort_of(1e9))
    torch.testing.assert_close(best.loc[0], mean, atol=1e-4, rtol=0.0)
    torch.testing.assert_close(best.scale[0] @ best.scale[0].T, factor @ factor.T, atol=1e-6, rtol=1e-3)
    assert sum(counted) < 600
