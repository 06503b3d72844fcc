"""Many draws of a guide, scored one by one: the log importance weights log p(x, z) - log q(z)."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from ..init import is_enumerated

__all__ = ["Particles"]

Program = Callable[..., Any]
Trace = Any  # Pyro's type admits no site without a value
_PLATE = "_particles"


class Particles:
    """Draws from a guide with their log weights, in one vectorised run where the model allows.

    Whether it does is tested, not assumed: two particles are run at once and one by one, and the log
    densities compared.

    :param model: a Pyro model.
    :param guide: a guide that has been set up.
    :param args: the model's positional arguments.
    :param kwargs: the model's keyword arguments.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.guide = model, guide
        self.args, self.kwargs = args, dict(kwargs or {})
        with poutine.block(), torch.no_grad():
            guide_trace: Trace = poutine.trace(guide).get_trace(*self.args, **self.kwargs)
            model_trace = self._replay(guide_trace)
            sites: list[Any] = [*guide_trace.nodes.values(), *model_trace.nodes.values()]
            sites = [site for site in sites if site["type"] == "sample"]
            self._shapes = {
                name: site["value"].shape
                for name, site in guide_trace.nodes.items()
                if site["type"] == "sample"
                and not site["infer"].get("is_auxiliary")
                and not site_is_subsample(site)
            }
            self.enumerated = any(is_enumerated(site) for site in sites)
            """Whether a discrete site is summed out, so that ``TraceEnum_ELBO`` is the objective."""
            self.subsampled = any(
                frame.full_size not in (None, frame.size)
                for site in sites
                for frame in site["cond_indep_stack"]
            )
            """Whether the model sees a random part of its data at each call."""
            self._nesting = max(
                (-frame.dim for s in sites for frame in s["cond_indep_stack"] if frame.vectorized),
                default=0,
            )
            sequential = any(site["infer"].get("enumerate") == "sequential" for site in sites)
            self.vectorized = not sequential and self._vectorizes(guide_trace, model_trace)
            """Whether the model gives the same log density for many particles at once."""

    def _replay(self, guide_trace: Trace, model: Program | None = None) -> Trace:
        replayed = poutine.replay(model or self.model, trace=guide_trace)
        return poutine.trace(replayed).get_trace(*self.args, **self.kwargs)

    def _batched(self, fn: Program, size: int) -> Program:
        def run(*args: Any, **kwargs: Any) -> Any:
            with pyro.plate(_PLATE, size, dim=-1 - self._nesting):
                return fn(*args, **kwargs)

        return run

    def _traces(self, size: int) -> tuple[Trace, Trace]:
        guide = self._batched(self.guide, size)
        guide_trace: Trace = poutine.trace(guide).get_trace(*self.args, **self.kwargs)
        return guide_trace, self._replay(guide_trace, self._batched(self.model, size))

    def _score(self, trace: Trace, size: int) -> Tensor:
        """The log density of each particle, shape ``(size,)``."""
        trace = prune_subsample_sites(trace)
        trace.compute_log_prob()
        total = torch.zeros(size)
        for site in trace.nodes.values():
            if site["type"] != "sample":
                continue
            log_prob = site["log_prob"]
            if log_prob.dim() > self._nesting:
                log_prob = log_prob.reshape(log_prob.shape[-1 - self._nesting], -1).sum(-1)
                total = total.to(log_prob) + log_prob
            else:  # a site that all particles share
                total = total.to(log_prob) + log_prob.sum()
        return total

    def _vectorizes(self, guide_one: Trace, model_one: Trace) -> bool:
        try:
            guide_two, model_two = self._traces(2)
            together = self._score(model_two, 2)
            apart = torch.stack(
                [self._single(i, guide_one, model_one, guide_two, model_two) for i in range(2)]
            )
        except Exception:  # whatever a model raises that was not written for batches
            return False
        scale = together.abs().max().clamp(min=1.0) * torch.finfo(together.dtype).eps ** 0.5
        return bool(torch.allclose(together, apart, rtol=0.0, atol=float(scale), equal_nan=True))

    def _single(
        self,
        index: int,
        guide_one: Trace,
        model_one: Trace,
        guide_two: Trace,
        model_two: Trace,
    ) -> Tensor:
        """The model's log density at particle ``index`` of a batched run, evaluated by itself."""
        sliced = guide_one.copy()
        for template, batched in ((guide_one, guide_two), (model_one, model_two)):
            for name, site in template.nodes.items():
                if site["type"] != "sample" or site["is_observed"] or name not in batched.nodes:
                    continue
                value = batched.nodes[name]["value"]
                if not site_is_subsample(site):
                    rank = 1 + self._nesting + site["fn"].event_dim
                    if value.dim() >= rank and value.shape[-rank] == 2:
                        value = value.select(-rank, index)
                    value = value.reshape(site["value"].shape)
                if name not in sliced.nodes:
                    sliced.add_node(name, **{**site, "value": value})
                sliced.nodes[name] = {**site, "value": value}
        trace: Trace = prune_subsample_sites(self._replay(sliced))
        log_prob: Tensor = trace.log_prob_sum()
        return log_prob

    def elbo(self, num_particles: int) -> Trace_ELBO | TraceEnum_ELBO:
        """Pyro's objective for this pair, with that many particles."""
        kind = TraceEnum_ELBO if self.enumerated else Trace_ELBO
        return kind(
            num_particles=num_particles,
            vectorize_particles=self.vectorized and num_particles > 1,
            max_plate_nesting=self._nesting,
        )

    @torch.no_grad()
    def draws(self, num_samples: int) -> dict[str, Tensor]:
        """Independent draws of every latent site: name -> shape ``(num_samples,) + site shape``."""
        with poutine.block():
            if self.vectorized:
                trace: Trace = poutine.trace(self._batched(self.guide, num_samples)).get_trace(
                    *self.args, **self.kwargs
                )
                return {
                    name: trace.nodes[name]["value"].reshape((num_samples,) + shape)
                    for name, shape in self._shapes.items()
                }
            traces: list[Any] = [
                poutine.trace(self.guide).get_trace(*self.args, **self.kwargs) for _ in range(num_samples)
            ]
        return {name: torch.stack([trace.nodes[name]["value"] for trace in traces]) for name in self._shapes}

    @torch.no_grad()
    def log_weights(self, num_samples: int, max_batch: int = 4096) -> Tensor:
        """log p(x, z) - log q(z) of independent draws, shape ``(num_samples,)``.

        Enumerated sites are summed out of p.
        """
        with poutine.block():
            if not self.vectorized:
                loss = self.elbo(num_particles=1)
                losses = [
                    loss.loss(self.model, self.guide, *self.args, **self.kwargs) for _ in range(num_samples)
                ]
                return -torch.tensor(losses, dtype=torch.float64)
            parts = []
            for first in range(0, num_samples, max_batch):
                size = min(max_batch, num_samples - first)
                if self.enumerated:
                    parts.append(self._enumerated_log_weights(size))
                else:
                    guide_trace, model_trace = self._traces(size)
                    parts.append(self._score(model_trace, size) - self._score(guide_trace, size))
            return torch.cat(parts)

    def _enumerated_log_weights(self, size: int) -> Tensor:
        """As Pyro's ``TraceEnum_ELBO`` sums discrete sites out, but keeping the particles apart."""
        elbo = self.elbo(size)
        ((model_trace, guide_trace),) = elbo._get_traces(self.model, self.guide, self.args, self.kwargs)
        costs, factors, _, sum_dims, scale = _compute_model_factors(model_trace, guide_trace)
        particle = model_trace.plate_to_symbol["num_particles_vectorized"]

        def apart(packed: Any) -> Tensor:
            """Sums a packed tensor over all its dimensions but the particles'."""
            dims = packed._pyro_dims
            others = [i for i, dim in enumerate(dims) if dim != particle]
            total: Tensor = packed.sum(others) if others else packed
            return total if particle in dims else total.expand(size)

        terms = [apart(cost) for group in costs.values() for cost in group]
        if factors:
            terms.append(scale * contract_to_tensor(factors, sum_dims, frozenset(particle)))
        for site in guide_trace.nodes.values():
            if site["type"] == "sample":
                terms.append(-apart(site["packed"]["log_prob"]))
        return torch.stack(terms).sum(0)
