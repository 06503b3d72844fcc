"""What every transform of the package is: stateless, fused, exact in both directions."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_transform import TransformModule
from torch import Size, Tensor, nn
from torch.distributions import Transform

from .._checks import check_dtype, check_positive_int

__all__ = [
    "FlowTransform",
    "ParametricTransform",
    "forward_and_log_det",
    "forward_with_score",
    "inverse_and_log_det",
]

MapAndLogDet = Callable[..., tuple[Tensor, Tensor]]
Raw = Mapping[str, Tensor]


def _check_argument(transform: "FlowTransform", name: str, x: Tensor) -> None:
    check_dtype(name, x.dtype)
    if x.dim() == 0 or x.shape[-1] != transform.dim:
        raise ValueError(f"{name}: expected shape (*, {transform.dim}), got {tuple(x.shape)}")
    params: Mapping[str, Tensor | None] = transform._parameters  # parts check for themselves
    if not params and isinstance(transform, ParametricTransform):
        params = transform.raw_parameters()
    for param in params.values():
        if param is None:
            continue
        if param.dtype != x.dtype or param.device != x.device:
            raise ValueError(
                f"{name}: expected {param.dtype} on {param.device}, as the parameters of "
                f"{type(transform).__name__} are, got {x.dtype} on {x.device}"
            )
        break


def _checked(method: MapAndLogDet, name: str) -> MapAndLogDet:
    @functools.wraps(method)
    def wrapper(self: "FlowTransform", x: Tensor) -> tuple[Tensor, Tensor]:
        _check_argument(self, name, x)
        return method(self, x)

    return wrapper


class FlowTransform(TransformModule):
    """Base class: a bijection of vectors with a tractable log-determinant.

    Subclasses write :meth:`forward_and_log_det` and :meth:`inverse_and_log_det`; all that torch's and
    Pyro's ``Transform`` offer is derived from them.  Nothing is cached, so a parameter update is seen
    by the next call.  The arguments of both methods are checked for every subclass.

    :param dim: the length D of the vectors.
    :raises ValueError: if ``dim`` is not a positive integer; at a call, if the last dimension is not
        D, the dtype is not float32 or float64, or dtype or device differ from the parameters'.

    Example::

        >>> class Double(FlowTransform):
        ...     def forward_and_log_det(self, x):
        ...         return 2 * x, x.new_full(x.shape[:-1], self.dim * math.log(2))
        ...     def inverse_and_log_det(self, y):
        ...         return y / 2, y.new_full(y.shape[:-1], -self.dim * math.log(2))
        >>> Double(3).inv(torch.ones(3))
        tensor([0.5000, 0.5000, 0.5000])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    sign = 1
    exact_inverse: bool = True
    """Whether :meth:`inverse_and_log_det` inverts any value, to rounding."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, argument in (("forward_and_log_det", "x"), ("inverse_and_log_det", "y")):
            if name in cls.__dict__:
                setattr(cls, name, _checked(cls.__dict__[name], argument))

    def __init__(self, dim: int) -> None:
        super().__init__(cache_size=0)
        self.dim = check_positive_int("dim", dim)

    @property
    def batch_shape(self) -> Size:
        """The batch shape of the parameters: that of the context, once conditioned."""
        return Size()

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image of ``x``, shape ``(*, D)``, and ``log |det J|`` there, shape ``(*,)``."""
        raise NotImplementedError(f"{type(self).__name__}.forward_and_log_det")

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The preimage of ``y`` and the ``log |det J|`` *of the inverse* at ``y``."""
        raise NotImplementedError(f"{type(self).__name__}.inverse_and_log_det")

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The forward pass, carrying the score of the density of ``x`` to that of its image.

        With ``log q(y) = log q(x) - log |det J(x)|`` the score is ``J⁻ᵀ(score - ∇ log |det J|)`` (Vaitl,
        Winkler, Richter and Kessel 2024, proposition 3.1).  This way through the inverse serves any layer;
        layers that know the structure of their Jacobian override it.

        :param x: shape ``(*, D)``, part of a graph.
        :param score: ∇ log q at ``x``, same shape.
        :return: image, log-determinant, and the score at the image, which has no graph.
        """
        y, log_det = self.forward_and_log_det(x)
        return y, log_det, score_by_inverse(self, y, score)

    def _call(self, x: Tensor) -> Tensor:
        return self.forward_and_log_det(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_log_det(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log |det dy/dx|`` at ``x``, shape ``(*,)``; ``y`` is not needed."""
        return self.forward_and_log_det(x)[1]

    def with_cache(self, cache_size: int = 1) -> Self:
        """This transform itself: there is nothing to cache."""
        return self

    def __hash__(self) -> int:
        return id(self)  # Pyro's goes through super(), which torch.compile cannot follow

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)  # torch's Transform would print the bare class name

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def _sum_event(log_det: Tensor, transform: Transform) -> Tensor:
    return log_det.sum(-1) if transform.domain.event_dim == 0 else log_det


def forward_and_log_det(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """The fused forward call for any ``Transform`` of vectors, ours or not.

    :param transform: a transform of vectors; elementwise ones are taken over the last dimension.
    :param x: shape ``(*, D)``.
    :return: image, shape ``(*, D)``, and log-determinant, shape ``(*,)``.

    Example::

        >>> from torch.distributions import transforms as T
        >>> y, log_det = forward_and_log_det(T.ExpTransform(), torch.zeros(4, 3))
        >>> y.shape, log_det.shape
        (torch.Size([4, 3]), torch.Size([4]))
    """
    if isinstance(transform, FlowTransform):
        return transform.forward_and_log_det(x)
    y = transform(x)
    log_det = transform.log_abs_det_jacobian(x, y)
    return y, _sum_event(log_det, transform)


def vector_jacobian(
    outputs: Sequence[Tensor], weights: Sequence[Tensor], inputs: Sequence[Tensor], *, keep: bool = False
) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian products, by the gradient of a sum: with weights ``torch.autograd.grad`` imports sympy.

    :param keep: whether the graph is needed again.
    :return: for every input; None where no output depends on it.
    """
    with torch.enable_grad():
        total = torch.stack([(y * weight).sum() for y, weight in zip(outputs, weights, strict=True)]).sum()
    return torch.autograd.grad(total, list(inputs), retain_graph=keep, allow_unused=True)


def score_by_inverse(transform: Any, y: Tensor, score: Tensor, raw: Raw | None = None) -> Tensor:
    """The score at ``y`` of the image of a density whose score at the preimage is ``score``; no graph.

    :param raw: the parameters of a :class:`ParametricTransform`, if not its own.
    """
    with torch.enable_grad():
        at = y.detach().requires_grad_()
        try:
            if raw is None:
                x, log_det = inverse_and_log_det(transform, at)
            else:
                x, log_det = transform.inverse_given(raw, at)
        except KeyError as error:  # of Pyro's transforms that invert by looking up what they were given
            raise NotImplementedError(f"{type(transform).__name__} has no inverse") from error
        total = (x * score).sum() + log_det.sum()
        (pushed,) = torch.autograd.grad(total, at)
    result: Tensor = pushed
    return result


def forward_with_score(transform: Transform, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:meth:`FlowTransform.forward_with_score` for any ``Transform`` of vectors, ours or not.

    Example::

        >>> from torch.distributions import transforms as T
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> forward_with_score(T.AffineTransform(0.0, 2.0), x, -x.detach())[2]
        tensor([[-0.5000, -0.5000]])
    """
    if isinstance(transform, FlowTransform):
        return transform.forward_with_score(x, score)
    y, log_det = forward_and_log_det(transform, x)
    return y, log_det, score_by_inverse(transform, y, score)


def inverse_and_log_det(transform: Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    """The fused inverse call for any ``Transform`` of vectors, with the inverse's log-determinant.

    :param transform: a transform of vectors; elementwise ones are taken over the last dimension.
    :param y: shape ``(*, D)``.
    :return: preimage, shape ``(*, D)``, and log-determinant of the inverse, shape ``(*,)``.

    Example::

        >>> from torch.distributions import transforms as T
        >>> inverse_and_log_det(T.ExpTransform(), torch.ones(1, 2))
        (tensor([[0., 0.]]), tensor([-0.]))
    """
    if isinstance(transform, FlowTransform):
        return transform.inverse_and_log_det(y)
    x = transform.inv(y)
    log_det = transform.log_abs_det_jacobian(x, y)
    return x, -_sum_event(log_det, transform)


class ParametricTransform(FlowTransform):
    """A transform that is a pure function of its input and its own raw parameters.

    Subclasses register their parameters as attributes and write :meth:`forward_given` and
    :meth:`inverse_given`.  That the parameters are an argument is what makes the transform
    conditional: :class:`~pyro_flowvi.transforms.Conditional` passes others, one set for each context.

    Example::

        >>> class Shift(ParametricTransform):
        ...     def __init__(self, dim):
        ...         super().__init__(dim)
        ...         self.loc = torch.nn.Parameter(torch.zeros(dim))
        ...     def forward_given(self, raw, x):
        ...         return x + raw["loc"], x.new_zeros(x.shape[:-1])
        ...     def inverse_given(self, raw, y):
        ...         return y - raw["loc"], y.new_zeros(y.shape[:-1])
        >>> shift = pyro_flowvi.transforms.Conditional(Shift(2), context_dim=3)
        >>> shift.condition(torch.zeros(5, 3)).batch_shape
        torch.Size([5])
    """

    def raw_parameters(self) -> dict[str, Tensor]:
        """The trainable raw parameters by name; any real values are valid."""
        return {name: param for name, param in self._parameters.items() if param is not None}

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`forward_and_log_det` at the parameters ``raw``, whose batch broadcasts with x's."""
        raise NotImplementedError(f"{type(self).__name__}.forward_given")

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`inverse_and_log_det` at the parameters ``raw``."""
        raise NotImplementedError(f"{type(self).__name__}.inverse_given")

    def score_given(self, raw: Raw, x: Tensor, score: Tensor) -> Tensor | None:
        """The score that :meth:`forward_with_score` carries, at ``raw``; None without a shortcut for it."""
        return None

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            pushed = self.score_given(self.raw_parameters(), x, score)
        if pushed is None:
            return super().forward_with_score(x, score)
        return *self.forward_and_log_det(x), pushed

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_given(self.raw_parameters(), x)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse_given(self.raw_parameters(), y)
