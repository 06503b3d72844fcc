"""Data from files: what the command line is given, as the arguments of a model."""

import csv
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._program.call import keywords_of

__all__ = ["Data", "as_value", "load_data"]

Array = NDArray[Any]
MISSING: Final = ("", "na", "nan", "null")
"""Cells of a table without a value, in small letters: they become NaN."""


class Data(dict[str, Any]):
    """Arguments of a model from a file, by name.

    Example::

        >>> Data({"y": 1.0}).unused
        ()
    """

    unused: tuple[str, ...] = ()
    """The columns of the file that are none."""


def load_data(
    path: str,
    model: Callable[..., Any] | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
) -> Data:
    """The model's arguments from a file, by the end of its name.

    * ``.json``: an object; its lists become tensors, the rest stays as it is.
    * ``.npz``: arrays; those without a dimension become numbers.
    * ``.csv``, ``.tsv``, ``.parquet``: tables; each column becomes a tensor of shape ``(rows,)``.

    Integers become int64, true and false bool, and numbers with a point torch's default dtype.  A gap (an
    empty cell, ``NA``, ``null``) makes its column floating, with NaN there.

    :param path: the file.
    :param model: of a table, leaves out columns that are no arguments of this model, be they text.
    :param columns: argument -> columns of a table: ``("age",)`` of shape ``(rows,)``, more ``(rows, k)``.
    :raises ValueError: if the file does not exist or has other content.

    Example::

        >>> load_data("nowhere.json")
        Traceback (most recent call last):
        ValueError: --data: expected an existing file, got 'nowhere.json'
    """
    suffix = Path(path).suffix.lower()
    if path == "-":
        raise ValueError("--data: expected a file, whose ending says what it holds, got '-'")
    if not Path(path).is_file():
        raise ValueError(f"--data: expected an existing file, got {path!r}")
    if suffix not in READERS:
        raise ValueError(f"--data: expected a file that ends in {', '.join(READERS)}, got {path!r}")
    if columns and suffix not in TABLES:
        raise ValueError(f"--columns: expected a table ({', '.join(TABLES)}) as --data, got {path!r}")
    try:
        found = READERS[suffix](path)
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"--data: expected a file that can be read, got {path!r}: {why}") from error
    if suffix in TABLES:
        return _of_table(found, model, columns or {})
    return Data({name: as_value(f"--data: {name}", value) for name, value in found.items()})


def as_value(where: str, value: Any) -> Any:
    """Lists and arrays as tensors, the rest as it is.

    :raises ValueError: that begins with ``where``, if a list has other than numbers or unequal parts.
    """
    if not isinstance(value, list | np.ndarray):
        return value
    try:
        array = np.array(_with_nan(value))
    except ValueError:
        raise ValueError(f"{where}: expected a list with parts of one length, got unequal ones") from None
    if array.dtype.kind not in "biuf" or (array.dtype.kind == "u" and (array > 2**63 - 1).any()):
        raise ValueError(f"{where}: expected numbers of 64 bits at most, got {_shortened(value)}")
    return _as_tensor(array)


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(part) for part in value]
    return np.nan if value is None else value


def _shortened(value: Any) -> str:
    text = f"an array of dtype {value.dtype}" if isinstance(value, np.ndarray) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _as_tensor(array: Array) -> Tensor:
    kind = array.dtype.kind
    dtype = torch.get_default_dtype() if kind == "f" else torch.bool if kind == "b" else torch.int64
    wide: Array = array.astype(
        {"f": np.float64, "b": np.bool_}.get(kind, np.int64)
    )  # torch lacks some of numpy's
    return torch.from_numpy(np.ascontiguousarray(wide)).to(dtype)


def _read_json(path: str) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one as well
        raise ValueError(f"--data: expected JSON, got {path!r}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"--data: expected a JSON object of the model's arguments, got {_shortened(data)}")
    return data


def _read_npz(path: str) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"--data: expected arrays as numpy.savez writes them, got {path!r}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: value if value.ndim else value.item() for name, value in arrays.items()}
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"--data: expected arrays of numbers in {path!r}, got {error}") from error


# A table is read in whole, and only the columns that are wanted are made numbers: name -> how.
Table = dict[str, Callable[[], Array]]


def _read_text(path: str, delimiter: str) -> Table:
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, delimiter=delimiter)
            header, *rows = [(lines.line_num, row) for row in lines if row] or [(0, [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--data: expected a table in UTF-8, got {path!r}: {error}") from error
    names = [name.strip() for name in header[1]]
    if not rows:
        raise ValueError(f"--data: expected a line of names and rows below it, got {path!r} without rows")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--data: expected columns of different names, got {twice[0]!r} twice in {path!r}")
    for number, row in rows:
        if len(row) != len(names):
            cells = f"{len(names)} cell{'s' * (len(names) != 1)}"
            raise ValueError(f"--data: expected {cells} in each row, got {len(row)} in line {number}")
    numbers = [number for number, _ in rows]
    columns = zip(*(row for _, row in rows), strict=True)
    return {name: partial(_numbers, name, numbers, cells) for name, cells in zip(names, columns, strict=True)}


def _numbers(name: str, lines: Sequence[int], cells: Sequence[str]) -> Array:
    """A column of text as integers, else as true and false, else as floating numbers with NaN in gaps."""
    texts = [cell.strip().lower() for cell in cells]
    try:
        return np.array([int(text) for text in texts])
    except ValueError:
        pass
    if set(texts) <= {"true", "false"}:
        return np.array([text == "true" for text in texts])
    values = np.empty(len(texts))
    for i, text in enumerate(texts):
        try:
            values[i] = np.nan if text in MISSING else float(text)
        except ValueError:
            raise ValueError(
                f"--data: expected numbers in column {name!r}, got {cells[i]!r} in line {lines[i]}"
            ) from None
    return values


def _read_parquet(path: str) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        needs = "expected pyarrow, which .parquet needs (pip install 'pyro-flowvi[parquet]')"
        raise ValueError(f"--data: {needs}, got {error}") from error
    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"--data: expected a table in {path!r}, got {error}") from error
    if not table.num_rows:
        raise ValueError(f"--data: expected a table, got {path!r} without rows")
    return {name: partial(_of_arrow, name, table.column(name)) for name in table.column_names}


def _of_arrow(name: str, column: Any) -> Array:
    from pyarrow import types

    kind = column.type
    if types.is_decimal(kind):
        column = column.cast("float64")
    elif types.is_boolean(kind) and column.null_count:
        column = column.cast("int8")  # whose gaps become NaN
    elif not (types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)):
        raise ValueError(f"--data: expected numbers in column {name!r}, got {kind}")
    return np.asarray(column.to_numpy())


def _of_table(table: Table, model: Callable[..., Any] | None, columns: Mapping[str, Sequence[str]]) -> Data:
    known = None if model is None else keywords_of(model)
    plain = {name: (name,) for name in table if name not in columns and (known is None or name in known)}
    found = Data()
    found.unused = tuple(name for name in table if name not in plain)
    for argument, names in {**plain, **columns}.items():
        for name in names:
            if name not in table:
                raise ValueError(
                    f"--columns: expected one of {', '.join(table)} for {argument}, got {name!r}"
                )
        parts = [table[name]() for name in names]
        joined = parts[0] if isinstance(names, tuple) and len(parts) == 1 else np.stack(parts, -1)
        found[argument] = as_value(f"--data: {argument}", joined)
    return found


READERS: Final[dict[str, Callable[[str], Any]]] = {
    ".json": _read_json,
    ".npz": _read_npz,
    ".csv": partial(_read_text, delimiter=","),
    ".tsv": partial(_read_text, delimiter="\t"),
    ".parquet": _read_parquet,
}
TABLES: Final = (".csv", ".tsv", ".parquet")
