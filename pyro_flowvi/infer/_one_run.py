"""What makes the ranks of a fit one run: the same arguments, random numbers, and start."""

import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._launch import find_ranks
from .._program.log_weights import LogWeights
from .._ranks import Ranks
from ..autoguide._protocol import FitGuide
from ..autoguide._sweep import Sweep
from ._batches import Call
from ._digest import digest

__all__ = ["check_same_call", "check_same_sites", "quiet_but_first", "ranks_of", "share_start"]

OPTIONS = ("num_steps", "lr", "num_particles", "tolerance", "seed", "compile")
"""Those that all ranks have to give alike, and that tell by themselves what they are."""
GIVEN = ("batches", "validation", "init", "checkpoint", "optim", "loss")
"""Those that all have to give or leave out: each changes what ranks tell each other, and when."""


def ranks_of(options: Mapping[str, Any]) -> Ranks:
    """The processes of a fit, and their random numbers from the same seed.

    :param options: of :func:`pyro_flowvi.fit`.
    :raises ValueError: if there are none to be found, or they cannot work where the guide is.
    """
    guide = options["guide"]
    known: list[Tensor] = list(guide.parameters()) if isinstance(guide, nn.Module) else []
    known += [
        leaf for leaf in pytree.tree_leaves((options["args"], options["kwargs"])) if isinstance(leaf, Tensor)
    ]
    ranks = find_ranks(options["distributed"], known[0].device if known else torch.empty(0).device)
    if ranks.alone:
        return ranks
    ranks.check_same(
        {name: repr(options[name]) for name in OPTIONS}
        | {f"whether {name} is given": options[name] is not None for name in GIVEN}
    )
    if options["seed"] is None:
        pyro.set_rng_seed(ranks.same(int(torch.randint(2**31, (1,), device="cpu"))))
    return ranks


def check_same_call(ranks: Ranks, options: Mapping[str, Any], call: Call) -> None:
    """Holds versions, programs and data of a call against those of the other ranks.

    Without batches, data are the same to the last digit; the rows of a batch may be others, and fewer.

    :raises ValueError: on all ranks, with what differs.
    """
    if ranks.alone:
        return
    given = options["batches"] is not None
    ranks.check_same(
        {
            "torch": str(torch.__version__),
            "pyro": str(pyro.__version__),
            "python": platform.python_version(),
            "model": _name(options["model"]),
            "guide": _name(options["guide"]),
            "optim": type(options["optim"]).__name__,
            "loss": type(options["loss"]).__name__,
            "batches: forms of data" if given else "args: forms of data": _forms(call, given),
            **({} if given else {"args: contents of data, by a checksum,": digest(call)}),
            "validation: contents, by a checksum,": digest(options["validation"]),
        }
    )


def _name(program: Any) -> str:
    return getattr(program, "__qualname__", type(program).__qualname__)


def _forms(call: Call, given: bool) -> str:
    """Types and shapes of all tensors of a call; of rows that differ, but for their number."""
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
    return "; ".join(f"{t.dtype} {tuple(t.shape[1:] if given else t.shape)}" for t in tensors)


def check_same_sites(ranks: Ranks, pair: LogWeights) -> None:
    """Holds latents and parameters against those of the other ranks.

    :raises ValueError: on all ranks, with what differs.
    """
    if not ranks.alone:
        structure = pair.structure
        latents = {name: tuple(shape) for name, shape in structure.latents.items()}
        ranks.check_same({"model: latents": latents, "guide: parameters": sorted(structure.params.items())})


def share_start(ranks: Ranks, answers: FitGuide, guide: Any, sweep: Sweep | None) -> None:
    """Gives all ranks the parameters, buffers and frame of rank 0, but for what each has of rows."""
    if ranks.alone:
        return
    frame = answers.frame()
    shared = ranks.same(None if frame is None else frame if sweep is None else (*frame[:2], {}, *frame[3:]))
    if shared is not None and not ranks.leads:
        own = {} if frame is None or sweep is None else frame[2]
        answers.set_frame(shared if sweep is None else (*shared[:2], own, *shared[3:]))
    held: dict[str, Tensor] = dict(pyro.get_param_store().named_parameters())
    if isinstance(guide, nn.Module):
        held |= dict(guide.named_parameters())
        held |= {f"buffer {name}": buffer for name, buffer in guide.named_buffers()}
    apart = set() if sweep is None else {id(param) for param in sweep.tables.by_row()}
    distinct = {id(held[name]): held[name] for name in sorted(held) if id(held[name]) not in apart}
    ranks.check_same({"guide: forms of parameters": [tuple(tensor.shape) for tensor in distinct.values()]})
    ranks.lead(*distinct.values())


@contextmanager
def quiet_but_first(ranks: Ranks) -> Iterator[None]:
    """Warnings come from rank 0 alone."""
    if ranks.leads:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
