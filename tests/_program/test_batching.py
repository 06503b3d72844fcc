"""Many runs as one: the test of it, and the parts that many are taken in."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_flowvi._program.batching import (
    NUM_PROBES,
    Score,
    align,
    batched,
    even_sizes,
    in_parts,
    runs_batched,
    site_log_probs,
)


def test_runs_stand_in_front_of_plates():
    x = torch.randn(5, 3, 2)  # five runs of three rows

    def model():
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    values = {"x": align(x, event_dim=1, nesting=2)}
    assert values["x"].shape == (5, 1, 3, 2)
    program = batched(poutine.condition(model, data=values), 5, nesting=2)
    log_probs = site_log_probs(poutine.trace(program).get_trace(), 5, nesting=2)
    assert torch.allclose(log_probs["x"], dist.Normal(0.0, 1.0).log_prob(x).sum((1, 2)))


class TestBatching:
    scores = torch.tensor([1.0, -3.0, 1e5], dtype=torch.float64)

    def outcome(self, off, magnitude=None, tolerance=256.0, alone=None):
        def together():
            return {"x": Score(self.scores + off, magnitude)}

        return runs_batched(together, alone or (lambda i: {"x": Score(self.scores[i])}), tolerance)

    def test_rounding_is_allowed(self):
        eps = torch.finfo(self.scores.dtype).eps
        assert self.outcome(0.0)
        assert self.outcome(200 * eps)
        assert not self.outcome(torch.tensor([600 * eps, 0.0, 0.0]))
        assert self.outcome(torch.tensor([0.0, 0.0, 1e5 * 200 * eps]))  # relative to the score
        assert not self.outcome(torch.tensor([0.0, 0.0, 1e5 * 200 * eps]), magnitude=100.0)
        assert self.outcome(torch.tensor([200 * 100 * eps, 0.0, 0.0]), magnitude=100.0)

    def test_others_are_not(self):
        assert not self.outcome(0.0, alone=lambda i: {"x": Score(self.scores[i]), "y": Score(self.scores[i])})
        assert not self.outcome(0.0, alone=lambda i: {})
        assert not self.outcome(0.0, alone=lambda i: {"x": Score(self.scores[i].float())})

        def fails(i):
            raise KeyError(i)

        assert not self.outcome(0.0, alone=fails)

    def test_what_has_no_density_has_none_alike(self):
        nan = torch.full((NUM_PROBES,), torch.nan)
        assert runs_batched(lambda: {"x": Score(nan)}, lambda i: {"x": Score(nan[i])}, 1.0)


@pytest.mark.parametrize("total", [1, 7, 8, 9, 16, 17])
def test_parts(total):
    sizes = even_sizes(total, 8)
    assert sum(sizes) == total
    assert max(sizes) <= 8
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-total // 8)
    points, seen = torch.randn(total, 2), []

    def value_and_grad(z):
        seen.append(len(z))
        return z.square().sum(-1), 2 * z

    values, gradients = in_parts(value_and_grad, points, 8)
    assert torch.equal(values, points.square().sum(-1))
    assert torch.equal(gradients, 2 * points)
    assert torch.equal(in_parts(torch.sin, points, 8), points.sin())
    assert max(seen) <= 8
