"""Distributions built from flows."""

from .flow import FlowDistribution
from .indexed import IndexedFlow
from .mixture import GivenComponent, MixtureOfFlows

__all__ = ["FlowDistribution", "GivenComponent", "IndexedFlow", "MixtureOfFlows"]
