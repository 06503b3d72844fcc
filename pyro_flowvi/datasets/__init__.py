"""Data sets of papers and tutorials, embedded or drawn from a seed: nothing is downloaded."""

from .clusters import (
    hide_labels,
    pinwheel,
    pinwheel_log_prob,
    two_circles,
    two_circles_log_prob,
    two_moons,
)
from .energies import ENERGIES, ENERGY_BOX, Energy
from .images import LabelledImages, digits, idx_images, read_idx
from .lattice import NINE_MODES, NormalLattice, nine_modes
from .radon import RadonSurvey, minnesota_radon
from .references import EIGHT_SCHOOLS, Reference, eight_schools_reference
from .series import mauna_loa_co2

__all__ = [
    "EIGHT_SCHOOLS",
    "ENERGIES",
    "ENERGY_BOX",
    "NINE_MODES",
    "Energy",
    "LabelledImages",
    "NormalLattice",
    "RadonSurvey",
    "Reference",
    "digits",
    "eight_schools_reference",
    "hide_labels",
    "idx_images",
    "mauna_loa_co2",
    "minnesota_radon",
    "nine_modes",
    "pinwheel",
    "pinwheel_log_prob",
    "read_idx",
    "two_circles",
    "two_circles_log_prob",
    "two_moons",
]
