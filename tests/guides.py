"""Every guide of the registries in a small size, so that a new one is tested without being named anywhere."""

import inspect
from functools import partial

from pyro_flowvi import FLOWS, AutoCIF, AutoFlow, AutoFlowMixture
from pyro_flowvi.autoguide import GUIDES as NAMED

SIZES = {"num_layers": 2, "hidden": (5,)}
OPTIONS = {
    "realnvp": {"num_layers": 4, "tails": True},
    "planar": {"num_layers": 3},
    "radial": {"num_layers": 3},
}


def _small(key):
    if key not in NAMED:
        return partial(AutoFlow, flow=partial(FLOWS[key], **SIZES))
    known = inspect.signature(NAMED[key]).parameters
    sizes = {name: size for name, size in SIZES.items() if name in known}
    return partial(NAMED[key], **{**sizes, **OPTIONS.get(key, {})})


GUIDES = {
    **{key: _small(key) for key in FLOWS},
    "cif": partial(AutoCIF, num_layers=2, hidden=(5,), index_dim=2, index_hidden=(4,)),
    "mixture": partial(AutoFlowMixture, num_components=3, num_layers=2, hidden=(5,), init_spread=0.1),
}
BIJECTIVE = [kind for kind in GUIDES if kind not in ("cif", "mixture")]
KINDS = ["realnvp", "maf", "cif", "mixture"]
"""One guide of each kind of code: forward passes with tails, an inverse pass, indices, components."""
