"""Files of results: lines of JSON, each with the setting that it was measured in.

Lines are written as they come, to ``benchmarks/results`` unless told otherwise, and what a file has already
is not run again.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyro
from tqdm import tqdm

from benchmarks.common.setting import setting

Row = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results"


class Clock:
    """Wall and CPU seconds since it was made, the latter with those of processes that it waited for.

    On a machine with other work the CPU seconds are the ones to read.
    """

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), sum(os.times()[:4])

    def read(self, suffix: str = "") -> Row:
        wall, cpu = time.perf_counter() - self.wall, sum(os.times()[:4]) - self.cpu
        return {f"seconds{suffix}": wall, f"cpu_seconds{suffix}": cpu}


_lap = Clock()
"""Runs from line to line, so that a file says what its lines took in all."""


def results_of(name: str) -> Path:
    """The file of results of a benchmark."""
    return RESULTS / f"{name}.jsonl"


def checkpoint_of(folder: Path | None, key: Row) -> Path | None:
    """The file of a task's checkpoint, in a folder that is made if there is none; None without a folder."""
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{'_'.join(map(str, key.values()))}.pt"


def finite(row: Row) -> Row:
    """JSON has no infinities."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def append(path: Path, row: Row) -> Row:
    """Adds a result to the file, with its setting; the line as it is there.

    ``task_seconds`` and ``task_cpu_seconds`` are those since the line before, or since this module was
    imported, with all that a result takes: imports of its process, scores, verdicts.
    """
    global _lap
    task = {f"task_{name}": value for name, value in _lap.read().items()}
    whole = finite({**row, **task, **setting()})
    _lap = Clock()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(whole) + "\n")
    return whole


def has(rows: Iterable[Row], key: Row) -> bool:
    """Whether a result of this task is among the rows."""
    return any(all(row.get(name) == value for name, value in key.items()) for row in rows)


def settings(rows: Iterable[Row]) -> str:
    """Where and with what rows were measured, a line for each setting, in their order."""
    names = ("setting", "machine", "versions", "commit", "date")
    told = ("; ".join(str(row[name]) for name in names if name in row) for row in rows)
    return "".join(f"{text}\n" for text in dict.fromkeys(told) if text)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def isolated(key: Row, timeout: float, cold: bool) -> Row:
    """The result of the same script in a process of its own, which gets the task as ``--one``.

    With ``cold`` the compiler's cache is empty, and a second process measures what is left with a full one.
    """
    module: Any = sys.modules["__main__"].__spec__  # there is one under ``python -m``
    command = [sys.executable, "-m", module.name, *sys.argv[1:], "--one", json.dumps(key)]

    def child(**variables: str) -> Row:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **variables}
            )
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {timeout:.0f} s"}
        if done.returncode:
            return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
        result: Row = json.loads(done.stdout.splitlines()[-1])
        return result

    if not cold:
        return child()
    with tempfile.TemporaryDirectory() as cache:
        first = child(TORCHINDUCTOR_CACHE_DIR=cache)
        second = child(TORCHINDUCTOR_CACHE_DIR=cache)
    return {**second, "seconds_cold": first.get("seconds")}


def attempt(key: Row, run: Callable[[Row], Row]) -> Row:
    """The result of a task in this process, an error included."""
    warnings.simplefilter("ignore")
    pyro.clear_param_store()
    try:
        return run(key)
    except Exception as error:
        return {"error": first_line(error)}


def collect(
    keys: Iterable[Row],
    output: Path,
    run: Callable[[Row], Row],
    say: Callable[[Row], str],
    *,
    apart: bool = False,
    cold: Callable[[Row], bool] = lambda key: False,
    timeout: float = 1800.0,
) -> None:
    """Runs the tasks that the file does not have, one after another, and adds their results to it.

    :param keys: the tasks; a result has the entries of its task.
    :param run: the result of a task.
    :param say: what to print of a result.
    :param apart: each task in a process of its own.
    :param cold: of which tasks to measure a run with an empty cache of the compiler, in its own process.
    :param timeout: seconds for a task in its own process.
    """
    done = read(output)
    missing = [key for key in keys if not has(done, key)]
    for key in tqdm(missing, unit="run", disable=None):  # none where the output is not a terminal
        alone = apart or cold(key)
        found = isolated(key, timeout, cold(key)) if alone else attempt(key, run)
        tqdm.write(say(append(output, {**key, **found, "isolated": alone})))
        sys.stdout.flush()


def chosen(starts: list[str], names: tuple[str, ...]) -> list[str]:
    """The names that begin with one of the starts, in their own order; all without any."""
    for start in starts:
        if not any(name.startswith(start) for name in names):
            raise SystemExit(f"expected the start of one of {', '.join(names)}, got {start!r}")
    return [name for name in names if not starts or any(name.startswith(start) for start in starts)]
