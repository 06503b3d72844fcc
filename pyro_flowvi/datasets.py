"""Data sets of the source papers, embedded so that nothing is downloaded."""

from typing import Final

__all__ = ["EIGHT_SCHOOLS"]

EIGHT_SCHOOLS: Final[dict[str, list[float]]] = {
    "y": [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0],
    "sigma": [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0],
}
"""Coaching effects on SAT scores in eight schools, points (Rubin 1981; Gelman et al., *Bayesian
Data Analysis*, section 5.5): estimated effects ``y`` and their standard errors ``sigma``."""
