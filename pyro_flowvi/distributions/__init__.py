"""Distributions built from flows."""

from .flow import FlowDistribution
from .indexed_flow import IndexedFlow
from .mixture_of_flows import GivenComponent, MixtureOfFlows
from .polar import PolarNormal

__all__ = ["FlowDistribution", "GivenComponent", "IndexedFlow", "MixtureOfFlows", "PolarNormal"]
