"""What a program is made of, read once from a trace: sites, plates, enumeration, parameters."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch import Size
from torch.distributions import TransformedDistribution

from .._types import Site, Trace
from .sites import innermost, is_enumerated, latent_sites

__all__ = ["LatentStructure", "ProgramStructure", "find_structure", "is_subsampled", "sample_sites"]

MAX_ROOT_NUMBERS = 60
"""Numbers of roots that a guide draws jointly."""
MOST_LISTED = 6
"""Sites up to which a line of text names all of them."""


def sample_sites(trace: Trace, drawn: bool = False) -> dict[str, Site]:
    """The sample sites of a trace by name, subsamples included; ``drawn``: those that are not observed."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not (drawn and site["is_observed"])
    }


def is_subsampled(frame: CondIndepStackFrame) -> bool:
    """Whether a plate shows a random part of itself at each run."""
    return frame.full_size not in (None, frame.size)


@dataclass(frozen=True)
class ProgramStructure:
    """A model, or a model run at the draws of its guide: what about them is the same at every run."""

    latents: Mapping[str, Size]
    """Shape of each site that is inferred: with a guide those that it has, auxiliary ones left out."""
    plates: tuple[CondIndepStackFrame, ...]
    """The plates that sites stand in, sequential ones included."""
    discrete: frozenset[str]
    """The model's latents with a discrete support."""
    auxiliary: frozenset[str]
    """Sites of the guide that the model does not have."""
    enumerated_by_model: frozenset[str]
    """Sites that the model enumerates; what the guide enumerates the model does too."""
    enumerated_by_guide: frozenset[str]
    """Sites that the guide enumerates."""
    marginal: frozenset[str]
    """Of those the ones that may be drawn as well, since with what depends on it each has a density."""
    sequential: frozenset[str]
    """Sites that are enumerated in a loop, not along a dimension."""
    params: Mapping[str, tuple[int, ...]]
    """Parameters of both programs: name -> shape."""
    model_params: frozenset[str]
    """Parameters that the guide does not have."""
    largest: int
    """Elements of the largest value of a site."""
    indexed: bool
    """Whether densities are those of an extended space of latents and indices."""
    path_gradients: bool
    """Whether the densities of the guide's draws can be differentiated at the draws."""

    @classmethod
    def of(cls, model_trace: Trace, guide_trace: Trace | None = None) -> "ProgramStructure":
        """Reads one run.

        :param model_trace: of the model; with a guide, replayed at its draws.
        :param guide_trace: of the guide.
        """
        traces = [trace for trace in (guide_trace, model_trace) if trace is not None]
        model = sample_sites(model_trace)
        guide = {} if guide_trace is None else sample_sites(guide_trace)
        sites = [*guide.values(), *model.values()]
        nodes = [node for trace in traces for node in trace.nodes.values()]
        frames = [frame for node in nodes for frame in node.get("cond_indep_stack", ())]
        params = dict(_params(*traces))
        drawn = [site for site in guide.values() if not site["is_observed"]]
        return cls(
            latents={
                name: site["value"].shape
                for name, site in (latent_sites(model_trace) if guide_trace is None else guide.items())
                if not site_is_subsample(site) and not site["infer"].get("is_auxiliary")
            },
            plates=tuple(dict.fromkeys(frames)),
            discrete=_names(model, _is_discrete_latent),
            auxiliary=_names(guide, lambda site: site["infer"].get("is_auxiliary")),
            enumerated_by_model=_names(model, is_enumerated),
            enumerated_by_guide=_names(guide, is_enumerated),
            marginal=_names(guide, lambda site: site["infer"].get("marginal")),
            sequential=_names(guide, _is_sequential) | _names(model, _is_sequential),
            params=params,
            model_params=frozenset(
                name for name in params if guide_trace is None or name not in guide_trace.nodes
            ),
            largest=max((torch.as_tensor(site["value"]).numel() for site in sites), default=1),
            indexed=any(getattr(innermost(site["fn"]), "indexed", False) for site in sites),
            path_gradients=all(map(_has_path_gradient, drawn)),
        )

    @property
    def max_plate_nesting(self) -> int:
        """How many dimensions, from the right, plates take."""
        return max((-frame.dim for frame in self.plates if frame.dim is not None), default=0)

    @property
    def subsampled(self) -> bool:
        """Whether the model sees a random part of its data at each run."""
        return any(map(is_subsampled, self.plates))

    @property
    def enumerated(self) -> bool:
        """Whether a discrete site is summed out, so that ``TraceEnum_ELBO`` is the objective."""
        return bool(self.enumerated_by_model or self.enumerated_by_guide)

    @property
    def summed_by_guide(self) -> frozenset[str]:
        """Sites of the guide that are summed out and cannot be drawn instead."""
        return self.enumerated_by_guide - self.marginal

    @property
    def sums_out(self) -> bool:
        """Whether a site is summed out that draws of the latents do not tell."""
        return bool(self.enumerated_by_model or self.summed_by_guide)

    @property
    def draws_nothing(self) -> bool:
        """Whether all latents are summed out: then runs differ only where a density is itself an estimate."""
        drawn = self.latents.keys() - self.enumerated_by_guide
        return not drawn and self.discrete <= self.latents.keys() | self.enumerated_by_model


def _params(*traces: Trace) -> Iterator[tuple[str, tuple[int, ...]]]:
    for trace in traces:
        for name, node in trace.nodes.items():
            if node["type"] == "param":
                yield name, tuple(node["value"].shape)


def _names(sites: Mapping[str, Site], holds: Callable[[Site], Any]) -> frozenset[str]:
    return frozenset(name for name, site in sites.items() if holds(site))


def _is_sequential(site: Site) -> bool:
    return bool(site["infer"].get("enumerate") == "sequential")


def _is_discrete_latent(site: Site) -> bool:
    if site["is_observed"] or site_is_subsample(site):
        return False
    return bool(site["fn"].support.is_discrete)


def _has_path_gradient(site: Site) -> bool:
    """Pyro's flows are left out: some of their transforms have no inverse, of others it is slow or fails."""
    fn: Any = site["fn"]
    while hasattr(fn, "base_dist") and not isinstance(fn, TransformedDistribution):
        fn = fn.base_dist
    tractable = not (isinstance(fn, TransformedDistribution) or getattr(fn, "lower_bound", False))
    return site_is_subsample(site) or (fn.has_rsample and tractable)


@dataclass(frozen=True)
class LatentStructure:
    """How a guide takes the latents of a program: jointly, or each by its own prior and a message.

    Example::

        >>> shapes = {"mu": Size(), "theta": Size((8,)), "offset": Size((100,))}
        >>> print(find_structure(shapes, {"mu": frozenset(), "theta": frozenset({"mu"})}))
        roots: mu
        theta: prior given mu
        offset: free
    """

    roots: tuple[str, ...]
    """Sites that are drawn first, jointly, by a flow."""
    messages: Mapping[str, frozenset[str]]
    """Sites that are drawn by their prior and a message -> the latents that the prior depends on."""
    free: tuple[str, ...]
    """Sites that are drawn by a Gaussian of their own, as nothing simpler is known of their priors."""

    @property
    def hierarchical(self) -> bool:
        """Whether the prior of a latent depends on another latent."""
        return any(self.messages.values())

    def __str__(self) -> str:
        lines = [f"roots: {_listed(self.roots)}"]
        by_parents: dict[frozenset[str], list[str]] = {}
        for site, parents in self.messages.items():
            by_parents.setdefault(parents, []).append(site)
        for parents, sites in by_parents.items():
            given = f"given {_listed(sorted(parents))}" if parents else "of its own"
            lines.append(f"{_listed(sites)}: prior {given}")
        if self.free:
            lines.append(f"{_listed(self.free)}: free")
        return "\n".join(lines)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    if len(names) > MOST_LISTED:
        names = [*names[:3], "...", names[-1]]
    return ", ".join(names) or "none"


def find_structure(
    shapes: Mapping[str, Size], parents: Mapping[str, frozenset[str]], padded: Iterable[str] = ()
) -> LatentStructure:
    """Which latents are roots, and which have messages.

    Roots are small sites whose prior depends on no latent, or is not known, as long as they have 60 numbers
    at most together.

    :param shapes: unconstrained shapes by site, in the program's order.
    :param parents: of sites whose prior is known the latents that it depends on.
    :param padded: sites with numbers that no density touches, which are no roots.
    """
    padded = set(padded)
    roots: list[str] = []
    messages: dict[str, frozenset[str]] = {}
    free: list[str] = []
    left = MAX_ROOT_NUMBERS
    for site, shape in shapes.items():
        if not parents.get(site) and shape.numel() <= left and site not in padded:
            roots.append(site)
            left -= shape.numel()
        elif site in parents:
            messages[site] = parents[site]
        else:
            free.append(site)
    return LatentStructure(tuple(roots), messages, tuple(free))
