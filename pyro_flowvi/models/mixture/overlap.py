"""How much the components of a mixture share, and the classes that follow from it."""

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..._checks import check_positive_int

__all__ = ["class_map_by_overlap", "component_overlap"]

NOISE: Final = 0.05
"""Standard deviations by which rows are smeared, so that pieces of one curve meet where they end."""
COPIES: Final = 4
"""Smeared copies of every row."""


@torch.no_grad()
def component_overlap(model: Any, x: Tensor, noise: float = NOISE, seed: int = 0) -> Tensor:
    r"""How much components share the rows that they may have made.

    :math:`S_{jk} = \sum_n p(j | x_n) p(k | x_n)` over smeared rows, scaled to 1 on the diagonal.

    :param model: with ``joint_log_prob``, as a :class:`VMoNF` has it.
    :param x: rows of data, shape ``(N, D)``.
    :param noise: standard deviation of the noise, in standard deviations of a column of ``x``.
    :param seed: of the noise.
    :return: shape ``(K, K)``, from 0 to 1.

    Example::

        >>> from pyro_flowvi.models import VMoNF
        >>> model = VMoNF(2, 2).place(torch.tensor([[-9.0, 0.0], [9.0, 0.0]]), torch.eye(2).expand(2, 2, 2))
        >>> x = torch.cat([torch.randn(50, 2) - 9, torch.randn(50, 2) + 9])
        >>> component_overlap(model, x).round()
        tensor([[1., 0.],
                [0., 1.]])
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    scale = noise * x.std(0)
    total: Any = 0.0
    for _ in range(COPIES):
        smear = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        r = model.joint_log_prob(x + scale * smear).softmax(-1)
        total = total + r.mT @ r
    size = total.diagonal().sqrt().clamp_min(torch.finfo(x.dtype).tiny ** 0.25)
    overlap: Tensor = total / torch.outer(size, size)
    return overlap


def class_map_by_overlap(
    model: Any, x: Tensor, num_classes: int, noise: float = 2 * NOISE, seed: int = 0
) -> list[int]:
    """The class of each component, for a mixture with more components than classes.

    Components that overlap, directly or through others, are of one class: pieces of a ring make the ring.
    By average linkage, which one chance contact between two rings does not mislead as it does single linkage.

    :param model: as ``x`` and ``seed``, that of :func:`component_overlap`.
    :param num_classes: the number C of classes.
    :param noise: as there; pieces of one curve must meet in it, but not the curves.
    :return: K integers from 0 to C - 1, in the order in which classes appear: what ``VMoNF(classes=...)``
        takes.
    :raises ValueError: if there are fewer components than classes.

    Example::

        >>> from pyro_flowvi.models import VMoNF
        >>> locs = torch.tensor([[-9.0, 0.0], [9.0, 0.0], [-8.0, 0.0]])
        >>> model = VMoNF(3, 2).place(locs, torch.eye(2).expand(3, 2, 2))
        >>> x = torch.cat([torch.randn(50, 2) + loc for loc in locs])
        >>> class_map_by_overlap(model, x, 2)
        [0, 1, 0]
    """
    distance = 1.0 - component_overlap(model, x, noise, seed).double().cpu().numpy()
    num = len(distance)
    if not check_positive_int("num_classes", num_classes) <= num:
        raise ValueError(f"num_classes: expected at most the {num} components, got {num_classes}")
    if num == 1:
        return [0]
    from scipy.cluster.hierarchy import fcluster, linkage

    tree = linkage(distance[np.triu_indices(num, 1)].clip(0.0), "average")
    _, first, part = np.unique(
        fcluster(tree, num_classes, "maxclust"), return_index=True, return_inverse=True
    )
    order: NDArray[np.int64] = first.argsort().argsort()
    return [int(each) for each in order[part]]
