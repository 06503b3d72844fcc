"""Where a fit starts: a Gaussian found by search, or one at each mode, in whose frame the flow begins."""

import torch
from torch import Tensor

from .._compile.log_density import traced
from .._program.log_density import UnconstrainedModel
from ..autoguide import AutoFlow, AutoFlowMixture
from ..autoguide._affine import enter_frame, leave_frame, set_affine
from ..init import PRIOR_DRAWS, Effort, find_gaussian, find_modes
from ._run_state import Run, is_worse

__all__ = ["locate"]


def _found(guide: AutoFlow, density: UnconstrainedModel, effort: Effort) -> tuple[str, Tensor, Tensor]:
    """The kind of the start, locations and scales; a mixture has its weights already."""
    value_and_grad = traced(
        density, 2 * effort.starts if isinstance(guide, AutoFlowMixture) else effort.starts
    )
    if isinstance(guide, AutoFlowMixture):
        prior = density.prior_draws(PRIOR_DRAWS)
        modes = find_modes(value_and_grad, density.start, guide.num_components, effort, prior)
        guide.place(modes.gaussian.loc, modes.gaussian.scale, modes.weights)
        return modes.gaussian.kinds[0], modes.gaussian.loc, modes.gaussian.scale
    gaussian = find_gaussian(value_and_grad, density.start, effort, cover=guide.covers_modes)
    return gaussian.kinds[0], gaussian.loc[0], gaussian.scale[0]


def locate(run: Run, guide: AutoFlow, density: UnconstrainedModel, effort: Effort) -> str | None:
    """Moves the guide to the best Gaussian that is found, if that raises its ELBO, and into its frame.

    A mixture moves to one at each mode.

    :param effort: how much to spend on the search.
    :return: the kind of candidate that the Gaussian came from; None if the guide stayed where it was.
    """
    affine = guide.affine
    if affine is None or not (affine.loc.requires_grad and affine.log_scale.requires_grad):
        return None
    before = run.evaluate()
    kept = {name: param.detach().clone() for name, param in guide._flow.named_parameters()}
    kind, loc, scale = _found(guide, density, effort)
    if not enter_frame(affine, loc, scale):
        set_affine(affine, loc, scale)
    # A start that covers several modes is a good one in spite of its ELBO.
    if kind == "modes" or is_worse(before, run.evaluate()):
        return kind
    leave_frame(affine)
    with torch.no_grad():
        for name, param in guide._flow.named_parameters():
            param.copy_(kept[name])
    enter_frame(affine)
    return None
