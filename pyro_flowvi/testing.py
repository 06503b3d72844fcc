"""The property checks that every transform of the package passes, for users' own transforms too."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from .transforms.base import forward_and_log_det, inverse_and_log_det

__all__ = ["check_transform"]

ROUNDING_FACTOR = 32.0
"""Round-trip errors may be this many times what one rounding of input and output explains."""
GRADCHECK_ROWS = 2
GRADCHECK_EXHAUSTIVE = 60
"""Up to this many parameters the gradient is compared entry by entry."""


class _Call(nn.Module):
    """A transform's fused call as a module, so that its parameters can be arguments."""

    def __init__(self, transform: Any, context: Tensor | None, inverse: bool) -> None:
        super().__init__()
        self.transform = transform
        self.context = context
        self.inverse = inverse

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        transform = self.transform
        if self.context is not None:
            transform = transform.condition(self.context.to(value))
        run = inverse_and_log_det if self.inverse else forward_and_log_det
        return run(transform, value)


def _cast(transform: Any, dtype: torch.dtype) -> Any:
    if not isinstance(transform, nn.Module):
        return transform
    return copy.deepcopy(transform).to(dtype)


def _jacobian(call: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """d y_i / d x_j at every batch element, shape ``(*, D, D)``; the elements are independent."""
    x = x.detach().requires_grad_()
    y, _ = call(x)
    rows = [torch.autograd.grad(y[..., i].sum(), x, retain_graph=True)[0] for i in range(y.shape[-1])]
    return torch.stack(rows, -2)


def _require(condition: bool | Tensor, message: str) -> None:
    if not bool(condition):
        raise AssertionError(message)


def check_transform(
    transform: Any, x: Tensor, *, context: Tensor | None = None, gradients: bool = True
) -> None:
    """Asserts that a transform of vectors is a correct, smooth, stateless bijection at ``x``.

    In float32 and float64: finite results of the right shape; log-determinant equal to autodiff's; round
    trip in both directions within a small factor of what rounding allows, given the Jacobian; inverse
    log-determinant the negative of the forward one; empty batches and single vectors.  In float64:
    ``gradcheck`` of both directions in the input and every parameter, ``vmap``, ``make_fx``, ``deepcopy``,
    ``pickle`` and ``state_dict`` round trips, no memory of old parameters, and a gradient for every
    parameter within two optimizer steps.

    :param transform: of this package, torch or Pyro; a conditional one together with ``context``.
    :param x: points of shape ``(*, D)``, with a batch shape that broadcasts with the context's.
    :param context: what a conditional transform is conditioned on, shape ``(*B, C)``.
    :param gradients: also checks that every parameter gets a gradient.
    :raises AssertionError: naming the property that fails.

    Example::

        >>> from pyro_flowvi.transforms import Planar
        >>> check_transform(Planar(3), torch.randn(10, 3))
    """
    exact = getattr(transform, "exact_inverse", True)
    for dtype in (torch.float32, torch.float64):
        _check_values(_cast(transform, dtype), x.to(dtype), context, exact)
    double, points = _cast(transform, torch.float64), x.to(torch.float64)
    for inverse in (False, True) if exact else (False,):
        call = _Call(double, context, inverse)
        _check_gradients(call, points)
        _check_tracing(call, points)
    if isinstance(transform, nn.Module):
        _check_state(double, points, context)
        if gradients:
            _check_training(_cast(transform, torch.float64), points, context)


def _check_values(transform: Any, x: Tensor, context: Tensor | None, exact: bool) -> None:
    name, eps = f"{type(transform).__name__}, {x.dtype}", torch.finfo(x.dtype).eps
    forward, backward = (_Call(transform, context, inverse) for inverse in (False, True))
    y, log_det = forward(x)
    _require(y.shape == x.shape and y.dtype == x.dtype, f"{name}: image {y.shape}, {y.dtype}")
    _require(log_det.shape == x.shape[:-1], f"{name}: log_det {log_det.shape} for x {x.shape}")
    _require(y.isfinite().all() and log_det.isfinite().all(), f"{name}: not finite")

    jacobian = _jacobian(forward, x).double()
    expected = jacobian.slogdet()[1]
    spectrum = torch.linalg.svdvals(jacobian)
    stretch, squeeze = spectrum[..., 0], 1.0 / spectrum[..., -1]
    slack = ROUNDING_FACTOR * eps * x.shape[-1] * (1.0 + stretch * squeeze)
    off = (log_det.double() - expected).abs()
    _require((off <= slack + 1e-3 * eps**0.5).all(), f"{name}: log_det off by {off.max():.3g}")

    empty, empty_det = forward(x.new_zeros((0, *x.shape)))
    _require(empty.numel() == empty_det.numel() == 0, f"{name}: an empty batch")
    if context is None:
        single = x.reshape(-1, x.shape[-1])[0]
        row = y.reshape(-1, x.shape[-1])[0]
        gap = (forward(single)[0] - row).abs().max()
        _require(gap <= ROUNDING_FACTOR * eps * (1 + row.abs().max()), f"{name}: a single vector")
    if not exact:
        return

    size = 1.0 + x.norm(dim=-1) + y.norm(dim=-1)
    back, back_det = backward(y)
    error = (back - x).norm(dim=-1)
    allowed = ROUNDING_FACTOR * eps * (1.0 + squeeze) * (1.0 + stretch) * size
    _require((error <= allowed).all(), f"{name}: f⁻¹(f(x)) - x is {(error / allowed).max():.3g} × allowed")
    gap = (back_det + log_det).abs().double()
    _require((gap <= slack + allowed).all(), f"{name}: inverse log_det off by {gap.max():.3g}")
    again = forward(back)[0]
    error = (again - y).norm(dim=-1)
    allowed = ROUNDING_FACTOR * eps * (1.0 + stretch) * (1.0 + squeeze) * size
    _require((error <= allowed).all(), f"{name}: f(f⁻¹(y)) - y is {(error / allowed).max():.3g} × allowed")


def _check_gradients(call: _Call, x: Tensor) -> None:
    names = [name for name, param in call.named_parameters() if param.requires_grad]
    params = [param.detach().clone().requires_grad_() for param in call.parameters() if param.requires_grad]
    rows = x.reshape(-1, x.shape[-1])[:GRADCHECK_ROWS] if call.context is None else x
    rows = rows.detach().clone().requires_grad_()

    def run(value: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(call, dict(zip(names, values, strict=True)), (value,))

    what = f"{type(call.transform).__name__}: gradcheck of the {'inverse' if call.inverse else 'forward'}"
    # Along random directions where one at a time would take minutes.
    fast = sum(param.numel() for param in params) > GRADCHECK_EXHAUSTIVE
    _require(torch.autograd.gradcheck(run, (rows, *params), raise_exception=False, fast_mode=fast), what)


def _check_tracing(call: _Call, x: Tensor) -> None:
    what = f"{type(call.transform).__name__}{' inverse' if call.inverse else ''}"
    expected, expected_det = (value.detach() for value in call(x))
    stacked = torch.stack([x, 0.5 * x])
    mapped, mapped_det = torch.func.vmap(call)(stacked)
    _require(torch.allclose(mapped[0], expected), f"{what}: vmap of the value")
    _require(torch.allclose(mapped_det[0], expected_det), f"{what}: vmap of log_det")
    graph = make_fx(call)(0.5 * x)  # traced at another point: nothing of it may be baked in
    traced, traced_det = graph(x)
    _require(torch.allclose(traced, expected), f"{what}: make_fx of the value")
    _require(torch.allclose(traced_det, expected_det), f"{what}: make_fx of log_det")


def _check_state(transform: nn.Module, x: Tensor, context: Tensor | None) -> None:
    name = type(transform).__name__
    before = _Call(transform, context, False)(x)[0].detach()
    for what, twin in (
        ("deepcopy", copy.deepcopy(transform)),
        ("pickle", pickle.loads(pickle.dumps(transform))),
    ):
        _require(torch.equal(_Call(twin, context, False)(x)[0], before), f"{name}: {what}")
    twin = copy.deepcopy(transform)
    with torch.no_grad():
        for param in twin.parameters():
            param.add_(0.1 * torch.randn_like(param))
    moved = _Call(twin, context, False)(x)[0].detach()
    if any(True for _ in twin.parameters()):
        _require(not torch.equal(moved, before), f"{name}: remembers old parameters")
    twin.load_state_dict(transform.state_dict())
    _require(torch.equal(_Call(twin, context, False)(x)[0], before), f"{name}: state_dict")


def _check_training(transform: nn.Module, x: Tensor, context: Tensor | None) -> None:
    params = {name: param for name, param in transform.named_parameters() if param.requires_grad}
    if not params:
        return
    optimizer = torch.optim.Adam(params.values(), lr=1e-2)
    target = torch.randn(x.shape[-1], dtype=x.dtype, device=x.device)
    seen: set[str] = set()
    for _ in range(2):
        optimizer.zero_grad()
        y, log_det = _Call(transform, context, False)(x)
        (0.5 * (y - 3.0 * target).square().sum(-1) - log_det).mean().backward()
        seen |= {name for name, p in params.items() if p.grad is not None and bool((p.grad != 0).any())}
        optimizer.step()
    missing = sorted(set(params) - seen)
    _require(not missing, f"{type(transform).__name__}: no gradient within two steps for {missing}")
