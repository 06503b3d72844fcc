"""Finds the processes of a launch, by ``torchrun`` or by the user."""

import atexit
import os
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from ._ranks import ALONE, Ranks

__all__ = ["Distributed", "find_ranks"]

Distributed = Literal["auto"] | bool

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for the others, where the user has not made the process group."""


def _launched() -> bool:
    """Whether this process was started by ``torchrun``, or as it does."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def find_ranks(distributed: Distributed, device: torch.device) -> Ranks:
    """The processes of a fit; the process group is initialised where there is none.

    :param distributed: False for this process alone, True to demand others, "auto" to look.
    :param device: of the parameters.
    :raises ValueError: if there are no others, or their process group cannot serve the device.
    """
    if distributed not in (True, False, "auto"):
        raise ValueError(f"distributed: expected True, False or 'auto', got {distributed!r}")
    if distributed is False:
        return ALONE
    ready = dist.is_available() and dist.is_initialized()
    if not ready and not (dist.is_available() and _launched()):
        if distributed is True:
            raise ValueError(
                "distributed: expected a process group or the environment of torchrun with True, got "
                "neither; start the script by `torchrun --nproc-per-node 2 script.py`"
            )
        return ALONE
    if not ready:
        if int(os.environ["WORLD_SIZE"]) == 1:
            return ALONE
        _meet(_backend_for(device))
        atexit.register(_leave)
    backend = str(dist.get_backend_config()) if dist.get_world_size() > 1 else "gloo"
    served = dict(part.split(":", 1) for part in backend.split(",") if ":" in part)
    wanted = list(dict.fromkeys(("cpu", device.type)))
    if (served and not set(wanted) <= set(served)) or ("nccl" in backend and not torch.cuda.is_available()):
        raise ValueError(
            f"distributed: expected a process group that serves {' and '.join(wanted)}, got "
            f"{backend!r}{'' if torch.cuda.is_available() else ' on a machine without GPUs'}; "
            f"use `torch.distributed.init_process_group({_backend_for(device)!r})`"
        )
    if not any(kind in backend for kind in ("gloo", "nccl", "mpi", "ucc")):
        raise ValueError(f"distributed: expected a process group of gloo or nccl, got {backend!r}")
    size = dist.get_world_size()
    return Ranks(dist.get_rank(), size, device) if size > 1 else ALONE


def _meet(backend: str) -> None:
    """Makes the process group of a launch.

    The store of ``torchrun`` outlives the processes: after a restart they would find the addresses of the
    dead ones there, but for a prefix.  Each machine counts its own restarts: several do as torch does.
    """
    from torch.distributed.rendezvous import rendezvous  # not in builds without processes

    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(  # type: ignore[attr-defined]
            f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
        )
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)


def _backend_for(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
