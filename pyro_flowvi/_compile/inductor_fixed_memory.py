"""Inductor's Python wrapper with its temporaries allocated once."""

import ast
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["with_fixed_memory"]

STATIC_BYTES = 2**20
"""Temporaries up to this size are allocated once and kept; larger ones are freed as Inductor has it."""
_ALLOCATORS = {"empty_strided_cpu", "reinterpret_tensor"}
_CHECKS = {"assert_size_stride", "assert_alignment"}


def _normal_memory(value: Any, space: dict[str, Any]) -> Tensor | None:
    """Memory for the result of a call that draws standard normals; None for any other expression."""
    if not isinstance(value, ast.Call):
        return None
    match ast.unparse(value.func), value.args, value.keywords:
        case "torch.ops.aten.normal_functional.default", [ast.Name(id=name)], []:
            return torch.empty_like(space[name]) if space[name].is_contiguous() else None
        case "torch.ops.aten.randn.default", _, _:
            empty: Tensor = eval(f"torch.empty({ast.unparse(value).partition('(')[2]}", space)
            return empty
    return None


def with_fixed_memory(
    source: str, space: dict[str, Any], inputs: Sequence[Tensor], num_static: int
) -> Callable[..., Any] | None:
    """The function ``call`` of a wrapper on fixed memory, as a CUDA graph has it.

    Most of a small step's time is the allocation of temporaries in that wrapper: 80 of 90 microseconds for
    eight planar layers.

    :param source: the wrapper's source.
    :param space: its globals.
    :param inputs: example inputs.
    :param num_static: how many of them, from the first, are these very tensors at every call.
    :return: a function of the remaining inputs; None if the source has a form that is not known here.
    """
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    if len(calls) != 1:
        return None
    space = dict(space)
    kept: dict[str, Any] = {}
    parameters: list[str] = []
    varying: set[str] = set()
    lines: list[ast.stmt] = []
    for line in calls[0].body:
        value = getattr(line, "value", None)
        called = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else None
        used = {node.id for node in ast.walk(line) if isinstance(node, ast.Name)}
        match line:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Name(id="args")):
                parameters = [name.id for name in names if isinstance(name, ast.Name)]
                kept.update(zip(parameters[:num_static], inputs[:num_static], strict=True))
                varying.update(parameters[num_static:])
            case ast.Expr() if called in _CHECKS or "args" in used:
                pass
            case ast.Assign(targets=[ast.Name(id=name)]):
                constant = varying.isdisjoint(used) and (
                    called in _ALLOCATORS or (isinstance(value, ast.Name) and value.id in kept)
                )
                tensor = eval(ast.unparse(line.value), space | kept) if constant else None
                drawn = _normal_memory(value, space | kept) if varying.isdisjoint(used) else None
                if drawn is not None and drawn.nbytes <= STATIC_BYTES:
                    kept[name] = drawn
                    lines.append(ast.parse(f"{name}.normal_()").body[0])
                    continue
                if tensor is not None and (called != "empty_strided_cpu" or tensor.nbytes <= STATIC_BYTES):
                    kept[name] = tensor
                else:
                    varying.add(name)
                    lines.append(line)
            case ast.Delete(targets=targets):
                names = [
                    target for target in targets if isinstance(target, ast.Name) and target.id in varying
                ]
                if names:
                    lines.append(ast.Delete(targets=list(names)))
            case ast.Expr() | ast.Return():
                lines.append(line)
            case _:
                return None
    body = "\n".join("        " + ast.unparse(ast.fix_missing_locations(line)) for line in lines)
    held = sorted(
        {node.id for line in lines for node in ast.walk(line) if isinstance(node, ast.Name)} & set(kept)
    )
    arguments = ", ".join(parameters[num_static:])
    exec(f"def bind({', '.join(held)}):\n    def step({arguments}):\n{body}\n    return step", space)
    step: Callable[..., Any] = space["bind"](*(kept[name] for name in held))
    return step
