"""What a checkpoint keeps of a run, and how a run takes it over."""

import dataclasses
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._compile.optimizers import inner_optimizer, meet
from .._noise import noise_state, set_noise_state
from .._ranks import Ranks
from ..autoguide._protocol import as_fit_guide
from ..objectives._choice import state_of
from ._flow_steps import FlowSteps
from ._progress import Progress
from ._training_loop import TrainingLoop

__all__ = ["part_of", "regrouped", "restore", "state_of_run"]

Part = dict[str, Any]
"""What a rank alone knows of a run: its rows, the frame with their fixed numbers, its random numbers."""


def state_of_run(loop: TrainingLoop) -> dict[str, Any]:
    """What all ranks share."""
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
        "mode": loop.stepper.mode,
        "flow": loop.stepper.state() if isinstance(loop.stepper, FlowSteps) else None,
        "data": loop.arguments.start,
        "start": loop.start,
    }


def part_of(loop: TrainingLoop) -> Part:
    """What this rank alone knows."""
    numpy: Any = np.random.get_state(legacy=True)
    return {
        "frame": as_fit_guide(loop.run.model, loop.run.guide).frame(),
        "rows": loop.stepper.rows() if isinstance(loop.stepper, FlowSteps) else None,
        "random": {
            "torch": noise_state(),
            "own": loop.run.ranks.noise,
            "numpy": [numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]],
            "python": random.getstate(),
        },
    }


def regrouped(parts: Iterable[Part], rows: Tensor | None) -> Part:
    """The part of a rank, of those that another number of ranks has left.

    Random numbers go on where all shared them; the place in an epoch is lost.

    :param rows: those of the rank; None where rows are nobody's own.
    :raises ValueError: if the parts do not have them all.
    """
    tables: dict[tuple[str, str], list[Tensor]] = {}
    found: list[Tensor] = []
    first: Part = {}
    for part in parts:
        first = first or part
        state, frame = part["rows"], part["frame"]
        if rows is None or state is None:
            break
        here = torch.isin(state["rows"], rows)
        found.append(state["rows"][here])
        first["rows"]["rest"]["seen"] |= state["rest"]["seen"]
        by_row = {("row", name): value for name, value in state["by_row"].items()}
        by_row |= {("frame", name): value for name, value in (frame[2] if frame else {}).items()}
        for key, value in by_row.items():
            tables.setdefault(key, []).append(value[here])
    taken = {"frame": first["frame"], "rows": first["rows"], "random": {"torch": first["random"]["torch"]}}
    if rows is None or not found:
        return taken
    numbers = torch.cat(found)
    order = numbers.argsort()
    if not torch.equal(numbers[order], rows):
        raise ValueError(
            "checkpoint: expected one of the same rows, got one without some of them; delete it to "
            "start afresh"
        )
    sorted_by = {key: torch.cat(values)[order] for key, values in tables.items()}
    rest = {name: first["rows"]["rest"][name] for name in ("seen", "centre")}
    taken["rows"] = {"rows": rows, "by_row": _of("row", sorted_by), "rest": rest}
    if first["frame"]:
        taken["frame"] = (*first["frame"][:2], _of("frame", sorted_by), *first["frame"][3:])
    return taken


def _of(kind: str, tables: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    return {name: value for (own, name), value in tables.items() if own == kind}


@torch.no_grad()
def restore(loop: TrainingLoop, state: Mapping[str, Any]) -> None:
    """Puts a run back to where a checkpoint was written."""
    run = loop.run
    part = state["part"]
    as_fit_guide(run.model, run.guide).set_frame(part["frame"])
    params = run.optim.find(state["params"])
    for name, value in state["params"].items():
        params[name].copy_(value)
    optim = run.optim.optim
    if isinstance(loop.stepper, FlowSteps):
        loop.stepper.load(state["flow"])
        loop.stepper.load_rows(part["rows"])
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
    _set_random(part["random"], run.ranks)


def _set_random(saved: Mapping[str, Any], ranks: Ranks) -> None:
    """Has random numbers go on, as far as it is known where they were."""
    if "numpy" in saved:
        name, keys, *rest = saved["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        version, internal, gauss = saved["python"]
        random.setstate((version, tuple(internal), gauss))
        ranks.set_noise(saved["own"])
    set_noise_state(saved["torch"])
