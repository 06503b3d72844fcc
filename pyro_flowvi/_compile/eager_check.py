"""A new compiled step held against eager Pyro, before it is used and now and then after."""

import math
import traceback
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from .errors import CannotCompile, brief, user_line
from .optimizers import flatten
from .preflight import TOLERANCES, EagerStep, close
from .step import CompiledStep

__all__ = ["compare"]

PERTURBATION = 1e-2
"""Relative change of the parameters under which a new compiled step is compared with eager once more."""


@torch.no_grad()
def compare(
    eager: EagerStep,
    step: CompiledStep,
    args: Any,
    kwargs: Any,
    tensors: Sequence[Tensor],
    seed: int,
    perturbed: bool = False,
) -> None:
    """Takes a step with some seed both ways, and undoes it.

    :raises CannotCompile: if losses, gradients or updates differ, or one of the two raises.
    """
    before = [[value.clone() for value in bucket.state] for bucket in step.buckets]
    limits = None if step.limits is None else step.limits.clone()
    if step.limits is not None:
        step.limits.fill_(math.inf)
    average, step.average = step.average, None
    try:
        with eager.undisturbed(*tensors, *step.traced.constants):
            if perturbed:
                torch.manual_seed(seed)
                for value in (value for bucket in step.buckets for value in bucket.values):
                    value.add_(PERTURBATION * (1 + value.abs()) * torch.randn_like(value))
            start = [[value.clone() for value in bucket.values] for bucket in step.buckets]
            torch.manual_seed(seed)
            try:
                stats, *plain = [value.clone() for value in step.run(*tensors)]
            except Exception as error:
                raise CannotCompile(
                    f"the compiled step failed in a comparison with {brief(error)}"
                ) from error
            loss = stats[0]
            grads = _gradients(step, before, plain)
            if bool(loss.isfinite()):
                _check_updates(step, start, before)
            for bucket, values in zip(step.buckets, start, strict=True):
                for value, old in zip(bucket.values, values, strict=True):
                    value.copy_(old)
        try:
            with torch.enable_grad(), pyro.validation_enabled(False):
                expected_loss, expected, _ = eager.run(args, kwargs, seed)
        except Exception as error:
            if perturbed:
                return  # nothing is known of parameters at which eager Pyro fails
            line = user_line(traceback.extract_tb(error.__traceback__))
            raise CannotCompile(f"the eager step failed in a comparison with {brief(error)}", line) from error
    finally:
        step.average = average
        if step.limits is not None and limits is not None:
            step.limits.copy_(limits)
        for bucket, state in zip(step.buckets, before, strict=True):
            for value, old in zip(bucket.state, state, strict=True):
                value.copy_(old)
    _check(step, loss.item(), grads, start, expected_loss, expected)


def _check(
    step: CompiledStep,
    loss: float,
    grads: dict[Tensor, Tensor],
    start: list[list[Tensor]],
    expected_loss: float,
    expected: dict[Tensor, Tensor],
) -> None:
    known = math.isfinite(expected_loss) and all(bool(g.isfinite().all()) for g in expected.values())
    if not known and not (math.isfinite(loss) and math.isfinite(expected_loss)):
        return
    dtype = next(iter(grads)).dtype
    if not close(loss, expected_loss, dtype):
        raise CannotCompile(
            f"the compiled loss is {loss:.6g} where the eager one is {expected_loss:.6g}: something that "
            "changes between steps is computed by Python"
        )
    rules = {param: bucket.rule for bucket in step.buckets for param in bucket.params}
    values = {
        param: value
        for bucket, olds in zip(step.buckets, start, strict=True)
        for param, value in zip(bucket.params, olds, strict=True)
    }
    wanted = {}
    for param in grads:
        rule, grad = rules[param], expected.get(param, torch.zeros_like(param))
        wanted[param] = grad if rule is None else rule.gradient(values[param], grad)
    # A path gradient at the posterior is rounding alone: hence the least scale.
    scale = 1e-3 * max(1.0, *(float(grad.double().norm()) for grad in wanted.values()))
    for param, grad in grads.items():
        if not _agree(grad, wanted[param], TOLERANCES.get(param.dtype, 0.05), scale):
            name = pyro.get_param_store().param_name(param)
            raise CannotCompile(f"the compiled gradient of {name} differs from the eager one")


def _gradients(step: CompiledStep, before: list[list[Tensor]], plain: list[Tensor]) -> dict[Tensor, Tensor]:
    """The gradients of the step just taken, from the moments or as it gave them."""
    supply = iter(plain)
    grads: dict[Tensor, Tensor] = {}
    for bucket, state in zip(step.buckets, before, strict=True):
        parts = bucket.split(next(supply) if bucket.rule is None else bucket.seen_gradient(state[-4]))
        grads.update(zip(bucket.params, (part.clone() for part in parts), strict=True))
    return grads


def _check_updates(step: CompiledStep, start: list[list[Tensor]], before: list[list[Tensor]]) -> None:
    """Whether the fused optimizers moved the parameters as their rule says."""
    for bucket, values, state in zip(step.buckets, start, before, strict=True):
        if bucket.rule is None:
            continue
        first, second = state[-4:-2]
        flat = flatten(values)
        _, second = bucket.rule.moments(bucket.seen_gradient(first), first, second)
        moved = bucket.rule.move(flat, bucket.first, bucket.second, bucket.steps, bucket.lr, bucket.sizes)
        tolerance = TOLERANCES.get(flat.dtype, 0.05)
        found = flatten(bucket.values) - flat
        good = _agree(moved - flat, found, tolerance, 1e-3 * float(flat.norm()))
        if not (good and _agree(second, bucket.second, tolerance)):
            raise CannotCompile("the compiled optimizer's step differs from the eager one")


def _agree(one: Tensor, other: Tensor, tolerance: float, scale: float = 0.0) -> bool:
    """Whether two tensors agree to a tolerance relative to their norm, plus ``scale``; NaN equals NaN."""
    one, other = one.detach().double(), other.detach().double()
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return False
    one, other = one[finite], other[finite]
    return bool((one - other).norm() <= tolerance * (torch.maximum(one.norm(), other.norm()) + scale))
