"""Distributions built from flows."""

from .flow import FlowDistribution
from .indexed import IndexedFlow

__all__ = ["FlowDistribution", "IndexedFlow"]
