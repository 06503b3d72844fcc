"""Latents and data drawn from a model's own joint distribution, and the model of these data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .._types import Program, Site, Trace
from .left_out import counted, uncounted
from .log_density import UnconstrainedModel
from .sites import innermost
from .structure import is_subsampled

__all__ = ["GenerativeModel", "Simulated"]

ROUNDING = 1e-4
"""By what log densities of one value may differ between two runs."""


@dataclass(frozen=True)
class Simulated:
    """One draw of latents and data, and the model of these data.

    :param data: name -> value of every site that is data.
    :param latents: name -> value of every latent.
    :param counted: name -> which of its elements have a density; the rest a mask leaves out.
    :param model: the model, of which the data are those drawn.
    :param args: its positional arguments: the drawn data stand where the data stood.
    :param kwargs: its keyword arguments.
    """

    data: dict[str, Tensor]
    latents: dict[str, Tensor]
    counted: dict[str, Tensor]
    model: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class GenerativeModel:
    """A model as a sampler of latents and data, and of the model of each draw.

    The data are the sites that the model observes, whatever its arguments give them.  An argument, or a view
    of one, that a site observes is written over with what was drawn, so that a guide, and a loop over time,
    read it too; where the model reads it elsewhere as well (a prior's scale, lags of a whole series), all
    arguments stay as they are, and the sites alone observe what was drawn.

    :param model: a Pyro model.
    :param args: the model's positional arguments.
    :param kwargs: the model's keyword arguments.
    :param observed: sites that the model does not observe in this call, and that are data all the same.
    :raises ValueError: if the model has no joint distribution to draw from (factors, scaled densities,
        improper priors, parameters of its own, subsampled plates), or no data.

    Example::

        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1e-6), obs=y)
        >>> drawn = GenerativeModel(model, (torch.tensor(5.0),)).draw()
        >>> abs(drawn.args[0] - drawn.latents["mu"]).item() < 1e-4
        True
    """

    def __init__(
        self,
        model: Program,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        observed: Sequence[str] = (),
    ) -> None:
        self._model, self._args, self._kwargs = model, args, dict(kwargs or {})
        self._observed = tuple(observed)
        self._writes = True
        run, trace, drawn = self._run()
        _check(trace)
        missing = sorted(set(self._observed) - set(trace.nodes))
        if missing:
            raise ValueError(f"observed: expected sites of the model, got {missing}")
        if not run.data:
            raise ValueError(
                "model: expected one that observes data in this call, got no observed site; pass data of the "
                "right shape, or name the sites by observed=[...]"
            )
        self.latents: tuple[str, ...] = tuple(drawn.latents)
        """The names of the latents."""
        self._writes = run.wrote and _reads_as_drawn(run, trace, drawn)
        if any(uncounted(trace.nodes[name]) is not None for name in drawn.latents):
            density = UnconstrainedModel(drawn.model, drawn.args, drawn.kwargs)
            names = [
                name for name, flat in zip(density.packing.names(), density.improper, strict=True) if flat
            ]
            if names:
                raise ValueError(
                    f"site {names[0]!r}: expected a proper prior, got a masked one of a latent that the "
                    "likelihood sees"
                )

    def draw(self) -> Simulated:
        """Latents and data, by Pyro's generator of random numbers."""
        return self._run()[2]

    @torch.no_grad()
    def _run(self) -> tuple["_Simulate", Trace, Simulated]:
        given = (self._args, self._kwargs)
        args, kwargs = _copied(given, {}) if self._writes else given
        storages = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        run = _Simulate(self._observed, storages if self._writes else set())
        with poutine.block(), poutine.trace() as tracer, run:
            try:
                self._model(*args, **kwargs)
            except NotImplementedError as error:
                raise ValueError(f"model: expected sites that can be drawn, got {error}") from error
        trace: Trace = tracer.trace
        sites: dict[str, Site] = {
            name: site
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        }
        latents = {name: site for name, site in sites.items() if name not in run.data}
        drawn = Simulated(
            data=dict(run.data),
            latents={name: site["value"] for name, site in latents.items()},
            counted={name: counted(site) for name, site in latents.items()},
            model=poutine.condition(self._model, data=dict(run.data)),
            args=args,
            kwargs=kwargs,
        )
        return run, trace, drawn


class _Simulate(Messenger):
    """Draws what is observed, and writes it where the observed value stands in an argument."""

    def __init__(self, observed: Sequence[str], storages: set[int]) -> None:
        super().__init__()
        self._observed, self._storages = observed, storages
        self._given: dict[str, Any] = {}
        self.data: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}
        """The log density of each site, as it was when it was drawn."""
        self.wrote = False

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], innermost(msg["fn"])
        if isinstance(fn, dist.ImproperUniform):
            raise ValueError(f"site {name!r}: expected a proper prior to draw from, got ImproperUniform")
        if isinstance(fn, dist.Unit):
            raise ValueError(
                f"site {name!r}: expected a model without pyro.factor, got one with it: what its latents and "
                "data are drawn from is not known"
            )
        if msg["is_observed"] and not isinstance(fn, dist.Delta):  # those are computed, not data
            self._given[name] = msg["value"]
            msg["value"], msg["is_observed"], msg["done"] = None, False, False

    def _pyro_post_sample(self, msg: Any) -> None:
        name, value = msg["name"], msg["value"]
        if site_is_subsample(msg) or msg["is_observed"]:
            return
        score = msg["fn"].log_prob(value)
        self.scores[name] = scale_and_mask(score, msg["scale"], msg["mask"]).clone()
        if name not in self._given and name not in self._observed:
            return
        self.data[name] = value
        place = self._given.get(name)
        if isinstance(place, Tensor) and _is_room(place, value, self._storages):
            place.copy_(value)
            self.wrote = True


def _is_room(place: Tensor, value: Tensor, storages: set[int]) -> bool:
    """Whether a value can be written over an observed one, which is an argument or a view of one."""
    repeated = any(n > 1 and stride == 0 for n, stride in zip(place.shape, place.stride(), strict=True))
    return place.untyped_storage().data_ptr() in storages and place.shape == value.shape and not repeated


def _check(trace: Trace) -> None:
    """Refuses what is no joint distribution, or not the whole of it.

    :raises ValueError: with the remedy.
    """
    params = sorted(name for name, node in trace.nodes.items() if node["type"] == "param")
    if params:
        raise ValueError(
            f"model: expected no parameters of its own, which are trained to the data, got {params}; "
            "give them priors, or pass their values as arguments"
        )
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        for frame in filter(is_subsampled, site["cond_indep_stack"]):
            raise ValueError(
                f"plate {frame.name!r}: expected all {frame.full_size} rows, got {frame.size} of them; "
                "call the model without subsample_size"
            )
        if not bool((torch.as_tensor(site["scale"]) == 1).all()):
            raise ValueError(
                f"site {name!r}: expected a density that is not scaled, got poutine.scale: no data are drawn "
                "from it"
            )


def _reads_as_drawn(run: _Simulate, trace: Trace, drawn: Simulated) -> bool:
    """Whether the model scores what was drawn as it did before the arguments were written over."""
    values = {name: trace.nodes[name]["value"] for name in run.scores}
    with poutine.block():
        again: Trace = poutine.trace(poutine.condition(drawn.model, data=values)).get_trace(
            *drawn.args, **drawn.kwargs
        )
    again.compute_log_prob(lambda name, _: name in run.scores)
    for name, score in run.scores.items():
        node = again.nodes.get(name)
        if node is None or node["log_prob"].shape != score.shape:
            return False
        if not torch.allclose(node["log_prob"], score, ROUNDING, ROUNDING, equal_nan=True):
            return False
    return True


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Arguments with tensors of their own, views of one tensor still views of one."""
    if type(value) is Tensor:
        storage = value.untyped_storage()
        key = storage.data_ptr()
        if key not in memo:
            memo[key] = storage.clone()
        return (
            value.detach().new_empty(0).set_(memo[key], value.storage_offset(), value.shape, value.stride())
        )
    if type(value) in (tuple, list):
        return type(value)(_copied(item, memo) for item in value)
    if type(value) is dict:
        return {key: _copied(item, memo) for key, item in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    """The tensors that :func:`_copied` copies."""
    if type(value) is Tensor:
        return [value]
    if type(value) in (tuple, list, dict):
        items = value.values() if type(value) is dict else value
        return [tensor for item in items for tensor in _tensors(item)]
    return []
