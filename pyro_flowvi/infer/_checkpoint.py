"""Checkpoints of a fit: written atomically, checked when read, enough to go on bit for bit.

Of several ranks each has a part in a file of its own.  A set of parts has a number, and counts once the file
that all share, which rank 0 writes, names it; that file takes the place of the last one when all parts are
there, and what is left of an unfinished set is not looked at.
"""

import os
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from .._paths import check_file, replacing
from .._ranks import ALONE, LostRank, Ranks
from ._digest import digest
from ._saved_state import part_of, regrouped, state_of_run
from ._training_loop import TrainingLoop

__all__ = ["Checkpoint", "fingerprint"]

_FORMAT = "pyro_flowvi fit 3"


def fingerprint(settings: Mapping[str, Any], data: Any) -> dict[str, str]:
    """What a checkpoint and a call of ``fit`` must agree in, as text."""
    return {
        **{name: repr(value) for name, value in settings.items()},
        "data": digest(data),
        "threads": str(torch.get_num_threads()),
        "torch": str(torch.__version__),  # of a class that torch.load refuses
        "pyro": str(pyro.__version__),
        "python": platform.python_version(),
    }


class Checkpoint:
    """A file that holds a run, and those next to it that hold the ranks' parts.

    :param path: where; its folder must exist.
    :param ranks: the processes, all of which see that folder.
    :raises ValueError: if the folder does not exist, or ``path`` is one.
    """

    def __init__(self, path: str | os.PathLike[str], ranks: Ranks = ALONE) -> None:
        self.path, self._ranks = check_file("checkpoint", path), ranks
        self._generation = 0
        """The number of the last complete set of parts."""

    def _part(self, generation: int, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{generation}.rank{rank}")

    def read(
        self, expected: Mapping[str, str], rows: Tensor | None = None, batches: bool = False
    ) -> dict[str, Any] | None:
        """What the file holds, with this rank's part; None if there is none.

        :param expected: what describes this run.
        :param rows: those of this rank.
        :param batches: whether each number of ranks sees other data first.
        :raises ValueError: on all ranks, if it is no checkpoint, is cut short, or is one of another run.
        """
        found = self._ranks.same(
            self._together(lambda: self._read_shared(expected, batches) if self._ranks.leads else None)
        )
        if found is None:
            return None
        self._generation = found["generation"]

        def own_part() -> dict[str, Any]:
            if found["ranks"] == self._ranks.size:
                return self._read_part(found, self._ranks.rank)
            return regrouped((self._read_part(found, rank) for rank in range(found["ranks"])), rows)

        return {**found, "part": self._together(own_part)}

    def _together(self, act: Callable[[], Any]) -> Any:
        """Does something on all ranks; what one runs into is raised on all of them."""
        error: Exception | None = None
        result = None
        try:
            result = act()
        except LostRank:
            raise
        except Exception as raised:
            error = raised
        failed = next((other for other in self._ranks.all(error) if other is not None), None)
        if failed is not None:
            raise failed
        return result

    def _read_shared(self, expected: Mapping[str, str], batches: bool) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        state = self._load(self.path)
        found = state["fingerprint"]
        other = state["ranks"] != self._ranks.size
        free = {name for name, may in (("threads", other), ("data", other and batches)) if may}
        keys = [key for key in expected if key not in free and found.get(key) != expected[key]]
        if keys:
            told = ", ".join(f"{key} ({str(found.get(key))[:80]}, now {expected[key][:80]})" for key in keys)
            raise ValueError(
                f"checkpoint: expected one of this run, got {str(self.path)!r}, which differs in {told}; "
                "delete it to start afresh"
            )
        return state

    def _read_part(self, shared: Mapping[str, Any], rank: int) -> dict[str, Any]:
        if shared["ranks"] == 1:
            return shared["part"]  # type: ignore[no-any-return]
        return self._load(self._part(shared["generation"], rank))

    def _load(self, path: Path) -> dict[str, Any]:
        try:
            place = None if self._ranks.alone else self._ranks.place
            state = torch.load(path, map_location=place, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"checkpoint: expected a file that fit has written, got {str(path)!r}, which is "
                f"{'another kind of file or cut short' if path.exists() else 'missing'}; "
                f"delete {str(self.path)!r} to start afresh"
            ) from error
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(f"checkpoint: expected a file that fit has written, got {str(path)!r}")
        return state

    def write(self, loop: TrainingLoop, identity: Mapping[str, str]) -> None:
        """Writes the run, on all ranks at the same step.

        :raises OSError: on all ranks, if one cannot write.
        """
        ranks, generation = self._ranks, self._generation + 1
        shared = {
            "fingerprint": dict(identity),
            "ranks": ranks.size,
            "generation": generation,
            **state_of_run(loop),
        }
        part = part_of(loop)
        if ranks.alone:
            self._save(self.path, {**shared, "part": part})
        else:
            self._together(lambda: self._save(self._part(generation, ranks.rank), part))
            self._together(lambda: self._save(self.path, shared) if ranks.leads else None)
        self._generation = generation
        if ranks.leads:
            own = re.compile(rf"{re.escape(self.path.name)}\.(\d+)\.rank\d+(\.partial)?")
            for path in self.path.parent.iterdir():
                found = own.fullmatch(path.name)
                if found and (ranks.alone or int(found[1]) != generation):
                    path.unlink(missing_ok=True)

    def _save(self, path: Path, state: Mapping[str, Any]) -> None:
        with replacing(path) as partial, open(partial, "wb") as file:
            torch.save({"format": _FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
