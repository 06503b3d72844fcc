"""Pyro's own checks of the shapes of model and guide, as its objectives make them at every step."""

import math
import warnings

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape

from .._types import Trace
from .feasible import is_refusal
from .sites import is_enumerated

__all__ = ["check_shapes"]


def check_shapes(model_trace: Trace, guide_trace: Trace, max_plate_nesting: float = math.inf) -> None:
    """Refuses what ``Trace_ELBO`` refuses, such as a forgotten plate or ``to_event``, in Pyro's words.

    Nothing is checked where the user turned Pyro's validation off.

    :param model_trace: of the model, replayed at the guide's draws.
    :param guide_trace: of the guide.
    :param max_plate_nesting: of the objective.
    :raises ValueError: naming the site.
    """
    if not is_validation_enabled():
        return
    drawn = model_trace.copy()
    for name, site in model_trace.nodes.items():
        if site["type"] == "sample" and is_enumerated(site) and name not in guide_trace.nodes:
            drawn.remove_node(name)  # a guide need not have what is summed out
    check_model_guide_match(drawn, guide_trace, max_plate_nesting)
    for trace in (prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered")  # of a draw without a density
            scored = _score(trace)
        for name in scored:
            check_site_shape(trace.nodes[name], max_plate_nesting)  # type: ignore[arg-type]


def _score(trace: Trace) -> list[str]:
    """The sample sites that have a density where the guide happens to draw, which is computed."""
    names = [name for name, site in trace.nodes.items() if site["type"] == "sample"]
    try:
        trace.compute_log_prob()
        return names
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        if not _is_refusal(error):
            raise
    return [name for name in names if _has_density(trace, name)]


def _has_density(trace: Trace, name: str) -> bool:
    try:
        trace.compute_log_prob(lambda other, _: bool(other == name))
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        if not _is_refusal(error):
            raise
        return False
    return True


def _is_refusal(error: Exception) -> bool:
    return not isinstance(error, ValueError) or is_refusal(error)
