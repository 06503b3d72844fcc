"""The table of a guide's scalars: what stands in it, and a form of it where pandas is not installed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _html

__all__ = ["SummaryTable", "as_table", "column_names", "describe", "rounded"]

Array = NDArray[np.float64]
BLOCK = 2**22
"""Numbers that are sorted at once."""
MOST_ROWS, ENDS = 60, 5
"""Rows up to which all are printed, and those that are printed at both ends of more, as pandas does."""
DIGITS = 6
"""After the point, as pandas has it."""


def column_names(probs: Sequence[float]) -> list[str]:
    """Names of the table's columns, of quantiles at some probabilities.

    Example::

        >>> column_names([0.05, 0.5, 0.95])
        ['mean', 'sd', '5%', '50%', '95%', 'ess']
    """
    return ["mean", "sd", *(f"{100.0 * p:.4g}%" for p in probs), "ess"]


def describe(
    values: Tensor, probs: Sequence[float], weights: Tensor | None, moved: Tensor | None, resample: bool
) -> Array:
    """Mean, standard deviation, quantiles and effective sample size of columns, ``(C, Q + 3)``.

    :param values: draws, ``(S, C)``.
    :param probs: of the Q quantiles.
    :param weights: of the draws, ``(S,)``, summing to one; None if there are none.
    :param moved: the draws that these weights are of, where they are others, ``(S, C)``.
    :param resample: whether all figures are weighted ones.
    """
    width = max(1, BLOCK // max(1, len(values)))
    parts = []
    for i in range(0, values.shape[1], width):
        own = values[:, i : i + width].cpu().double()
        theirs = own if moved is None else moved[:, i : i + width].cpu().double()
        parts.append(_describe(own, torch.tensor(probs).to(own), weights, theirs, resample))
    return np.concatenate([np.zeros((0, len(probs) + 3)), *parts])


def _describe(x: Tensor, probs: Tensor, weights: Tensor | None, moved: Tensor, resample: bool) -> Array:
    ess = torch.full(x.shape[1:], torch.nan).to(x)
    if weights is not None:
        w = weights.cpu().double().unsqueeze(-1)
        mean = (w * moved).sum(0)
        squares = (moved - mean).square()
        variance = (w * squares).sum(0)
        # The variance of a self-normalised mean, Owen 2013, equation (9.9), is that over the size.
        ess = variance / (w.square() * squares).sum(0)
    if weights is not None and resample:
        figures = [mean, variance.sqrt(), *_weighted_quantiles(moved, w, probs)]
    else:
        figures = [x.mean(0), x.std(0), *torch.quantile(x, probs, dim=0)]
    found: Array = torch.stack([*figures, ess], -1).numpy()
    return found


def _weighted_quantiles(x: Tensor, w: Tensor, probs: Tensor) -> Tensor:
    """``(Q, C)``, interpolated between draws, each of which stands in the middle of its weight."""
    ordered, order = x.sort(0)
    heavy = w.squeeze(-1)[order]
    middle = (heavy.cumsum(0) - 0.5 * heavy).T.contiguous()
    above = torch.searchsorted(middle, probs.expand(len(middle), -1).contiguous()).clamp(1, len(x) - 1)
    low, high = middle.gather(1, above - 1), middle.gather(1, above)
    share = ((probs - low) / (high - low)).clamp(0.0, 1.0).nan_to_num(0.0)
    return torch.lerp(ordered.T.gather(1, above - 1), ordered.T.gather(1, above), share).T


def rounded(numbers: Array, digits: int) -> Array:
    """Rows of numbers with so many decimals, or more where the sd is small: it then has as many digits.

    :param numbers: ``(N, C)``; the sd is the second of each row.
    :param digits: of an sd below one, and decimals above.

    Example::

        >>> rounded(np.array([[12.3456, 4.5678], [0.123456, 0.00456789]]), 2).tolist()
        [[12.35, 4.57], [0.1235, 0.0046]]
    """
    sd = np.abs(numbers[:, 1:2])
    first = np.zeros_like(sd)  # places of the first digit behind the point
    np.log10(sd, out=first, where=np.isfinite(sd) & (sd > 0.0))
    scale = 10.0 ** np.clip(digits - 1 - np.floor(first), digits, 300)
    with np.errstate(over="ignore"):
        scaled = numbers * scale
    found: Array = np.where(np.abs(scaled) < 2.0**53, np.round(scaled) / scale, numbers)
    return found + 0.0  # no -0.00


def as_table(index: Sequence[str], columns: Mapping[str, Array], attrs: Mapping[str, float]) -> Any:
    """A pandas ``DataFrame``, or without pandas a :class:`SummaryTable`.

    Example::

        >>> table = as_table(["mu"], {"mean": np.array([0.5])}, {"num_samples": 100})
        >>> float(table["mean"]["mu"]), table.attrs
        (0.5, {'num_samples': 100})
    """
    try:
        import pandas
    except ImportError:
        return SummaryTable(index, columns, attrs)
    frame = pandas.DataFrame(dict(columns), index=list(index))
    frame.attrs.update(attrs)
    return frame


class SummaryTable:
    """A table with a name for each row: as much of pandas' ``DataFrame`` as it takes to read it.

    :param index: names of the rows.
    :param columns: name -> numbers, one a row.
    :param attrs: figures of the whole table.

    Example::

        >>> table = SummaryTable(["mu", "tau"], {"mean": np.array([0.5, 12.25])})
        >>> table
              mean
        mu    0.50
        tau  12.25
        >>> table["mean"]["tau"], len(table)
        (12.25, 2)
    """

    def __init__(
        self, index: Sequence[str], columns: Mapping[str, Array], attrs: Mapping[str, float] | None = None
    ) -> None:
        self.index = list(index)
        self._values = {name: np.asarray(values, dtype=float) for name, values in columns.items()}
        self.attrs = dict(attrs or {})

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._values)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        return len(self.index), len(self._values)

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __getitem__(self, column: str) -> dict[str, float]:
        """The numbers of a column by the names of their rows."""
        return dict(zip(self.index, self._values[column].tolist(), strict=True))

    def to_numpy(self) -> Array:
        """All numbers, shape :attr:`shape`."""
        return np.stack(list(self._values.values()), -1)

    def round(self, decimals: int = 0) -> "SummaryTable":
        """A table of the numbers with so many decimals."""
        rounded = {name: values.round(decimals) for name, values in self._values.items()}
        return SummaryTable(self.index, rounded, self.attrs)

    def _cells(self) -> tuple[list[list[str]], str]:
        """What is printed, column by column with the head, and a note where rows are left out."""
        keep = np.arange(len(self))
        note = ""
        if len(keep) > MOST_ROWS:
            keep = np.concatenate([keep[:ENDS], keep[-ENDS:]])
            note = f"[{len(self)} rows x {len(self.columns)} columns]"
        columns = [["", *(self.index[i] for i in keep)]]
        columns += [[name, *_formatted(values[keep])] for name, values in self._values.items()]
        return columns, note

    def __repr__(self) -> str:
        if not self.index:
            return f"Empty table, columns: {', '.join(self.columns)}"
        columns, note = self._cells()
        padded = []
        for i, column in enumerate(columns):
            cells = [f" {column[0]}" if i else "", *column[1:]]  # the place of a sign
            width = max(map(len, cells))
            if note:
                cells.insert(1 + ENDS, "..." if width > 3 else "..")
            padded.append([cell.rjust(width) if i else cell.ljust(width) for cell in cells])
        lines = [" ".join(row) for row in zip(*padded, strict=True)]
        return "\n".join([*lines, *(["", note] if note else [])])

    def _repr_html_(self) -> str:
        columns, note = self._cells()
        if note:
            for column in columns:
                column.insert(1 + ENDS, "...")
        head, *rows = zip(*columns, strict=True)
        return _html.block(_html.table(head, rows), _html.paragraph(note))


def _formatted(values: Array) -> list[str]:
    """Numbers of a column with as many decimals each, as pandas prints them."""
    size = np.abs(values[np.isfinite(values)])
    fixed = [f"{value: .{DIGITS}f}" for value in values]
    small = bool(((size < 10.0**-DIGITS) & (size > 0)).any())
    if small or (bool((size > 1e6).any()) and max(map(len, fixed)) > DIGITS + 6):
        fixed = [f"{value: .{DIGITS}e}" for value in values]
    else:
        numbers = [text for text, value in zip(fixed, values, strict=True) if np.isfinite(value)]
        while numbers and all(text.endswith("0") and not text.endswith(".0") for text in numbers):
            numbers = [text[:-1] for text in numbers]
        rest = iter(numbers)
        fixed = [
            next(rest) if np.isfinite(value) else text for text, value in zip(fixed, values, strict=True)
        ]
    return ["NaN" if text == " nan" else text for text in fixed]
