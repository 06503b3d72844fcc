"""Operations on small tensors written out as arithmetic, which Inductor fuses with what is around them."""

import operator
from collections.abc import Callable
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor

from .trace import aten

__all__ = ["WRITTEN_OUT"]

SMALL_PRODUCT = 2**14
"""Matrix products of fewer multiplications are written as sums."""
SMALL_SYSTEM = 24
"""The largest triangular matrix whose inverse is applied by substitution, written out."""
FEW_ROWS = 10
"""Up to that size there is a statement for each entry, above it one for each column: a third of the code."""
SHORT = 16
"""The longest dimension along which cumulative sums and products are written out."""


def _product(left: Tensor, right: Tensor) -> Any:
    """mm and bmm as a sum of products."""
    if left.numel() * right.shape[-1] > SMALL_PRODUCT:
        return NotImplemented
    return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)


def _product_vector(left: Tensor, right: Tensor) -> Any:
    return (left * right).sum(-1)


def _add_product(bias: Tensor, left: Tensor, right: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """A product, to which the bias is added with what follows: addmm first copies it into the result."""
    product = torch.matmul(left, right)
    return (bias if beta == 1 else beta * bias) + (product if alpha == 1 else alpha * product)


def _solve_triangular(
    matrix: Tensor, right: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    """Forward or backward substitution."""
    size = matrix.shape[-1]
    if not 0 < size <= SMALL_SYSTEM:
        return NotImplemented
    if not left:
        matrix, right, upper = matrix.mT, right.mT, not upper
    order = list(reversed(range(size)) if upper else range(size))
    found: dict[int, Tensor] = {}
    if size <= FEW_ROWS:
        rows = [row.unbind(-1) for row in matrix.unsqueeze(-2).unbind(-3)]
        for i in order:
            rest = right.select(-2, i)
            for j, value in found.items():
                rest = rest - rows[i][j] * value
            found[i] = rest if unitriangular else rest / rows[i][i]
    else:
        rest, others = right, matrix.triu(1) if upper else matrix.tril(-1)
        for i in order:
            value = rest.select(-2, i)
            found[i] = value if unitriangular else value / matrix[..., i, i].unsqueeze(-1)
            rest = rest - others[..., i].unsqueeze(-1) * found[i].unsqueeze(-2)
    solution = torch.stack([found[i] for i in range(size)], -2)
    return solution if left else solution.mT


def _cumulative(step: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def rule(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
        if x.dim() == 0 or not 0 < x.shape[dim] <= SHORT:
            return NotImplemented
        whole = torch.int64 if not (x.is_floating_point() or x.is_complex()) else x.dtype
        return torch.stack(list(accumulate(x.to(dtype or whole).unbind(dim), step)), dim)

    return rule


WRITTEN_OUT: Final[dict[Any, Callable[..., Any]]] = {
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.mv.default: _product_vector,
    aten.dot.default: _product_vector,
    aten.addmm.default: _add_product,
    aten.baddbmm.default: _add_product,
    aten.linalg_solve_triangular.default: _solve_triangular,
    aten.cumsum.default: _cumulative(operator.add),
    aten.cumprod.default: _cumulative(operator.mul),
}
"""Decompositions; they return ``NotImplemented`` for what is not small."""
