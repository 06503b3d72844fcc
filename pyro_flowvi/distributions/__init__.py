"""Distributions built from flows."""

from .flow import FlowDistribution

__all__ = ["FlowDistribution"]
