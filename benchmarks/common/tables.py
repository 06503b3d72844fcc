"""Figures and tables of a report, as Markdown."""

import math
from collections.abc import Iterable, Sequence

import numpy as np


def median(values: Sequence[float | None]) -> float:
    """A missing value is a failure, and counts as infinite."""
    return float(np.median([math.inf if value is None else value for value in values]))


def number(value: float | None, digits: int = 2) -> str:
    """As short as a table wants it."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.{digits}f}" if abs(value) < 10 else f"{value:.{max(0, digits - 1)}f}"
    return text.lstrip("-") if float(text) == 0.0 else text


def nats(value: float | None, digits: int = 2) -> str:
    """A log density, of which the last digits matter however large it is."""
    return "–" if value is None else f"{value:.{digits}f}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])
