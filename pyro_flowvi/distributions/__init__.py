"""Distributions built from flows."""

from .flow import FlowDistribution
from .indexed import IndexedFlow
from .mixture import GivenComponent, MixtureOfFlows
from .polar import PolarNormal

__all__ = ["FlowDistribution", "GivenComponent", "IndexedFlow", "MixtureOfFlows", "PolarNormal"]
