"""Runs of model and guide whose draws are leaves of a graph, so that gradients follow the paths alone."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pyro
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from .._program.scoring import Scoring
from .._program.sites import innermost, is_enumerated
from .._types import Program, Trace

__all__ = ["Draws", "reaches_others"]

_SCORE_PARTS = pyro.distributions.Distribution.score_parts


def _sites(trace: Trace) -> Iterator[tuple[str, Any]]:
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield name, site


def _is_drawn(name: str, site: Any, path: bool) -> bool:
    """Whether a guide's site is a random draw; raises where it is not one along a path."""
    if site["is_observed"]:
        return False
    if is_enumerated(site):
        raise ValueError(f"site {name!r}: expected no enumeration in the guide; use TraceEnum_ELBO")
    inner = innermost(site["fn"])
    if isinstance(inner, pyro.distributions.Delta):
        return False
    if path and getattr(inner, "lower_bound", False):
        # At a leaf of another graph its density is an estimate from below, and the ELBO one from above.
        raise ValueError(
            f"site {name!r}: expected a tractable density for path gradients, got {type(inner).__name__}; "
            "use Trace_ELBO"
        )
    # A distribution with score parts of its own is reparameterised in part.
    if not site["fn"].has_rsample or getattr(type(inner), "score_parts", _SCORE_PARTS) is not _SCORE_PARTS:
        raise ValueError(
            f"site {name!r}: expected a reparameterised distribution in the guide, got "
            f"{type(site['fn']).__name__}; use Trace_ELBO or TraceGraph_ELBO"
        )
    return True


def reaches_others(total: Tensor, leaves: list[Tensor]) -> bool:
    """Whether the graph of ``total`` has leaves other than these: parameters."""
    own = {id(leaf) for leaf in leaves}
    pending, seen = [total.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in own:
            return True
        pending.extend(child for child, _ in node.next_functions)
    return False


class Draws:
    """One run of model and guide; with ``path``, of the guide again at its draws as leaves of a graph.

    Draws then move by the parameters of the first run, and densities by the leaves.

    :param path: whether gradients of the draws are wanted apart from those of the densities.
    :param nesting: the number of plate dimensions, which are validated.
    :raises ValueError: for a guide that is no program, and a site that is not reparameterised or enumerated.
    """

    def __init__(
        self, model: Program, guide: Program, args: Any, kwargs: Any, *, path: bool, nesting: float
    ) -> None:
        if isinstance(poutine.unwrap(guide), Messenger):
            raise ValueError(
                f"guide: expected a program, got the handler {type(poutine.unwrap(guide)).__name__}, "
                "which runs the model itself; use Trace_ELBO"
            )
        with Scoring() if path else nullcontext():
            drawn: Trace = poutine.trace(guide).get_trace(*args, **kwargs)
        names = [name for name, site in _sites(drawn) if _is_drawn(name, site, path)]
        self.values: dict[str, Tensor] = {}
        """The draws, with their graph."""
        self.leaves: dict[str, Tensor] = {}
        """The same values without."""
        self.own: dict[str, tuple[Tensor, Tensor]] = {}
        """Scores and log densities of draws that know them."""
        again = drawn
        if path:
            leaves: Trace = poutine.Trace()
            for name, site in drawn.nodes.items():
                if site["type"] == "sample" and site_is_subsample(site):
                    leaves.add_node(name, **site)
            for name in names:
                site = drawn.nodes[name]
                self.values[name] = site["value"]
                self.leaves[name] = site["value"].detach().requires_grad_()
                leaves.add_node(name, **{**site, "value": self.leaves[name]})
                score = getattr(site["fn"], "drawn_score", lambda value: None)(site["value"])
                plain = isinstance(site["scale"], float | int) and site["scale"] == 1
                if score is not None and site["mask"] is None and plain:
                    self.own[name] = score, site["fn"].log_prob(site["value"]).detach()
            again = poutine.trace(poutine.replay(guide, trace=leaves)).get_trace(*args, **kwargs)
        model_trace: Trace = poutine.trace(poutine.replay(model, trace=again)).get_trace(*args, **kwargs)
        if is_validation_enabled():
            check_model_guide_match(model_trace, again, nesting)
        for name, site in _sites(model_trace):
            if is_enumerated(site) and name not in again.nodes:
                raise ValueError(f"site {name!r}: expected no enumeration in the model; use TraceEnum_ELBO")
        model_trace, guide_trace = prune_subsample_sites(model_trace), prune_subsample_sites(again)
        model_trace.compute_log_prob()
        # The density of a site that knows its own score is not computed again: that would be an inverse pass.
        guide_trace.compute_log_prob(site_filter=lambda name, site: name not in self.own)
        if is_validation_enabled():
            for _, site in (*_sites(model_trace), *_sites(guide_trace)):
                if "log_prob" in site:
                    check_site_shape(site, nesting)  # type: ignore[arg-type]
        self.model: list[Tensor] = [site["log_prob"] for _, site in _sites(model_trace)]
        """Log densities of the model's sites."""
        guided = {name: site["log_prob"] for name, site in _sites(guide_trace) if name not in self.own}
        self.density: list[Tensor] = [term for name, term in guided.items() if name not in self.leaves]
        """Log densities and factors of the guide that are differentiated as they are: those of points."""
        self.scored: list[Tensor] = [term for name, term in guided.items() if name in self.leaves]
        """Log densities at the leaves, whose parameters are held fixed: their score has mean zero."""
