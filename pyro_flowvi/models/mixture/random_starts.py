"""Many random starts of a mixture of flows at once, without any clustering; components that are rings."""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..._checks import check_positive, check_positive_int
from ..._compile.optimizers import FlatParameters, Rule, flatten
from ...distributions import FlowDistribution
from ...flows import FLOWS
from ...infer._schedule import CosineSchedule
from ...nn import MLP
from ...transforms import Compose, RadialPower, Stacked
from ._parts import check_rows
from ._training import noise_share
from .vmonf import VMoNF

__all__ = ["multistart", "ring_flow"]

HELD_OUT: Final = 0.2
NOISE: Final = 0.3
"""Of the rows at first, in standard deviations of a column: thin densities are approached from outside."""
FINAL_RATE: Final = 0.01
"""The learning rate ends at this fraction of its start."""
SCALES: Final = (0.3, 1.5)
"""Between these the scales of components start, in standard deviations of a column."""
SPREAD: Final = 0.15
"""Standard deviation of locations that start around the middle of the data, likewise."""
MIN_ROWS: Final = 20


def ring_flow(dim: int, num_layers: int = 2, hidden: Sequence[int] = (16,)) -> Any:
    """A flow for components that are rings or shells: a power of the radius, then affine couplings.

    Over :class:`~pyro_flowvi.distributions.PolarNormal` it starts as a shell around the origin.  The power
    makes it thinner, which couplings alone learn badly.

    :param dim: the length D of the vectors.
    :param num_layers: the number of couplings.
    :param hidden: widths of their networks.
    :return: a transform, near the identity.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> from pyro_flowvi.distributions import PolarNormal
        >>> model = VMoNF(2, 2, flow=ring_flow, base=PolarNormal(2))
        >>> model.sample(5).shape
        torch.Size([5, 2])
    """
    couplings: Any = FLOWS["realnvp"](dim, num_layers=num_layers, hidden=hidden)
    return Compose([RadialPower(dim), couplings])


def multistart(
    model: VMoNF,
    x: Tensor,
    *,
    num_starts: int = 32,
    num_steps: int = 250,
    lr: float = 2e-2,
    batch_size: int = 256,
    seed: int = 0,
) -> list[float]:
    """Starts a mixture where the best of many random starts has come, by the likelihood of held-out rows.

    All starts are trained in one batched call, their flows without the layers that have networks, which are
    the identity before training: a mixture of normals over a normal base, of noisy spheres over
    :class:`~pyro_flowvi.distributions.PolarNormal`.  Half of them begin around the middle of the data, with
    scales that differ, and half at random rows.  No other clustering is used.

    :param model: not trained yet; its components' parameters, and learned weights, are set.
    :param x: rows of data, shape ``(N, D)``.
    :param num_starts: the number R of starts.
    :param num_steps: steps that each is trained.
    :param lr: Adam's rate at the start; it falls along a cosine.
    :param batch_size: rows of a step.
    :param seed: of all random numbers.
    :return: the held-out negative log likelihoods of the starts, nats a row, the best first.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> x = torch.cat([torch.randn(100, 2) - 6, torch.randn(100, 2) + 6])
        >>> model = VMoNF(2, 2, num_layers=2, hidden=(8,))
        >>> nlls = multistart(model, x, num_starts=8, num_steps=50)
        >>> sorted(model.responsibilities(x).argmax(-1).reshape(2, 100).float().mean(-1).tolist())
        [0.0, 1.0]
    """
    check_rows(x, None, model.dim, model.num_classes)
    if len(x) < MIN_ROWS:
        raise ValueError(f"x: expected at least {MIN_ROWS} rows, got {len(x)}")
    check_positive_int("num_steps", num_steps)
    check_positive("lr", lr)
    starts, num = check_positive_int("num_starts", num_starts), model.num_components
    generator = torch.Generator(x.device).manual_seed(seed)
    order = torch.randperm(len(x), generator=generator, device=x.device)
    count = max(2, round(HELD_OUT * len(x)))
    judge, rows = x[order[:count]], x[order[count:]]
    flows = _simple_flows(model, starts)
    _scatter(flows, rows, starts, generator)
    law = FlowDistribution(model.base, Compose([flows, *list(model.flow)[1:]]), validate_args=False)
    logits = nn.Parameter(x.new_zeros(starts, num))

    def joint(x: Tensor) -> Tensor:
        log_prob: Tensor = law.log_prob(x.unsqueeze(-2)).unflatten(-1, (starts, num))
        return log_prob + logits.log_softmax(-1)

    params: list[Tensor] = [*flows.parameters(), logits]
    adam = FlatParameters(params, rule=Rule())
    schedule = CosineSchedule(num_steps, final_share=FINAL_RATE)
    size, scale = min(check_positive_int("batch_size", batch_size), len(rows)), rows.std(0)
    for step in range(num_steps):
        chosen = rows[torch.randint(len(rows), (size,), generator=generator, device=x.device)]
        noise = torch.randn(chosen.shape, generator=generator, dtype=x.dtype, device=x.device)
        width = NOISE * noise_share(step / num_steps)
        loss = -joint(chosen + width * scale * noise).logsumexp(-1).mean(0)
        gradients = torch.autograd.grad(loss.nan_to_num(0.0, 0.0, 0.0).sum(), params)
        adam.step_in_place(flatten(gradients).nan_to_num_(0.0, 0.0, 0.0), schedule.rate(step, lr))
    with torch.no_grad():
        nll = -joint(judge).logsumexp(-1).mean(0).nan_to_num(math.inf, math.inf, math.inf)
        best = int(nll.argmin())
        _copy(flows, model, range(best * num, (best + 1) * num))
        if model.weights_kind == "learned":
            model.weights.logits.copy_(logits[best].log_softmax(-1))
    return sorted(nll.tolist())


def _layers(flow: Any) -> list[Any]:
    """All layers of a composition, also of compositions in it."""
    if not isinstance(flow, Compose):
        return [flow]
    return [layer for part in flow for layer in _layers(part)]


def _is_simple(layer: nn.Module) -> bool:
    return not any(isinstance(module, MLP) for module in layer.modules())


def _simple_flows(model: VMoNF, starts: int) -> Stacked:
    if model.index_dim:
        raise ValueError("model: expected components that are flows, got continuously-indexed ones")
    parts = [model.components.part(k) for k in range(model.num_components)]
    simple = [Compose([layer for layer in _layers(part) if _is_simple(layer)]) for part in parts]
    return Stacked(simple * starts, dim=model.components.dim)


@torch.no_grad()
def _scatter(flows: Stacked, x: Tensor, starts: int, generator: torch.Generator) -> None:
    """Sets locations and scales: every second start around the middle, the others at rows."""
    affine = flows.each[-1]
    shape = affine.loc.shape
    options: dict[str, Any] = {"generator": generator, "dtype": x.dtype, "device": x.device}
    middle = x.mean(0) + SPREAD * x.std(0) * torch.randn(shape, **options)
    place = x[torch.randint(len(x), shape[:1], generator=generator, device=x.device)]
    which = torch.arange(len(place), device=x.device) // (len(place) // starts) % 2 == 0
    affine.loc.copy_(torch.where(which.unsqueeze(-1), middle, place))
    # The components of one start have one scale in each of K equal parts of the range, in random order.
    order = torch.rand((starts, len(place) // starts), **options).argsort(-1)
    quantile = (order + torch.rand(order.shape, **options)) / order.shape[-1]
    low, high = map(math.log, SCALES)
    affine.log_scale.copy_(x.std(0).log() + low + (high - low) * quantile.reshape(-1, 1))


@torch.no_grad()
def _copy(flows: Stacked, model: VMoNF, rows: range) -> None:
    """Sets the layers without networks of the model's components to those of these flows."""
    own = [layer for layer in _layers(model.components.each) if _is_simple(layer)]
    for layer, found in zip(own, _layers(flows.each), strict=True):
        for param, value in zip(layer.parameters(), found.parameters(), strict=True):
            param.copy_(value[list(rows)])
