"""Minibatches and binary images."""

import pytest
import torch

from pyro_flowvi.models import Minibatches, binarize


def test_minibatches():
    values = torch.arange(250.0).div(250).reshape(250, 1)
    plain = Minibatches(values, 100, binarize=False, seed=4)
    epoch = torch.cat([plain(0), plain(1)]).flatten()
    assert len(epoch.unique()) == 200
    assert not torch.equal(torch.cat([plain(2), plain(3)]).flatten(), epoch)
    again = Minibatches(values, 100, binarize=False, seed=4)
    assert all(torch.equal(again(step), plain(step)) for step in (5, 1, 3))
    assert not torch.equal(Minibatches(values, 100, binarize=False, seed=5)(0), plain(0))
    state = torch.get_rng_state()
    drawn = Minibatches(torch.full((4000, 8), 0.3), 4000)
    assert abs(float(drawn(0).mean()) - 0.3) < 0.01
    assert not torch.equal(drawn(0), drawn(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(drawn(0).unique().tolist()) == {0.0, 1.0}


def test_bad_data():
    with pytest.raises(ValueError, match="images: expected means from 0 to 1"):
        binarize(torch.full((2, 3), 2.0))
    with pytest.raises(ValueError, match="images: expected a floating-point tensor"):
        Minibatches(torch.ones(3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="batch_size: expected at most the 3 images"):
        Minibatches(torch.ones(3, 3), 4)
    with pytest.raises(ValueError, match="seed: expected an integer"):
        binarize(torch.ones(3, 3), -1)
