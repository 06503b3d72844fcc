"""A model at many draws of its latents: one trace of all of them, or one of each."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from .._program.batching import align
from .._program.log_weights import LogWeights

__all__ = ["stacked", "traces_at"]


def traces_at(
    particles: LogWeights, sites: Mapping[str, Tensor], model: Callable[..., Any], shapes: Mapping[str, int]
) -> list[Any]:
    """One trace of a model at all draws, or one at each where it does not run for many at once.

    :param particles: model and guide, and their arguments.
    :param sites: name -> draws of a latent, ``(S,) + site shape``.
    :param model: what is run: the model, or the model without its data.
    :param shapes: name -> event dimensions of each of the sites.
    """
    with pyro.validation_enabled(False):
        if particles.vectorized:
            return [_together(particles, sites, model, shapes)]
        return [
            poutine.trace(poutine.condition(model, data={k: v[i] for k, v in sites.items()})).get_trace(
                *particles.args, **particles.kwargs
            )
            for i in range(len(next(iter(sites.values()))))
        ]


def _together(
    particles: LogWeights, sites: Mapping[str, Tensor], model: Callable[..., Any], shapes: Mapping[str, int]
) -> Any:
    nesting, size = particles.structure.max_plate_nesting, len(next(iter(sites.values())))
    values = {name: align(value, shapes[name], nesting) for name, value in sites.items()}
    program = particles.batched(poutine.condition(model, data=values), size)
    return poutine.trace(program).get_trace(*particles.args, **particles.kwargs)


def stacked(traces: list[Any], name: str, key: str, shape: Any, size: int) -> NDArray[Any]:
    """One entry of a site at all draws, shape ``(S,) + shape``."""
    if len(traces) < size:
        value = traces[0].nodes[name][key]
        lead = value.dim() - len(shape)
        if lead <= 0:  # the same for all draws
            return _numpy(value.expand((size,) + tuple(shape)))
        padded = value.reshape((value.shape[0], *value.shape[lead:]))
        return _numpy(padded.expand((size,) + tuple(shape)))
    return _numpy(torch.stack([trace.nodes[name][key].expand(shape) for trace in traces]))


def _numpy(value: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = np.asarray(value.detach().cpu().numpy())
    return array
