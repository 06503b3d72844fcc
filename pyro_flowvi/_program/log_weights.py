"""Many draws of a guide, scored one by one: the log importance weights log p(x, z) - log q(z)."""

import math
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import TransformedDistribution

from .._types import Program, Trace
from .batching import NUM_PROBES, Score, batched, even_sizes, runs_batched, site_log_probs
from .call import as_program, check_guide_trace, is_handler
from .data import check_data, naming_arrays
from .enumeration import enumerated_log_weights
from .sites import innermost
from .structure import ProgramStructure, sample_sites
from .validation import check_shapes

__all__ = ["LogWeights"]

_ROUNDING = 256.0
"""Multiples of eps by which a site's log density may depend on being one of a batch."""


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


def _leave_out_params(guide_trace: Trace, model_trace: Trace) -> None:
    """Takes the model's parameters out of the trace of a guide that runs the model."""
    for name, node in model_trace.nodes.items():
        if node["type"] == "param" and name in guide_trace.nodes:
            guide_trace.remove_node(name)


def _drawn(site: Any) -> Any:
    return {"enumerate": None} if site["infer"].get("marginal") else {}


class LogWeights:
    """Draws from a guide with their log weights, in one vectorised run where the model allows.

    Whether it does is tested, not assumed: a few particles are run at once and one by one, and the log
    densities of every site compared.

    :param model: a Pyro model.
    :param guide: a guide for it.
    :param args: the model's positional arguments.
    :param kwargs: the model's keyword arguments.
    :param max_plate_nesting: of the user's objective, for Pyro's checks of the shapes.
    :raises ValueError: where Pyro's validation refuses the shapes of a site, the data are no tensors, or the
        guide observes data.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        max_plate_nesting: float = math.inf,
    ) -> None:
        self.model, self.guide = model, guide
        self.program: Program = as_program(guide)
        """The guide as a program that draws the latents and nothing else."""
        self.args, self.kwargs = args, dict(kwargs or {})
        with poutine.block(), torch.no_grad():
            with naming_arrays(model, self.args, self.kwargs):
                guide_trace: Trace = poutine.trace(self.program).get_trace(*self.args, **self.kwargs)
                model_trace = self._replay(guide_trace)
            if is_handler(guide):
                _leave_out_params(guide_trace, model_trace)
            check_guide_trace(guide_trace)
            check_data(model_trace, model, self.args, self.kwargs)
            check_shapes(model_trace, guide_trace, max_plate_nesting)
            for name, site in sample_sites(guide_trace).items():
                _check_untransformed(name, site)
            self.structure: ProgramStructure = ProgramStructure.of(model_trace, guide_trace)
            """What model and guide are made of."""
            self._nesting = self.structure.max_plate_nesting
            self.vectorized: bool = (
                not self.structure.sequential
                and self._vectorizes(guide_trace, model_trace)
                and self._sums_vectorized()
            )
            """Whether the model gives the same log density for many particles at once."""

    def _replay(self, guide_trace: Trace, model: Program | None = None) -> Trace:
        replayed = poutine.replay(model or self.model, trace=guide_trace)
        return poutine.trace(replayed).get_trace(*self.args, **self.kwargs)

    def batched(self, program: Program, size: int) -> Program:
        """Model or guide, run ``size`` times at once."""
        return batched(program, size, self._nesting)

    def _traces(self, size: int) -> tuple[Trace, Trace]:
        guide = self.batched(self.program, size)
        guide_trace: Trace = poutine.trace(guide).get_trace(*self.args, **self.kwargs)
        return guide_trace, self._replay(guide_trace, self.batched(self.model, size))

    def score(self, trace: Trace, size: int) -> Tensor:
        """The log density of each particle of a batched run, shape ``(size,)``."""
        parts = site_log_probs(prune_subsample_sites(trace), size, self._nesting)
        return torch.stack(list(parts.values())).sum(0) if parts else torch.zeros(size)

    def _vectorizes(self, guide_one: Trace, model_one: Trace) -> bool:
        """Whether every site scores each of a few particles run together as it does alone."""
        traces = cache(lambda: self._traces(NUM_PROBES))
        values = {**sample_sites(guide_one, drawn=True), **sample_sites(model_one, drawn=True)}

        def scores_alike(which: int, program: Program) -> bool:
            return runs_batched(
                lambda: self._site_scores(traces()[which], NUM_PROBES),
                lambda i: self._site_scores(self._slice(i, program, values, *traces())),
                _ROUNDING,
            )

        # A packed latent determines the other sites to the last bit only in its own run.
        return scores_alike(1, self.model) and (
            bool(self.structure.auxiliary) or scores_alike(0, self.program)
        )

    def _sums_vectorized(self) -> bool:
        """Whether the model also runs for particles together where its discrete sites have all values."""
        if not self.structure.enumerated_by_model or self.structure.summed_by_guide:
            return True
        try:
            with torch.random.fork_rng():
                self._summed(NUM_PROBES)
        except Exception:  # whatever a program raises that was not written for batches
            return False
        return True

    @property
    def _drawn_program(self) -> Program:
        return poutine.infer_config(self.program, _drawn) if self.structure.marginal else self.program

    def _summed(self, size: int) -> Tensor:
        guide = self._drawn_program
        return enumerated_log_weights(self.model, guide, self.args, self.kwargs, size, self._nesting)

    def _site_scores(self, trace: Trace, size: int | None = None) -> dict[str, Score]:
        trace = prune_subsample_sites(trace)
        scores = {}
        for name, log_prob in site_log_probs(trace, size, self._nesting).items():
            site = trace.nodes[name]
            if not getattr(innermost(site["fn"]), "lower_bound", False):  # of a copy it has another estimate
                magnitude = site["log_prob"].nan_to_num(0.0, 0.0, 0.0).abs().sum()
                scores[name] = Score(log_prob, float(magnitude))
        return scores

    def _slice(self, index: int, program: Program, templates: Any, *traces: Trace) -> Trace:
        """A run of one program by itself, at the values of particle ``index`` of a batched run."""
        nodes = {name: site for trace in traces for name, site in trace.nodes.items()}
        replayed = poutine.Trace()
        for name, site in templates.items():
            value = nodes[name]["value"]
            if not site_is_subsample(site):
                rank = 1 + self._nesting + site["fn"].event_dim
                if value.dim() >= rank and value.shape[-rank] == NUM_PROBES:
                    value = value.select(-rank, index)
                value = value.reshape(site["value"].shape)
            replayed.add_node(name, **{**site, "value": value})
        return self._replay(replayed, program)

    @torch.no_grad()
    def draws(self, num_samples: int) -> dict[str, Tensor]:
        """Independent draws of every latent site: name -> shape ``(num_samples,) + site shape``."""
        with poutine.block():
            if self.vectorized:
                trace: Trace = poutine.trace(self.batched(self.program, num_samples)).get_trace(
                    *self.args, **self.kwargs
                )
                return {
                    name: trace.nodes[name]["value"].reshape((num_samples,) + shape)
                    for name, shape in self.structure.latents.items()
                }
            traces: list[Any] = [
                poutine.trace(self.program).get_trace(*self.args, **self.kwargs) for _ in range(num_samples)
            ]
        return {
            name: torch.stack([trace.nodes[name]["value"] for trace in traces])
            for name in self.structure.latents
        }

    def point_masses(self) -> list[str]:
        """Continuous sites of which all draws are one value: the guide has no density there."""
        return [
            name
            for name, value in self.draws(2).items()
            if name not in self.structure.discrete and value.numel() and value[0].equal(value[1])
        ]

    @torch.no_grad()
    def log_weights(self, num_samples: int, max_batch: int = 4096) -> Tensor:
        """log p(x, z) - log q(z) of independent draws, shape ``(num_samples,)``.

        Enumerated sites are summed out of p.
        """
        with poutine.block():
            guide = self._drawn_program
            if not self.vectorized or self.structure.summed_by_guide:
                kind: Any = TraceEnum_ELBO if self.structure.sums_out else Trace_ELBO
                loss = kind(max_plate_nesting=self._nesting)
                run = partial(loss.loss, self.model, guide, *self.args, **self.kwargs)
                losses = [run() for _ in range(min(2, num_samples))]
                left = num_samples - len(losses)
                same = self.structure.draws_nothing and losses[0] == losses[-1]
                losses += losses[:1] * left if same else [run() for _ in range(left)]
                return -torch.tensor(losses, dtype=torch.float64)
            parts = []
            for size in even_sizes(num_samples, max_batch):
                if self.structure.enumerated_by_model:
                    parts.append(self._summed(size))
                else:
                    guide_trace, model_trace = self._traces(size)
                    parts.append(self.score(model_trace, size) - self.score(guide_trace, size))
            return torch.cat(parts)
