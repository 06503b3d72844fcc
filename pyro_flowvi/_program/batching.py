"""Many runs of a program as one, along a plate in front of its own: whether that is so, and in what parts.

Elsewhere a plate of many is opened, scored and taken apart with what stands here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import pyro
import torch
from torch import Tensor

from .._types import Program, Trace

__all__ = [
    "NUM_PROBES",
    "Score",
    "align",
    "batched",
    "even_sizes",
    "in_parts",
    "runs_batched",
    "site_log_probs",
    "sum_apart",
]

NUM_PROBES = 3
"""Runs in the test of batching: not two, so that an event of size two is not taken for them."""
_PLATE = "_particles"
_Out = TypeVar("_Out", Tensor, tuple[Tensor, Tensor])


class Score(NamedTuple):
    """Log densities of runs, and the sum of the magnitudes that they were added up from.

    Rounding is relative to that sum; where it is None, to the log densities themselves.
    """

    log_prob: Tensor
    magnitude: float | None = None


def batched(program: Program, size: int, nesting: int) -> Program:
    """The program, run ``size`` times at once.

    :param nesting: dimensions that its own plates take.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(_PLATE, size, dim=-1 - nesting):
            return program(*args, **kwargs)

    return run


def align(values: Tensor, event_dim: int, nesting: int) -> Tensor:
    """Values of a site, one for each run, with the runs at the dimension where :func:`batched` has them.

    :param values: shape ``(size,) + batch + event``.
    :param event_dim: number of event dimensions.
    """
    ones = (1,) * (nesting - (values.dim() - 1 - event_dim))
    return values.reshape(values.shape[:1] + ones + values.shape[1:])


def sum_apart(log_prob: Tensor, size: int, nesting: int) -> Tensor:
    """A site's log density summed for each of ``size`` particles; one that all share counts for each.

    :param log_prob: with the particles at dimension ``-1 - nesting``, or without them.
    """
    if log_prob.dim() <= nesting:
        return log_prob.sum().expand(size)
    return log_prob.reshape(log_prob.shape[-1 - nesting], -1).sum(-1).expand(size)


def site_log_probs(trace: Trace, size: int | None, nesting: int) -> dict[str, Tensor]:
    """Log density of each sample site.

    :param trace: of runs, without subsample sites.
    :param size: of how many runs together; None for a run of the program as it is.
    :return: site name -> shape ``(size,)``, or a scalar.
    """
    trace.compute_log_prob()
    terms = {name: site["log_prob"] for name, site in trace.nodes.items() if site["type"] == "sample"}
    return {
        name: term.sum() if size is None else sum_apart(term, size, nesting) for name, term in terms.items()
    }


def runs_batched(
    together: Callable[[], Mapping[str, Score]],
    alone: Callable[[int], Mapping[str, Score]],
    tolerance: float,
) -> bool:
    """Whether :data:`NUM_PROBES` runs at once have the log densities that they have one by one.

    :param together: scores of all of them, by site.
    :param alone: the same of one.
    :param tolerance: multiples of eps by which a score may depend on being one of a batch.
    """
    try:
        batch = together()
        single = [alone(i) for i in range(NUM_PROBES)]
        if any(part.keys() != batch.keys() for part in single):
            return False
        return all(
            _agree(score, torch.stack([part[name].log_prob for part in single]), tolerance)
            for name, score in batch.items()
        )
    except Exception:  # whatever a program raises that was not written for batches
        return False


def _agree(score: Score, alone: Tensor, tolerance: float) -> bool:
    allowed = tolerance * torch.finfo(score.log_prob.dtype).eps
    rtol, atol = allowed, allowed
    if score.magnitude is not None:
        rtol, atol = 0.0, allowed * (1.0 + score.magnitude)
    alone = alone.reshape(NUM_PROBES)
    return torch.allclose(score.log_prob, alone, rtol=rtol, atol=atol, equal_nan=True)


def in_parts(fn: Callable[[Tensor], _Out], points: Tensor, size: int) -> _Out:
    """A function of many points, called with at most ``size`` of them."""
    parts = [fn(part) for part in points.split(size)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    first, second = zip(*parts, strict=True)
    return torch.cat(first), torch.cat(second)


def even_sizes(total: int, most: int) -> list[int]:
    """The sizes of as few parts of ``total`` as have at most ``most`` each, alike up to one."""
    count = -(-total // most)
    return [total // count + (i < total % count) for i in range(count)]
