"""AutoFlowMixture with num_components="auto" on posteriors of which number and masses of the modes are known.

By closed forms, symmetry or quadrature: those of the benchmark of several modes.
"""

import pytest
import torch

from benchmarks.mixtures.targets import TARGETS
from pyro_flowvi import AutoFlowMixture, AutoRealNVP, diagnose, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*found no sample sites configured for enumeration"),
]

MINUTES = ("bananas", "labels")
APART = ("two", "nine", "sixteen", "unlike", "shots", "bananas")
"""Posteriors whose modes are well apart, of a few latents."""
CASES = [
    pytest.param(
        name,
        seed,
        marks=pytest.mark.slow if seed or name in MINUTES else pytest.mark.long if name != "two" else (),
    )
    for name in TARGETS
    for seed in range(3)
]


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_number_and_masses(name, seed):
    target = TARGETS[name]()
    guide = AutoFlowMixture(target.model, "auto")
    result = fit(target.model, guide, *target.args, seed=seed, progress=False)
    num = max(1, len(target.masses))
    assert guide.num_components == num == len(result.modes.masses)
    if target.mode_of is None:
        return
    tolerance = 0.1 if name in APART else 0.2
    shares = torch.bincount(target.mode_of(guide.sample_posterior(40_000)), minlength=num) / 40_000
    truth = torch.tensor(target.masses)
    torch.testing.assert_close(shares, truth, rtol=tolerance, atol=0.0)
    torch.testing.assert_close(result.modes.masses, truth.sort(descending=True).values, rtol=0.2, atol=0.0)
    errors = (result.modes.masses - truth.sort(descending=True).values) / result.modes.se
    if name in ("two", "unlike", "shots", "bananas"):  # whose masses differ by more than their errors
        assert errors.abs().max() < 4.0


@pytest.mark.long
def test_one_mode_takes_hardly_longer_than_one_flow():
    """As good as one flow, of as many parameters."""
    target = TARGETS["schools"]()
    guide, flow = AutoFlowMixture(target.model, "auto"), AutoRealNVP(target.model)
    losses = [
        fit(target.model, each, *target.args, seed=0, progress=False).best_loss for each in (guide, flow)
    ]
    assert sum(p.numel() for p in guide.parameters()) == 1 + sum(p.numel() for p in flow.parameters())
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert diagnose(target.model, guide, *target.args, seed=0).verdict == "good"
