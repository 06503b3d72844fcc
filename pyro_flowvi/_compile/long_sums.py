"""Long chains of additions, as gradients of what all steps of a loop share, as sums of stacks."""

from typing import Any

import torch
from torch import Tensor, fx

from .trace import leave_out_unused

__all__ = ["sum_at_once"]

aten = torch.ops.aten
LEAST_SUMMED = 8
"""Terms of a chain of additions from which it becomes a sum of a stack."""
_LEAST_ROWS = 4


def _shape(node: Any) -> Any:
    value = node.meta.get("value") if isinstance(node, fx.Node) else None
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None


def sum_at_once(nodes: fx.Graph, unsteady: set[fx.Node]) -> None:
    """Replaces long chains of additions, as gradients of what all steps share, by sums of stacks."""

    def is_link(node: Any) -> bool:
        plain = isinstance(node, fx.Node) and node.target is aten.add.Tensor and not node.kwargs
        # A sum of small integers has another dtype.
        if not plain or node in unsteady or not node.meta["value"].is_floating_point():
            return False
        return all(_shape(part) == _shape(node) for part in node.args)

    for root in reversed(list(nodes.nodes)):
        if not is_link(root) or (len(root.users) == 1 and is_link(next(iter(root.users)))):
            continue
        leaves, pending = list[Any](), list(root.args)
        while pending:
            part: Any = pending.pop()
            if is_link(part) and len(part.users) == 1:
                pending.extend(part.args)
            else:
                leaves.append(part)
        if len(leaves) < LEAST_SUMMED or not unsteady.isdisjoint(leaves):
            continue
        with nodes.inserting_before(root):
            rows, rest = _gather(nodes, leaves, unsteady)
            leaves = [*rows, *rest]
            if len(leaves) > 1:
                stacked = nodes.call_function(aten.stack.default, (leaves,))
                stacked.meta["value"] = torch.stack([leaf.meta["value"] for leaf in leaves])
                total = nodes.call_function(aten.sum.dim_IntList, (stacked, [0]))
                total.meta["value"] = root.meta["value"]
            else:
                total = leaves[0]
        root.replace_all_uses_with(total)
    leave_out_unused(nodes)


def _gather(
    nodes: fx.Graph, leaves: list[fx.Node], unsteady: set[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Gradients of neighbouring parts of a tensor, each padded with zeros, as one; and the others."""
    padded: dict[Any, dict[int, fx.Node]] = {}
    rest, rows = list[fx.Node](), list[fx.Node]()
    for leaf in leaves:
        index: Any = leaf.args[3] if leaf.target is aten.select_backward.default else None
        into = padded.setdefault((tuple(leaf.args[1]), leaf.args[2]), {}) if index is not None else {}  # type: ignore[arg-type]
        if index is None or index < 0 or index in into or leaf.args[0] in unsteady:
            rest.append(leaf)
        else:
            into[index] = leaf
    for (sizes, dim), into in padded.items():
        index = sorted(into)
        dim %= len(sizes)
        if len(index) < _LEAST_ROWS or index != list(range(index[0], index[-1] + 1)):
            rest.extend(into.values())
            continue
        parts = [into[i].args[0] for i in index]
        row = nodes.call_function(aten.stack.default, (parts, dim))
        value = torch.stack([part.meta["value"] for part in parts], dim)  # type: ignore[union-attr]
        row.meta["value"] = value
        before, after = index[0], sizes[dim] - index[-1] - 1
        if before or after:
            pad = [0, 0] * (len(sizes) - 1 - dim) + [before, after]
            row = nodes.call_function(aten.constant_pad_nd.default, (row, pad))
            row.meta["value"] = torch.nn.functional.pad(value, pad)
        rows.append(row)
    return rows, rest
