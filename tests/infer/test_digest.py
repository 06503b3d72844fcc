"""Short names of data."""

import numpy as np
import pytest
import torch

from pyro_flowvi.infer import _digest
from pyro_flowvi.infer._digest import digest

X = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)


@pytest.mark.parametrize(
    "other",
    [X.float(), X.reshape(4, 3), X + 1e-14, X.T, [X], {"x": X}, "text", 1, np.arange(12.0), np.arange(12)],
)
def test_what_differs_has_another_name(other):
    assert digest(X) == digest(X.T.contiguous().T)
    assert digest(X) != digest(other)


@pytest.mark.parametrize("x", [X.to(torch.bool), X.half(), torch.empty(0), torch.tensor(1.0), np.zeros(())])
def test_of_any_kind(x):
    assert digest(x) == digest(x.copy() if isinstance(x, np.ndarray) else x.clone())


def test_large_arrays_are_looked_at_here_and_there(monkeypatch):
    monkeypatch.setattr(_digest, "MOST_BYTES", 2**14)
    x = torch.zeros(2**13)
    before = digest(x)
    assert digest(x + 1.0) != before
    assert digest(x.numpy()) == digest(x.numpy().copy()) != before
