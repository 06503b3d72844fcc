"""Guides that replace a Pyro autoguide on an unmodified model."""

from . import named
from .continuously_indexed import AutoCIF
from .flow import AutoFlow
from .flow_mixture import AutoFlowMixture
from .named import *  # noqa: F403  what named.__all__ lists: a new guide is entered there alone

__all__ = ["AutoCIF", "AutoFlow", "AutoFlowMixture"]
__all__ += named.__all__
