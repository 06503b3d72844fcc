"""Guides that replace a Pyro autoguide on an unmodified model."""

from .base import AutoFlow
from .flows import AutoPlanar, AutoRadial

__all__ = ["AutoFlow", "AutoPlanar", "AutoRadial"]
