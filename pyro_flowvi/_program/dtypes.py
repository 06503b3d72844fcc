"""Models of two dtypes: float32 priors with float64 data, and the reverse."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine

from .._types import Trace
from .sites import latent_sites
from .structure import sample_sites

__all__ = ["dtype_for_sums"]


def dtype_for_sums(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], trace: Trace
) -> torch.dtype | None:
    """The dtype that latents need where Pyro sums discrete sites out, which it does in one dtype alone.

    :param model: a Pyro model.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    :param trace: of the model, whose densities may have several dtypes.
    :return: the highest of them; None where there is only one, or the model does not run at such latents.

    Example::

        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float32), 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> y = torch.zeros((), dtype=torch.float64)
        >>> trace = pyro.poutine.trace(model).get_trace(y)
        >>> dtype_for_sums(model, (y,), {}, trace)
        torch.float64
    """
    values = {name: site["value"] for name, site in latent_sites(trace)}
    with poutine.block(), torch.no_grad(), torch.random.fork_rng(), pyro.validation_enabled(False):
        found = {_dtype_of_density(name, site) for name, site in sample_sites(trace).items()}
        found |= {value.dtype for value in values.values()}
        if len(found) == 1:
            return None
        dtype: torch.dtype = functools.reduce(torch.promote_types, found)
        try:
            poutine.condition(model, data={name: value.to(dtype) for name, value in values.items()})(
                *args, **kwargs
            )
        except Exception:  # whatever a model raises, such as of a network in the lower dtype
            return None
    return dtype


def _dtype_of_density(name: str, site: dict[str, Any]) -> torch.dtype:
    try:
        return site["fn"].log_prob(site["value"]).dtype  # type: ignore[no-any-return]
    except ValueError as error:  # a value outside the support; torch does not say at which site
        raise ValueError(f"site {name!r}: {error}") from error
