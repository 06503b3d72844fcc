"""Scalar functions that stay finite, in value and in gradient, on every real argument."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["finite_scale", "newton_root", "norm_floor", "safe_norm", "shifted_softplus"]


def norm_floor(dtype: torch.dtype) -> float:
    """Square of a length that is negligible in ``dtype`` yet safe to divide by three times.

    Example::

        >>> norm_floor(torch.float32) < 1e-29
        True
    """
    return float(torch.finfo(dtype).tiny ** 0.8)


def finite_scale(log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and its log, both finite for any raw value.

    Example::

        >>> finite_scale(torch.tensor(1e4, dtype=torch.float64))[0].isfinite()
        tensor(True)
    """
    bound = 0.3 * math.log(torch.finfo(log_scale.dtype).max)
    log_scale = log_scale.clamp(-bound, bound)
    return log_scale.exp(), log_scale


def safe_norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension, with a zero gradient at the origin.

    The plain norm has the gradient 0/0 there.  Lengths below ``norm_floor ** 0.5`` (1e-15 in
    float32) are rounded up to it.

    :param x: shape ``(*, D)``.
    :return: shape ``(*,)``.

    Example::

        >>> safe_norm(torch.tensor([3.0, 4.0]))
        tensor(5.)
    """
    return ((x * x).sum(-1) + norm_floor(x.dtype)).sqrt()


def shifted_softplus(t: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    r"""A softplus through the origin, and its distance to the identity.

    :math:`m(t) = \log(1 + (e^{k} - 1) e^{t}) - k` with ``k = -floor``: increasing, m(0) = 0,
    m > floor everywhere, of slope 1 for large t.  Both results are accurate relative to their own
    size, also for tiny ``t``, where the textbook form cancels to noise.

    :param t: any shape, any real values.
    :param floor: the lower bound, negative.
    :return: ``(m(t), m(t) - t)``.

    Example::

        >>> m, excess = shifted_softplus(torch.tensor([-1e4, 0.0, 1e4]), floor=-0.999)
        >>> [round(value, 3) for value in m.tolist()]
        [-0.999, 0.0, 9999.541]
    """
    # With a = exp(floor):   m = log1p((1 - a) expm1(t))       (t < 0)
    #                        m = t + log1p(a expm1(-t))        (t >= 0)
    # so the argument of expm1 is never positive, and nothing overflows or cancels.
    a = math.exp(floor)
    positive = t >= 0
    decay = torch.expm1(torch.where(positive, -t, t))  # not -|t|, whose gradient at 0 is 0
    log_term = torch.log1p(torch.where(positive, a * decay, (1.0 - a) * decay))
    m = torch.where(positive, t + log_term, log_term)
    excess = torch.where(positive, log_term, log_term - t)
    return m, excess


def newton_root(
    residual_and_slope: Callable[..., tuple[Tensor, Tensor]],
    start: Tensor,
    *params: Tensor,
    num_steps: int,
) -> Tensor:
    """Root in ``s`` of a strictly increasing function, differentiable in its parameters.

    A fixed number of Newton steps, without a stopping test, so that it compiles; the caller
    chooses a start from which Newton is monotone.  Gradients are those of the implicit function
    theorem: the root is found outside the graph and passes through two steps inside it.  A Newton
    step from the exact root is exact to first order in the parameters, and two are to third order.

    :param residual_and_slope: ``(s, *params) -> (residual, d residual / d s)``, elementwise.
    :param start: the starting point, of the result's shape.
    :param params: tensors that the residual depends on, broadcastable to ``start``.
    :param num_steps: Newton steps outside the graph.
    :return: the root, shape of ``start``.

    Example::

        >>> y = torch.tensor(8.0, requires_grad=True)
        >>> cube = lambda s, y: (s**3 - y, 3 * s**2)
        >>> root = newton_root(cube, torch.tensor(3.0), y, num_steps=8)
        >>> round(root.item(), 4), round(torch.autograd.grad(root, y)[0].item(), 4)
        (2.0, 0.0833)
    """
    detached = [param.detach() for param in params]
    s = start.detach()
    for _ in range(num_steps):
        residual, slope = residual_and_slope(s, *detached)
        s = s - residual / slope
    for _ in range(2):
        residual, slope = residual_and_slope(s, *params)
        s = s - residual / slope
    return s
