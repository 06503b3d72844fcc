"""Guides that replace a Pyro autoguide on an unmodified model."""

from types import MappingProxyType
from typing import Final

from . import named
from .continuously_indexed import AutoCIF
from .exported import ExportedPosterior, load_posterior
from .flow import AutoFlow
from .flow_mixture import AutoFlowMixture
from .named import *  # noqa: F403  what named.__all__ lists: a new guide is entered there alone

__all__ = ["GUIDES", "AutoCIF", "AutoFlow", "AutoFlowMixture", "ExportedPosterior", "load_posterior"]
__all__ += named.__all__

GUIDES: Final = MappingProxyType({vars(named)[name]._flow_key: vars(named)[name] for name in named.__all__})
"""The named guides by the keys of their flows in :data:`pyro_flowvi.FLOWS`."""
