"""Mixtures of flows as models of data: VMoNF, its scikit-learn face, and how they are started and merged."""

from .merging import Annihilation, annihilate
from .overlap import class_map_by_overlap, component_overlap
from .random_starts import multistart, ring_flow
from .vmonf import VMoNF

__all__ = [
    "Annihilation",
    "VMoNF",
    "annihilate",
    "class_map_by_overlap",
    "component_overlap",
    "multistart",
    "ring_flow",
]
