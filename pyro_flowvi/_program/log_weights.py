"""Many draws of a guide, scored one by one: the log importance weights log p(x, z) - log q(z)."""

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import TransformedDistribution

from .._types import Program, Trace
from .batching import sum_apart
from .call import check_guide_trace
from .enumeration import enumerated_log_weights
from .sites import innermost, is_enumerated

__all__ = ["LogWeights"]

_PLATE = "_particles"
_PROBES = 3
"""Particles in the test of vectorisation: not two, so that an event of size two is not taken for them."""
_ROUNDING = 256.0
"""Multiples of eps by which a site's log density may depend on being one of a batch."""


def _samples(trace: Trace, drawn: bool = False) -> dict[str, Any]:
    """The sample sites of a trace by name; of those that were ``drawn``, subsamples included."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not (drawn and site["is_observed"])
    }


def _check_untransformed(name: str, site: Any) -> None:
    """An image of a draw is another tensor, of which a flow with a bound has an estimate from below."""
    fn, transformed = site["fn"], False
    while hasattr(fn, "base_dist"):
        transformed |= isinstance(fn, TransformedDistribution)
        fn = fn.base_dist
    if transformed and getattr(fn, "lower_bound", False):
        raise ValueError(
            f"site {name!r}: expected {type(fn).__name__} untransformed, since only its own draws have the "
            "bound that makes an ELBO, got a TransformedDistribution; draw it at a site with "
            "infer={'is_auxiliary': True}, and its image at a Delta with log_density=-log_det"
        )


def _has_path_gradient(site: Any) -> bool:
    """Pyro's flows are left out: some of their transforms have no inverse, of others it is slow or fails."""
    fn = site["fn"]
    while hasattr(fn, "base_dist") and not isinstance(fn, TransformedDistribution):
        fn = fn.base_dist
    tractable = not (isinstance(fn, TransformedDistribution) or getattr(fn, "lower_bound", False))
    return site_is_subsample(site) or (fn.has_rsample and tractable)


def _is_marginal(site: Any) -> bool:
    """Whether a guide's enumerated site may be drawn, since with what depends on it it has a density."""
    return bool(site["infer"].get("marginal"))


def _drawn(site: Any) -> Any:
    return {"enumerate": None} if _is_marginal(site) else {}


class LogWeights:
    """Draws from a guide with their log weights, in one vectorised run where the model allows.

    Whether it does is tested, not assumed: a few particles are run at once and one by one, and the log
    densities of every site compared.

    :param model: a Pyro model.
    :param guide: a guide for it.
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
            check_guide_trace(guide_trace)
            for name, site in _samples(guide_trace).items():
                _check_untransformed(name, site)
            sites: list[Any] = [*_samples(guide_trace).values(), *_samples(model_trace).values()]
            self.indexed = any(getattr(innermost(site["fn"]), "indexed", False) for site in sites)
            """Whether densities are those of an extended space of latents and indices."""
            guided = _samples(guide_trace).values()
            self.marginal = any(map(_is_marginal, guided))
            """Whether the guide has an enumerated site that may be drawn as well."""
            self._guide_enumerates = any(is_enumerated(site) and not _is_marginal(site) for site in guided)
            self._shapes = {
                name: site["value"].shape
                for name, site in _samples(prune_subsample_sites(guide_trace)).items()
                if not site["infer"].get("is_auxiliary")
            }
            self.has_latents = bool(self._shapes)
            self._discrete = {
                name
                for name, site in _samples(prune_subsample_sites(model_trace)).items()
                if site["fn"].support.is_discrete
            }
            self.params = {
                name: tuple(site["value"].shape)
                for trace in (guide_trace, model_trace)
                for name, site in trace.nodes.items()
                if site["type"] == "param"
            }
            """Parameters of both programs: name -> shape."""
            self.model_has_params = any(
                site["type"] == "param" and name not in guide_trace.nodes
                for name, site in model_trace.nodes.items()
            )
            """Whether the model has parameters that the guide has not."""
            self.largest = max((site["value"].numel() for site in sites), default=1)
            """Elements of the largest value of a site, for one particle."""
            self.path_gradients = all(map(_has_path_gradient, _samples(guide_trace, drawn=True).values()))
            """Whether the densities of the guide's draws can be differentiated at the draws."""
            self._model_enumerates = any(map(is_enumerated, _samples(model_trace).values()))
            self.enumerated = any(is_enumerated(site) for site in sites)
            """Whether a discrete site is summed out, so that ``TraceEnum_ELBO`` is the objective."""
            self.sums_out = self._model_enumerates or self._guide_enumerates
            """Whether that is so of a site that draws of the latents do not tell."""
            self.subsampled = any(
                frame.full_size not in (None, frame.size)
                for site in sites
                for frame in site["cond_indep_stack"]
            )
            """Whether the model sees a random part of its data at each call."""
            self.max_plate_nesting = max(
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
            with pyro.plate(_PLATE, size, dim=-1 - self.max_plate_nesting):
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
        parts = [
            sum_apart(site["log_prob"], size, self.max_plate_nesting) for site in _samples(trace).values()
        ]
        return torch.stack(parts).sum(0) if parts else torch.zeros(size)

    def _vectorizes(self, guide_one: Trace, model_one: Trace) -> bool:
        """Whether every site scores each of a few particles run together as it does alone."""
        try:
            guide_all, model_all = self._traces(_PROBES)
            pairs = [(self.model, model_one, model_all)]
            if not any(site["infer"].get("is_auxiliary") for site in _samples(guide_one).values()):
                # A packed latent determines the other sites to the last bit only in its own run.
                pairs.append((self.guide, guide_one, guide_all))
            values = {**_samples(guide_one, drawn=True), **_samples(model_one, drawn=True)}
            for program, one, batched in pairs:
                apart = [
                    self._site_scores(self._slice(i, program, values, guide_all, model_all))
                    for i in range(_PROBES)
                ]
                together = self._site_scores(batched, _PROBES)
                if set(together) != set(self._site_scores(one)):
                    return False
                for name, (scores, size) in together.items():
                    if getattr(innermost(one.nodes[name]["fn"]), "lower_bound", False):
                        continue  # of a copy of its draw it has another estimate
                    alone = torch.stack([part[name][0] for part in apart]).reshape(_PROBES)
                    allowed = _ROUNDING * torch.finfo(scores.dtype).eps * (1.0 + float(size))
                    if not torch.allclose(scores, alone, rtol=0.0, atol=allowed, equal_nan=True):
                        return False
        except Exception:  # whatever a program raises that was not written for batches
            return False
        return True

    def _site_scores(self, trace: Trace, size: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Log density of each site, for one particle or ``size`` of them, and the sum of magnitudes."""
        trace = prune_subsample_sites(trace)
        trace.compute_log_prob()
        scores = {}
        for name, site in _samples(trace).items():
            log_prob = site["log_prob"]
            magnitude = log_prob.nan_to_num(0.0, 0.0, 0.0).abs().sum()
            scores[name] = (
                log_prob.sum() if size is None else sum_apart(log_prob, size, self.max_plate_nesting),
                magnitude,
            )
        return scores

    def _slice(self, index: int, program: Program, templates: Any, *batched: Trace) -> Trace:
        """A run of one program by itself, at the values of particle ``index`` of a batched run."""
        nodes = {name: site for trace in batched for name, site in trace.nodes.items()}
        replayed = poutine.Trace()
        for name, site in templates.items():
            value = nodes[name]["value"]
            if not site_is_subsample(site):
                rank = 1 + self.max_plate_nesting + site["fn"].event_dim
                if value.dim() >= rank and value.shape[-rank] == _PROBES:
                    value = value.select(-rank, index)
                value = value.reshape(site["value"].shape)
            replayed.add_node(name, **{**site, "value": value})
        return self._replay(replayed, program)

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

    def point_masses(self) -> list[str]:
        """Continuous sites of which all draws are one value: the guide has no density there."""
        return [
            name
            for name, value in self.draws(2).items()
            if name not in self._discrete and value.numel() and value[0].equal(value[1])
        ]

    @torch.no_grad()
    def log_weights(self, num_samples: int, max_batch: int = 4096) -> Tensor:
        """log p(x, z) - log q(z) of independent draws, shape ``(num_samples,)``.

        Enumerated sites are summed out of p.
        """
        with poutine.block():
            guide = poutine.infer_config(self.guide, _drawn) if self.marginal else self.guide
            if not self.vectorized or self._guide_enumerates:
                kind: Any = TraceEnum_ELBO if self.sums_out else Trace_ELBO
                loss = kind(max_plate_nesting=self.max_plate_nesting)
                losses = [loss.loss(self.model, guide, *self.args, **self.kwargs) for _ in range(num_samples)]
                return -torch.tensor(losses, dtype=torch.float64)
            parts = []
            num_batches = -(-num_samples // max_batch)
            for batch in range(num_batches):
                size = num_samples // num_batches + (batch < num_samples % num_batches)
                if self._model_enumerates:
                    parts.append(
                        enumerated_log_weights(
                            self.model, guide, self.args, self.kwargs, size, self.max_plate_nesting
                        )
                    )
                else:
                    guide_trace, model_trace = self._traces(size)
                    parts.append(self._score(model_trace, size) - self._score(guide_trace, size))
            return torch.cat(parts)
