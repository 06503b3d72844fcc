"""The fixed map behind a guide's affine one: it comes and goes without a change of what the guide is."""

import copy

import pyro
import pytest
import torch

from pyro_flowvi import AutoCIF, AutoFlow, AutoFlowMixture, AutoPlanar
from pyro_flowvi.autoguide._affine import enter_frame, frame_of, has_frame, leave_frame
from tests import zoo

GUIDES = {
    "lower": lambda: AutoPlanar(zoo.hierarchy, 2),
    "elementwise": lambda: AutoPlanar(zoo.hierarchy, 2, affine="elementwise"),
    "indexed": lambda: AutoCIF(zoo.hierarchy, "planar", 2, index_hidden=(4,)),
    "mixture": lambda: AutoFlowMixture(zoo.hierarchy, 3, "planar", 2),
}


def make(name):
    guide = GUIDES[name]().materialize(torch.zeros(4))
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return guide


def draws(guide):
    pyro.set_rng_seed(1)
    return guide.get_posterior().rsample_and_log_prob((7,))


@pytest.mark.parametrize("name", GUIDES)
def test_the_guide_stays_what_it_is(name):
    guide = make(name)
    modules, params = list(guide.modules()), dict(guide.named_parameters())
    keys, before = list(guide.state_dict()), draws(guide)
    assert frame_of(guide.affine) is None
    assert enter_frame(guide.affine)
    torch.testing.assert_close(draws(guide), before)
    assert not guide.affine.loc.any()
    assert enter_frame(guide.affine)  # again: nothing is lost
    torch.testing.assert_close(draws(guide), before)
    leave_frame(guide.affine)
    torch.testing.assert_close(draws(guide), before)
    assert all(one is two for one, two in zip(guide.modules(), modules, strict=True))
    assert all(param is params[key] for key, param in guide.named_parameters())
    assert list(guide.state_dict()) == keys


@pytest.mark.parametrize("name", GUIDES)
def test_state_and_copies_keep_the_frame(name):
    guide = make(name)
    plain = copy.deepcopy(guide.state_dict())
    before = draws(guide)
    enter_frame(guide.affine)
    inside = draws(guide)
    state = copy.deepcopy(guide.state_dict())
    twin, other, late = copy.deepcopy(guide), make(name), GUIDES[name]()
    other.load_state_dict(state)
    late.load_state_dict(state)
    late.materialize(torch.zeros(4))
    for one in (twin, other, late):
        assert has_frame(one.affine)
        assert all(torch.equal(x, y) for x, y in zip(draws(one), inside, strict=True))
    other.load_state_dict(plain)
    assert not has_frame(other.affine)
    assert all(torch.equal(x, y) for x, y in zip(draws(other), before, strict=True))


def test_frozen_and_low_rank_maps_have_none():
    guide = make("lower")
    guide.affine.loc.requires_grad_(False)
    assert not enter_frame(guide.affine)
    low_rank = AutoFlow(zoo.hierarchy, "planar", affine="low_rank").materialize(torch.zeros(4))
    assert not enter_frame(low_rank.affine)
    assert frame_of(low_rank.affine) is None
