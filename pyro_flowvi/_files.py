"""The model of a file, and its arguments: what the command line is given, as what ``fit`` takes."""

import difflib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

from ._data_files import Data, as_value
from ._program.call import keywords_of

__all__ = ["arguments_of", "as_floats", "load_model", "place_in", "single_values", "stacked_columns"]

PYTHON_WORDS: Final = {"True": True, "False": False, "None": None}
"""What is text in JSON, but no one means as such."""


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
    if not colon or not name.isidentifier():  # the colon of C:\mine.py is not the one that is meant
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
    except (Exception, SystemExit) as error:  # sys.exit() at its top level would end this program too
        raised = f"{type(error).__name__}: {error}{place_in(path, error)}"
        raise ValueError(
            f"--model: expected a file that runs, got {path!r}, which raised {raised}"
        ) from error
    if not hasattr(module, name):
        raise ValueError(
            f"--model: expected the name of a function in {path}, got {name!r}{_meant(name, module)}"
        )
    model = getattr(module, name)
    if not callable(model):
        raise ValueError(f"--model: expected a function {name!r} in {path}, got {model!r}")
    if inspect.isclass(model):
        raise ValueError(f"--model: expected a function or an instance, got the class {name!r} of {path}")
    found: Callable[..., Any] = model
    return found


def _meant(name: str, module: ModuleType) -> str:
    """The nearest of a file's own functions, or all of them."""
    own = [
        key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__
    ]
    functions = [key for key in own if callable(getattr(module, key)) and not key.startswith("_")]
    near = difflib.get_close_matches(name, functions, 1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; it has {', '.join(functions)}" if functions else ", and it has no function"


def place_in(path: str, error: BaseException) -> str:
    """Where in a file an exception came from, as `` (model.py, line 3)``; empty if nowhere in it."""
    wanted = Path(path).resolve()
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == wanted
    ]
    return f" ({wanted.name}, line {lines[-1]})" if lines else ""


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
    """Values of ``NAME=VALUE``: those of JSON, True, False and None as Python writes them, else text.

    :raises ValueError: for anything else.
    """
    values: dict[str, Any] = {}
    for name, text in _pairs(option, texts).items():
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = PYTHON_WORDS.get(text, text)
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

    :param data: of a file; a :class:`Data` says what else the file has.

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
        needed = parameter.default is parameter.empty and name not in given
        if parameter.kind is parameter.POSITIONAL_ONLY and needed:
            raise ValueError(f"--model: expected arguments with names, got the positional-only {name!r}")
        if needed and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            unused = data.unused if isinstance(data, Data) else ()
            got = ", ".join(map(repr, [*given, *unused])) or "no value"
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
