"""What guides answer to fit and the diagnostics."""

import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoGuideList, AutoNormal

from pyro_flowvi import AutoCIF, AutoFlow, AutoFlowMixture, AutoRealNVP
from pyro_flowvi.autoguide._protocol import FitGuide, as_fit_guide
from pyro_flowvi.flows import defaults_for
from pyro_flowvi.init import Effort
from tests import zoo

Y = torch.tensor([1.0, 2.0, -1.0, 0.5])
GUIDES = {
    "flow": lambda: AutoRealNVP(zoo.hierarchy, 2),
    "indexed": lambda: AutoCIF(zoo.hierarchy, "planar", 2, index_hidden=(4,)),
    "mixture": lambda: AutoFlowMixture(zoo.hierarchy, 2, "planar", 2),
}


@pytest.mark.parametrize("name", GUIDES)
def test_flow_guides_answer_for_themselves(name):
    guide = GUIDES[name]()
    assert isinstance(guide, FitGuide)  # before there are any parameters
    assert as_fit_guide(zoo.hierarchy, guide) is guide
    guide.set_up((Y,), {})
    assert guide._data == ((Y,), {})
    guide.set_up((Y,), {}, all_data=False)
    assert guide._data is None
    z, log_q = guide.draw_latent(3)
    assert (z.shape, log_q.shape) == ((3, 5), (3,))
    assert not z.requires_grad


@pytest.mark.parametrize("name", GUIDES)
def test_moves_and_moves_back(name):
    guide = GUIDES[name]()
    guide.set_up((Y,), {})
    assert guide.can_move()
    noise = torch.randn(5, 2, 5) if name == "mixture" else torch.randn(5, 5)
    places = [guide._flow.forward_and_log_det(noise)[0] if name != "indexed" else guide.affine.loc.clone()]
    kind, move_back = guide.move_to_start(guide.density(Y), Effort.small())
    assert kind in ("prior", "laplace", "path", "mean-field", "modes")
    loc, *_ = guide.frame()
    assert loc.shape == guide.affine.loc.shape
    assert not torch.allclose(loc, torch.zeros(()))
    move_back()
    assert guide.frame() is not None
    guide.leave_frame()
    assert guide.frame() is None
    places += [guide._flow.forward_and_log_det(noise)[0] if name != "indexed" else guide.affine.loc]
    torch.testing.assert_close(*places)


def test_other_guides_are_answered_for():
    for guide in (AutoNormal(zoo.hierarchy), AutoGuideList(zoo.hierarchy), lambda y: None):
        answers = as_fit_guide(zoo.hierarchy, guide)
        assert answers is not guide
        answers.set_up((Y,), {})
        options = answers.fit_options()
        assert (options.lr, options.num_particles, options.settings) == (1e-2, 16, {})
        assert not answers.can_move()
        assert answers.frame() is None
        assert answers.draw_latent(3) is None
        assert answers.density(Y).dim == 5


def test_defaults_are_those_of_the_table():
    flow = AutoRealNVP(zoo.hierarchy).materialize(Y)
    choice = defaults_for(5).flows["realnvp"]
    options = flow.fit_options()
    assert (options.lr, options.num_particles) == (choice.lr, choice.num_particles)
    mixture = AutoFlowMixture(zoo.hierarchy, 2, "realnvp").materialize(Y).fit_options()
    assert mixture.lr == choice.lr
    assert mixture.num_particles == max(32, choice.num_particles // 2)
    own = AutoFlow(zoo.hierarchy, lambda dim: dist.transforms.AffineTransform(0.0, 1.0)).materialize(Y)
    assert (own.fit_options().lr, own.fit_options().num_particles) == (1e-2, 16)
    settings = [
        AutoCIF(zoo.hierarchy, "planar", 2, index_hidden=(4,), num_extra=n)
        .materialize(Y)
        .fit_options()
        .settings
        for n in (0, 2)
    ]
    assert settings[0] != settings[1]


def test_a_guide_without_a_place_to_move_stays():
    assert not AutoRealNVP(zoo.hierarchy, 2, affine=None).materialize(Y).can_move()
    frozen = AutoRealNVP(zoo.hierarchy, 2).materialize(Y)
    frozen.affine.log_scale.requires_grad_(False)
    assert not frozen.can_move()
    assert frozen.frame() is None
