"""Functions that run on several processes at once, which find each other over gloo."""

import multiprocessing
import os
import time
import traceback
from datetime import timedelta

import pyro
import torch
import torch.distributed

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pyro_flowvi.infer", "pyro_flowvi.autoguide"])
PATIENCE = timedelta(seconds=60)


def _enter(function, rank, size, folder, double, patience, args):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    pyro.clear_param_store()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=patience
    )
    try:
        found = function(*args)
    except Exception as error:
        traceback.print_exc()
        found = error
    torch.save(found, folder / f"{rank}.pt")
    os._exit(0)  # without a word to those that still wait


def on_ranks(folder, size, function, *args, double=True, limit=240.0, patience=PATIENCE):
    """What a function of a test module returns, or raises, on each rank; None of one that has died.

    :param folder: an empty one.
    """
    folder.mkdir(exist_ok=True)
    tasks = [(function, rank, size, folder, double, patience, args) for rank in range(size)]
    processes = [FORKS.Process(target=_enter, args=task, daemon=True) for task in tasks]
    for process in processes:
        process.start()
    ends = time.monotonic() + limit
    for process in processes:
        process.join(max(0.0, ends - time.monotonic()))
    late = [process.pid for process in processes if process.is_alive()]
    for process in processes:
        process.kill()
    assert not late, f"ranks still running after {limit} s"
    files = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]
