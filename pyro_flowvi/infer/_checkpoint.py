"""Checkpoints of a fit: written atomically, checked when read, enough to go on bit for bit."""

import dataclasses
import hashlib
import os
import platform
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._compile.optimizers import inner_optimizer, meet
from ..autoguide._protocol import as_fit_guide
from ..objectives._choice import state_of
from ._flow_steps import FlowSteps
from ._progress import Progress
from ._training_loop import TrainingLoop

__all__ = ["Checkpoint", "fingerprint", "restore"]

_FORMAT = "pyro_flowvi fit 2"


def _digest(value: Any) -> str:
    """A short name of a nest of tensors and plain values, the same in every process."""
    found = hashlib.sha256()
    leaves, structure = pytree.tree_flatten(value)
    found.update(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu().contiguous()
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            found.update(leaf.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, np.ndarray):
            found.update(leaf.tobytes())
        elif isinstance(leaf, bool | int | float | str | None):
            found.update(repr(leaf).encode())
        else:
            found.update(type(leaf).__name__.encode())
    return found.hexdigest()[:16]


def fingerprint(settings: Mapping[str, Any], data: Any) -> dict[str, str]:
    """What a checkpoint and a call of ``fit`` must agree in, as text."""
    return {
        **{name: repr(value) for name, value in settings.items()},
        "data": _digest(data),
        "threads": str(torch.get_num_threads()),
        "torch": str(torch.__version__),  # of a class that torch.load refuses
        "pyro": str(pyro.__version__),
        "python": platform.python_version(),
    }


class Checkpoint:
    """A file that holds a run.

    :param path: where; its folder must exist.
    :raises ValueError: if the folder does not exist, or ``path`` is one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir() or self.path.is_dir():
            raise ValueError(f"checkpoint: expected a file in a folder that exists, got {str(path)!r}")

    def read(self, expected: Mapping[str, str]) -> dict[str, Any] | None:
        """What the file holds; None if there is none.

        :raises ValueError: if it is no checkpoint, is cut short, or is one of another run.
        """
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"checkpoint: expected a file that fit has written, got {str(self.path)!r}, which is another "
                "kind of file or cut short; delete it to start afresh"
            ) from error
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(f"checkpoint: expected a file that fit has written, got {str(self.path)!r}")
        found = state["fingerprint"]
        keys = [key for key in expected if found.get(key) != expected[key]]
        if keys:
            told = ", ".join(f"{key} ({str(found.get(key))[:80]}, now {expected[key][:80]})" for key in keys)
            raise ValueError(
                f"checkpoint: expected one of this run, got {str(self.path)!r}, which differs in {told}; "
                "delete it to start afresh"
            )
        return state

    def write(self, loop: TrainingLoop, identity: Mapping[str, str]) -> None:
        """Writes the run: to a neighbouring file first, which then takes this one's place."""
        partial = self.path.with_name(self.path.name + ".partial")
        with open(partial, "wb") as file:
            torch.save({"format": _FORMAT, "fingerprint": dict(identity), **_state(loop)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)


def _state(loop: TrainingLoop) -> dict[str, Any]:
    run = loop.run
    params, optim = run.optim.params, run.optim.optim
    optimizers = {}
    for name, param in params.items():
        if param in optim.optim_objs:
            outer = optim.optim_objs[param]
            inner = inner_optimizer(outer)
            state = dict(inner.state.get(param, {}))
            optimizers[name] = {
                "state": {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()},
                "groups": [{k: v for k, v in g.items() if k != "params"} for g in inner.param_groups],
                "schedule": outer.state_dict() if outer is not inner else None,
            }
    numpy: Any = np.random.get_state(legacy=True)
    return {
        "progress": dataclasses.asdict(loop.progress),
        "losses": list(run.losses),
        "params": {name: param.detach().clone() for name, param in params.items()},
        "average": loop.average.values,
        "best": run.best,
        "best_weights": run.best_weights,
        "norms": list(run.optim.norms),
        "limits": run.optim.limits.clone(),
        "optimizers": optimizers,
        "objective": state_of(run.loss),
        "frame": as_fit_guide(run.model, run.guide).frame(),
        "mode": loop.stepper.mode,
        "flow": loop.stepper.state() if isinstance(loop.stepper, FlowSteps) else None,
        "data": loop.arguments.start,
        "start": loop.start,
        "random": {
            "torch": torch.get_rng_state(),
            "numpy": [numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]],
            "python": random.getstate(),
        },
    }


@torch.no_grad()
def restore(loop: TrainingLoop, state: Mapping[str, Any]) -> None:
    """Puts a run back to where a checkpoint was written."""
    run = loop.run
    as_fit_guide(run.model, run.guide).set_frame(state["frame"])
    params = run.optim.find(state["params"])
    for name, value in state["params"].items():
        params[name].copy_(value)
    optim = run.optim.optim
    if isinstance(loop.stepper, FlowSteps):
        loop.stepper.load(state["flow"])
    else:
        meet(optim, params.values())
    for name, saved in state["optimizers"].items():
        outer = optim.optim_objs[params[name]]
        inner = inner_optimizer(outer)
        inner.state[params[name]] = dict(saved["state"])
        for group, entries in zip(inner.param_groups, saved["groups"], strict=True):
            group.update(entries)
        if saved["schedule"] is not None:
            outer.load_state_dict(saved["schedule"])
    if state["objective"]:
        run.loss.load_state_dict(state["objective"])
    loop.progress = Progress(**state["progress"])
    loop.progress.elbos = [tuple(entry) for entry in loop.progress.elbos]  # type: ignore[misc]
    loop.average.values = dict(state["average"])
    run.optim.norms.extend(state["norms"])
    loop.start = state["start"]
    loop.arguments.restart(state["data"])
    run.losses[:] = state["losses"]
    run.best, run.best_weights = dict(state["best"]), state["best_weights"]
    run.optim.limits.copy_(state["limits"])
    loop.stepper.resume(state["mode"])
    saved = state["random"]
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(saved["torch"])
