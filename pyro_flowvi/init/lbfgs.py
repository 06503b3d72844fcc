"""Many L-BFGS runs at once on a log density."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ascent", "ascend"]

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]
HISTORY = 10
SUFFICIENT = 1e-4
"""A step is taken if the density rises by this fraction of what the slope promises (Armijo's rule)."""
CURVATURE = 1e-10
"""Pairs with less curvature, relative to their lengths, are left out of the history."""
MAX_FAILURES = 25
"""Halvings of a step after which a run has ended."""
KEPT_PATHS = 6


@dataclass(frozen=True)
class Ascent:
    """What :func:`ascend` found.

    :param points: the ends of the runs, best first, shape ``(P, D)``.
    :param values: their log densities, shape ``(P,)``; -inf where a run never met a finite one.
    :param paths: for a few runs, the points that they passed, shapes ``(T, D)``.

    Example::

        >>> Ascent(torch.zeros(1, 2), torch.zeros(1), [torch.zeros(5, 2)]).paths[0].shape
        torch.Size([5, 2])
    """

    points: Tensor
    values: Tensor
    paths: list[Tensor]


def _direction(gradient: Tensor, steps: Tensor, changes: Tensor, valid: Tensor) -> Tensor:
    """The two-loop recursion (Nocedal and Wright 2006, algorithm 7.4) for every run.

    :param gradient: shape ``(P, D)``, of what is minimised.
    :param steps: the last differences of points, the newest last, shape ``(P, H, D)``.
    :param changes: those of gradients.
    :param valid: which of them count, shape ``(P, H)``.
    """
    inner = (steps * changes).sum(-1)
    rho = torch.where(valid, 1.0 / torch.where(valid, inner, 1.0), 0.0)
    q = gradient.clone()
    alphas: list[Tensor] = []
    for i in range(steps.shape[1] - 1, -1, -1):
        alpha = rho[:, i] * (steps[:, i] * q).sum(-1)
        q = q - alpha.unsqueeze(-1) * changes[:, i]
        alphas.append(alpha)
    last_y = (changes[:, -1] ** 2).sum(-1)
    newest = valid[:, -1]
    scale = torch.where(newest, inner[:, -1] / torch.where(newest, last_y, 1.0), 1.0)
    q = q * scale.unsqueeze(-1)
    for i, alpha in zip(range(steps.shape[1]), reversed(alphas), strict=True):
        beta = rho[:, i] * (changes[:, i] * q).sum(-1)
        q = q + (alpha - beta).unsqueeze(-1) * steps[:, i]
    return -q


@torch.no_grad()
def ascend(value_and_grad: ValueAndGrad, starts: Tensor, max_evaluations: int = 400) -> Ascent:
    """Climbs a log density from many points, one batch of evaluations for all runs together.

    Each run has its own step length and history.  A run whose point has no finite density stands still.

    :param value_and_grad: points ``(P, D)`` to log densities ``(P,)`` and gradients ``(P, D)``.
    :param starts: shape ``(P, D)``.
    :param max_evaluations: batches of evaluations at most.

    Example::

        >>> def normal(z):
        ...     return -0.5 * ((z - 3.0) ** 2).sum(-1), 3.0 - z
        >>> ascend(normal, torch.randn(4, 2)).points[0].round()
        tensor([3., 3.])
    """
    num, dim = starts.shape
    eps = torch.finfo(starts.dtype).eps

    def evaluate(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, gradient = value_and_grad(z)
        good = value.isfinite() & gradient.isfinite().all(-1)
        return -value, -gradient, good

    point = starts.clone()
    loss, gradient, good = evaluate(point)
    loss = torch.where(good, loss, torch.inf)
    gradient = torch.where(good.unsqueeze(-1), gradient, 0.0)
    steps, changes = (starts.new_zeros(num, HISTORY, dim) for _ in "12")
    valid = torch.zeros(num, HISTORY, dtype=torch.bool, device=starts.device)
    running, failures = good.clone(), torch.zeros(num, dtype=torch.long, device=starts.device)
    quiet = torch.zeros_like(failures)
    direction = -gradient
    length = 1.0 / gradient.norm(dim=-1).clamp(min=1.0)
    track = [point[:KEPT_PATHS].clone()]
    for _ in range(max_evaluations - 1):
        if not bool(running.any()) or (float(running.double().mean()) < 0.25 and bool(good.any())):
            break
        slope = (gradient * direction).sum(-1)
        candidate = point + torch.where(running, length, 0.0).unsqueeze(-1) * direction
        new_loss, new_gradient, finite = evaluate(candidate)
        rounding = 10.0 * eps * loss.abs().nan_to_num(0.0, 0.0, 0.0)
        enough = new_loss <= loss + SUFFICIENT * length * slope + rounding
        accepted = running & finite & enough
        step = torch.where(accepted.unsqueeze(-1), candidate - point, 0.0)
        change = torch.where(accepted.unsqueeze(-1), new_gradient - gradient, 0.0)
        curved = (step * change).sum(-1) > CURVATURE * step.norm(dim=-1) * change.norm(dim=-1)
        store = accepted & curved
        rolled = store.reshape(-1, 1, 1)
        steps = torch.where(rolled, torch.cat([steps[:, 1:], step.unsqueeze(1)], 1), steps)
        changes = torch.where(rolled, torch.cat([changes[:, 1:], change.unsqueeze(1)], 1), changes)
        valid = torch.where(rolled[..., 0], torch.cat([valid[:, 1:], store.unsqueeze(1)], 1), valid)
        gain = torch.where(accepted, loss - new_loss, torch.inf)
        point = torch.where(accepted.unsqueeze(-1), candidate, point)
        loss = torch.where(accepted, new_loss, loss)
        gradient = torch.where(accepted.unsqueeze(-1), new_gradient, gradient)
        small = gain.abs() <= 100.0 * eps * (1.0 + loss.abs())
        quiet = torch.where(accepted, torch.where(small, quiet + 1, torch.zeros_like(quiet)), quiet)
        failures = torch.where(accepted, torch.zeros_like(failures), failures + running.long())
        running = running & (failures < MAX_FAILURES) & (quiet < 3)
        fresh = _direction(gradient, steps, changes, valid)
        down = (fresh * gradient).sum(-1) < 0
        fresh = torch.where(down.unsqueeze(-1), fresh, -gradient)
        first = ~valid[:, -1] | ~down
        start_length = torch.where(first, 1.0 / gradient.norm(dim=-1).clamp(min=1.0), 1.0)
        direction = torch.where(accepted.unsqueeze(-1), fresh, direction)
        length = torch.where(accepted, start_length, 0.5 * length)
        track.append(point[:KEPT_PATHS].clone())
    order = loss.argsort()
    passed = torch.stack(track, 1)
    paths = []
    for run in passed[good[:KEPT_PATHS]]:
        moved = (run[1:] != run[:-1]).any(-1)
        paths.append(run[torch.cat([moved.new_ones(1), moved])])
    return Ascent(point[order], -loss[order], paths)
