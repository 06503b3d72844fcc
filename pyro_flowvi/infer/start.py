"""Where a fit starts: a Gaussian found by search, in whose frame the guide's flow begins."""

import torch

from ..autoguide import AutoFlow
from ..autoguide.frame import enter_frame, leave_frame
from ..init import Effort, UnconstrainedModel, find_gaussian
from .density import traced
from .state import Run, is_worse

__all__ = ["locate"]


def locate(run: Run, guide: AutoFlow, density: UnconstrainedModel, effort: Effort) -> str | None:
    """Moves the guide to the best Gaussian that is found, if that raises its ELBO, and into its frame.

    :param effort: how much to spend on the search.
    :return: the kind of candidate that the Gaussian came from; None if the guide stayed where it was.
    """
    affine = guide.affine
    if affine is None or not (affine.loc.requires_grad and affine.log_scale.requires_grad):
        return None
    gaussian = find_gaussian(traced(density, effort.starts), density.start, effort, cover=guide.covers_modes)
    before = run.evaluate()
    kept = {name: param.detach().clone() for name, param in affine.named_parameters()}
    loc, scale = gaussian.loc[0], gaussian.scale[0]
    if not enter_frame(guide, loc, scale):
        with torch.no_grad():
            affine.loc.copy_(loc)
            affine.log_scale.copy_((scale if scale.dim() == 1 else scale.norm(dim=-1)).log())
    # A normal that covers several modes is a good start in spite of its ELBO.
    if gaussian.kinds[0] == "modes" or is_worse(before, run.evaluate()):
        return gaussian.kinds[0]
    leave_frame(guide)
    with torch.no_grad():
        for name, param in affine.named_parameters():
            param.copy_(kept[name])
    enter_frame(guide)
    return None
