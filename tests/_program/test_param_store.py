"""Names in the param store have one owner, whatever its kind."""

import copy

import pyro
import pyro.distributions as dist
import pytest

from pyro_flowvi import AutoPlanar
from pyro_flowvi.models import VMoNF


def model():
    pyro.sample("x", dist.Normal(0.0, 1.0))


def make_guide(name):
    return AutoPlanar(model, name=name)


def make_mixture(name):
    return VMoNF(2, 2, name=name)


@pytest.mark.parametrize("first", [make_guide, make_mixture])
@pytest.mark.parametrize("second", [make_guide, make_mixture])
def test_a_name_has_one_owner(first, second):
    owner = first("a")
    assert owner.name == "a"
    with pytest.raises(ValueError, match="name: expected one that no live guide or model holds, got 'a'"):
        second("a")
    assert copy.deepcopy(owner).name == "a_1"
    del owner
    assert second("a").name == "a"


@pytest.mark.parametrize("make", [make_guide, make_mixture])
@pytest.mark.parametrize("name", ["", 3])
def test_a_name_is_a_string(make, name):
    with pytest.raises(ValueError, match="name: expected a non-empty string"):
        make(name)
