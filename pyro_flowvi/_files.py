"""Models and data from files: what the command line is given, as what ``fit`` takes."""

import csv
import importlib.util
import inspect
import json
import sys
import traceback
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ._program.call import keywords_of

__all__ = [
    "arguments_of",
    "as_floats",
    "load_data",
    "load_model",
    "place_in",
    "single_values",
    "stacked_columns",
]

Array = NDArray[Any]
MISSING: Final = ("", "na", "nan", "null")
"""Cells of a table without a value, in small letters: they become NaN."""


# -- the model ---------------------------------------------------------------------------------------


def load_model(spec: str) -> Callable[..., Any]:
    """The model of ``path.py:name``.  The file's folder is first where it imports from, as for a script.

    :raises ValueError: if the file or the name in it does not exist, the file raises, or what is named is
        not callable, or a class.

    Example::

        >>> load_model("nowhere.py:model")
        Traceback (most recent call last):
        ValueError: --model: expected an existing file, got 'nowhere.py'
    """
    path, colon, name = spec.rpartition(":")
    if not colon or not name:
        raise ValueError(f"--model: expected path.py:name, got {spec!r}")
    if not Path(path).is_file():
        raise ValueError(f"--model: expected an existing file, got {path!r}")
    # Not under its own name, which may be that of a module that others import.
    module_name = f"_model_file_{Path(path).stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"--model: expected a Python file, got {path!r}")
    module = importlib.util.module_from_spec(module_spec)
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[module_name] = module  # dataclasses in the file look for it there
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raised = f"{type(error).__name__}: {error}{place_in(path, error)}"
        raise ValueError(
            f"--model: expected a file that runs, got {path!r}, which raised {raised}"
        ) from error
    model = getattr(module, name, None)
    if not callable(model):
        raise ValueError(f"--model: expected a function {name!r} in {path}, got {model!r}")
    if inspect.isclass(model):
        raise ValueError(f"--model: expected a function or an instance, got the class {name!r} of {path}")
    found: Callable[..., Any] = model
    return found


def place_in(path: str, error: BaseException) -> str:
    """Where in a file an exception came from, as `` (model.py, line 3)``; empty if nowhere in it."""
    wanted = Path(path).resolve()
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == wanted
    ]
    return f" ({wanted.name}, line {lines[-1]})" if lines else ""


# -- the data ----------------------------------------------------------------------------------------


def load_data(
    path: str,
    model: Callable[..., Any] | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
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
    if not Path(path).is_file():
        raise ValueError(f"--data: expected an existing file, got {path!r}")
    if suffix not in READERS:
        raise ValueError(f"--data: expected a file that ends in {', '.join(READERS)}, got {path!r}")
    if suffix in TABLES:
        return _of_table(READERS[suffix](path), model, columns or {})
    if columns:
        raise ValueError(f"--columns: expected a table ({', '.join(TABLES)}) as --data, got {path!r}")
    return {name: as_value(f"--data: {name}", value) for name, value in READERS[suffix](path).items()}


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
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: value if value.ndim else value.item() for name, value in arrays.items()}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"--data: expected arrays of numbers in {path!r}, got {error}") from error


# A table is read in whole, and only the columns that are wanted are made numbers: name -> how.
Table = dict[str, Callable[[], Array]]


def _read_text(path: str, delimiter: str) -> Table:
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file, delimiter=delimiter) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--data: expected a table in UTF-8, got {path!r}: {error}") from error
    names = [name.strip() for name in header]
    if not rows:
        raise ValueError(f"--data: expected a line of names and rows below it, got {path!r} without rows")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--data: expected columns of different names, got {twice[0]!r} twice in {path!r}")
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise ValueError(
                f"--data: expected {len(names)} cells in each row, got {len(row)} in row {number}"
            )
    cells = zip(*rows, strict=True)
    return {name: partial(_numbers, name, column) for name, column in zip(names, cells, strict=True)}


def _numbers(name: str, cells: Sequence[str]) -> Array:
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
                f"--data: expected numbers in column {name!r}, got {cells[i]!r} in row {i + 1}"
            ) from None
    return values


def _read_parquet(path: str) -> Table:
    try:
        import pandas

        frame = pandas.read_parquet(path)
    except ImportError as error:
        needs = "expected pandas and pyarrow, which .parquet needs: pip install pandas pyarrow"
        raise ValueError(f"--data: {needs}; got {' '.join(str(error).split())}") from error
    except Exception as error:  # of pyarrow's own kinds
        raise ValueError(f"--data: expected a table in {path!r}, got {error}") from error
    return {str(name): partial(_of_series, str(name), frame[name]) for name in frame.columns}


def _of_series(name: str, series: Any) -> Array:
    kind = series.dtype.kind
    if kind not in "biuf":
        raise ValueError(f"--data: expected numbers in column {name!r}, got {series.dtype}")
    if series.isna().any():
        kind = "f"
    options = {"dtype": np.float64, "na_value": np.nan} if kind == "f" else {}
    found: Array = series.to_numpy(**options)
    return found if kind == "f" else found.astype(np.bool_ if kind == "b" else np.int64)


def _of_table(
    table: Table, model: Callable[..., Any] | None, columns: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    known = None if model is None else keywords_of(model)
    plain = {name: (name,) for name in table if name not in columns and (known is None or name in known)}
    found = {}
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


# -- options -----------------------------------------------------------------------------------------


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise ValueError(f"{option}: expected NAME=VALUE, got {text!r}")
        pairs[name] = value
    return pairs


def single_values(option: str, texts: Sequence[str]) -> dict[str, Any]:
    """Values of ``NAME=VALUE``: those of JSON, else text.

    :raises ValueError: for anything else.
    """
    values: dict[str, Any] = {}
    for name, text in _pairs(option, texts).items():
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def stacked_columns(texts: Sequence[str]) -> dict[str, Sequence[str]]:
    """Columns of ``NAME=COLUMN,COLUMN``; a list where there is a comma, which makes a matrix, else a tuple.

    :raises ValueError: for anything else.
    """
    found: dict[str, Sequence[str]] = {}
    for name, text in _pairs("--columns", texts).items():
        names = [part.strip() for part in text.split(",") if part.strip()]
        if not names:
            raise ValueError(f"--columns: expected NAME=COLUMN,COLUMN, got {name}={text}")
        found[name] = names if "," in text else tuple(names)
    return found


def arguments_of(
    model: Callable[..., Any], data: Mapping[str, Any], single: Mapping[str, Any]
) -> dict[str, Any]:
    """The model's keyword arguments: ``data``, overridden by ``single`` values, whose lists become tensors.

    :raises ValueError: if the model does not take one of them, or needs another.
    """
    given = {**data, **{name: as_value(f"--arg: {name}", value) for name, value in single.items()}}
    known = keywords_of(model)
    takes = "any" if known is None else ", ".join(sorted(known)) or "it has none"
    for option, names in (("--arg", single), ("--data", data)):
        if known is not None and (unknown := sorted(set(names) - known)):
            raise ValueError(f"{option}: expected arguments of the model ({takes}), got {unknown[0]!r}")
    program = model.forward if isinstance(model, nn.Module) else model
    try:
        signature = inspect.signature(program)
    except (TypeError, ValueError):
        return given
    for name, parameter in signature.parameters.items():
        named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if named and parameter.default is parameter.empty and name not in given:
            got = ", ".join(given) or "no value"
            raise ValueError(f"--data: expected a value of the model's argument {name!r}, got {got}")
    return given


def as_floats(data: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The data with the named integers in torch's default dtype.

    :raises ValueError: for a name that is no tensor or number among the data.
    """
    changed = dict(data)
    for name in names:
        value = data.get(name)
        if not isinstance(value, Tensor | int | float):
            tensors = ", ".join(key for key, found in data.items() if isinstance(found, Tensor))
            raise ValueError(f"--float: expected one of {tensors or 'no name'}, got {name!r}")
        changed[name] = value.to(torch.get_default_dtype()) if isinstance(value, Tensor) else float(value)
    return changed
