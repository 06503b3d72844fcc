"""Many runs of a program as one."""

from torch import Tensor

__all__ = ["sum_apart"]


def sum_apart(log_prob: Tensor, size: int, nesting: int) -> Tensor:
    """A site's log density summed for each of ``size`` particles; one that all share counts for each.

    :param log_prob: with the particles at dimension ``-1 - nesting``, or without them.
    """
    if log_prob.dim() <= nesting:
        return log_prob.sum().expand(size)
    return log_prob.reshape(log_prob.shape[-1 - nesting], -1).sum(-1).expand(size)
