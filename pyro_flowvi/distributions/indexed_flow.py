"""Continuously-indexed flows as Pyro distributions: exact draws, bounds on the log density."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final, Self

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor
from torch.distributions import Distribution
from torch.utils.checkpoint import checkpoint

from .._checks import check_count, check_positive_int
from .._shapes import broadcast_shapes
from ..transforms import IndexedCompose
from .flow import FlowDistribution, Shape, log_prob_of, standard_normal_log_prob

__all__ = ["IndexedFlow", "index_log_ratios", "log_mean_exp", "tightened"]

NUM_INDEX_SAMPLES: Final = 100
_MAX_ELEMENTS = 2**22
_MAX_ELEMENTS_WITH_GRAPH = 2**16
"""Numbers that are inverted at once, without a graph and with one: layers keep some kilobytes for each."""
_forget = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def log_mean_exp(values: Tensor) -> Tensor:
    """The logarithm of the mean over the first dimension, of logarithms.

    Example::

        >>> log_mean_exp(torch.zeros(3, 2))
        tensor([0., 0.])
    """
    return values.logsumexp(0) - math.log(len(values))


def index_log_ratios(density: FlowDistribution, inner_dim: int, z: Tensor, num_index_samples: int) -> Tensor:
    """Log ratios ``q(w, u) |det ∂w/∂z| / r(u | z)`` of indices drawn from r, whose mean ratio is q(z).

    :param density: the law of variable and noise, with an :class:`IndexedCompose` as its last transform.
    :param inner_dim: the length D of the variable.
    :param z: values, shape ``(*, D)``.
    :param num_index_samples: the number M of draws of all indices for each value.
    :return: shape ``(M, *)``.

    Example::

        >>> from pyro_flowvi.transforms import IndexedLayer, Planar
        >>> flow = IndexedCompose([IndexedLayer(Planar(2))])
        >>> index_log_ratios(FlowDistribution(None, flow), 2, torch.zeros(5, 2), 10).shape
        torch.Size([10, 5])
    """
    index_dim = density.event_shape[0] - inner_dim
    shape = broadcast_shapes(z.shape[:-1], density.batch_shape)
    noise = torch.randn((num_index_samples,) + shape + (index_dim,), dtype=z.dtype, device=z.device)
    graph = torch.is_grad_enabled()
    limit = _MAX_ELEMENTS_WITH_GRAPH if graph else _MAX_ELEMENTS
    rows = max(1, limit // max(1, math.prod(shape) * density.event_shape[0]))

    def ratios(part: Tensor) -> Tensor:
        y = torch.cat([z.expand(part.shape[:-1] + (inner_dim,)), part], -1)
        return density.log_prob(y) - standard_normal_log_prob(part)

    if graph and rows < num_index_samples:  # inverted again in the backward pass, which saves their graphs
        return torch.cat([_forget(ratios, part) for part in noise.split(rows)])
    return torch.cat([ratios(part) for part in noise.split(rows)])


def tightened(density: FlowDistribution, inner_dim: int, z: Tensor, own: Tensor, num_extra: int) -> Tensor:
    """The bound on draws, of the log ratios of their own indices and of further index draws.

    :param density: as ``inner_dim`` and ``z``, that of :func:`index_log_ratios`.
    :param own: the log ratios of the indices that made the draws, shape ``(*,)``, which with ``num_extra`` 0
        are the bound.

    Example::

        >>> tightened(None, 2, torch.zeros(5, 2), torch.zeros(5), 0)
        tensor([0., 0., 0., 0., 0.])
    """
    if not num_extra:
        return own
    return log_mean_exp(torch.cat([own.unsqueeze(0), index_log_ratios(density, inner_dim, z, num_extra)]))


class WithNoise(TorchDistribution):
    """A base distribution over vectors, followed by independent standard normal coordinates."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector

    def __init__(self, base: Distribution, index_dim: int) -> None:
        self.base, self.index_dim = base, index_dim
        super().__init__(base.batch_shape, Size((base.event_shape[0] + index_dim,)), validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.base.has_rsample

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        shape = Size(sample_shape)
        w = self.base.rsample(shape) if self.base.has_rsample else self.base.sample(shape)
        noise = torch.randn(w.shape[:-1] + (self.index_dim,), dtype=w.dtype, device=w.device)
        return torch.cat([w, noise], -1)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        w, noise = value.split([self.base.event_shape[0], self.index_dim], -1)
        log_prob: Tensor = log_prob_of(self.base, w) + standard_normal_log_prob(noise)
        return log_prob

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "WithNoise":
        return WithNoise(self.base.expand(Size(batch_shape)), self.index_dim)


@dataclass
class _Memo:
    """A draw with the noise of its indices; its bound until it was asked for."""

    z: Tensor
    noise: Tensor
    bound: Tensor | None
    versions: list[Any]


def _described(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else repr(value)


class IndexedFlow(TorchDistribution):
    r"""A continuously-indexed flow: a mixture of flows with a continuum of components.

    :math:`w_0 \sim` base, :math:`u_l \sim q_l(u | w_l)`, :math:`w_{l+1} = G_l(w_l; u_l)`, and the last w is
    the value.  No bijection: it can tear a normal apart.  In return its density is an integral over the
    indices, and what is known are bounds.  With indices drawn backwards from the auxiliary r_l and

    .. math:: a(u) = \log q_0(w_0) + \sum_l \log \frac{q_l(u_l | w_l)}
        {|\det \partial G_l / \partial w|\; r_l(u_l | w_{l+1})}

    the log of the mean of M of the :math:`e^a` is on average below log q(z), and its exponential unbiased;
    with the indices that made the draw among M + 1 of them it is on average above.

    Caterini, Cornish, Sejdinovic and Doucet, *Variational Inference with Continuously-Indexed Normalizing
    Flows*, 2020; the upper bound is that of Sobolev and Vetrov, *Importance Weighted
    Hierarchical Variational Inference*, 2019.

    :param base: a distribution over vectors of length D; the standard normal if None.
    :param layers: :class:`~pyro_flowvi.transforms.IndexedLayer` modules, and plain transforms among them, or
        an :class:`~pyro_flowvi.transforms.IndexedCompose` of them.
    :param context: what conditional layers are given, shape ``(*B, C)``; B joins the batch shape.
    :param num_index_samples: the number M of index draws from which :meth:`log_prob` estimates the density.
    :param num_extra: how many more index draws go into the bound of the distribution's own draws: 0 is the
        auxiliary bound, any more make it tighter.
    :param validate_args: as in torch.
    :raises ValueError: if an argument is not of the described kind.

    Shapes: ``batch_shape`` is that of base and context, ``event_shape`` is ``(D,)``.

    Example::

        >>> from pyro_flowvi.flows import indexed_layers
        >>> q = IndexedFlow(None, indexed_layers("planar", 2, num_layers=3))
        >>> z, lower, upper = q.rsample_with_bound((1000,), 10)
        >>> z.shape, lower.shape, bool(lower.mean() <= upper.mean() + 1e-4)
        (torch.Size([1000, 2]), torch.Size([1000]), True)
        >>> q.log_prob_bound(torch.zeros(2), 100).shape
        torch.Size([])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    indexed: ClassVar[bool] = True
    lower_bound: ClassVar[bool] = True
    """That :meth:`log_prob` of a value is an estimate which on average is below the log density."""

    def __init__(
        self,
        base: Distribution | None,
        layers: IndexedCompose | Iterable[Any],
        *,
        context: Tensor | None = None,
        num_index_samples: int = NUM_INDEX_SAMPLES,
        num_extra: int = 0,
        validate_args: bool | None = None,
    ) -> None:
        flow = layers if isinstance(layers, IndexedCompose) else IndexedCompose(layers)
        if flow.is_conditional and context is None:
            raise ValueError("context: expected what the conditional layers depend on, got None")
        if context is not None:
            if not flow.is_conditional:
                raise ValueError("context: expected None with layers that depend on none, got a tensor")
            flow = flow.condition(context)
        if not isinstance(base, Distribution | None):
            raise ValueError(f"base: expected a distribution over vectors, got {base!r}")
        if base is not None and base.event_shape != (flow.inner_dim,):
            raise ValueError(f"base: expected event_shape ({flow.inner_dim},), got {tuple(base.event_shape)}")
        self.num_index_samples = check_positive_int("num_index_samples", num_index_samples)
        self.num_extra = check_count("num_extra", num_extra)
        joint = None if base is None else WithNoise(base, flow.index_dim)
        self.extended = FlowDistribution(joint, flow)
        """The law of the value and the standardised indices, tractable: :class:`FlowDistribution`."""
        self._context = context
        self._memo: _Memo | None = None
        super().__init__(
            self.extended.batch_shape, Size((check_positive_int("dim", flow.inner_dim),)), validate_args
        )

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry gradients: always, unless the base's do not."""
        return self.extended.has_rsample

    # -- bounds -------------------------------------------------------------------------------------

    def log_prob_bound(self, value: Tensor, num_index_samples: int) -> Tensor:
        """A lower bound on the log density of any value, in the mean over index draws.

        :param value: shape ``(*, D)``, broadcastable with the batch shape.
        :param num_index_samples: the number M of index draws for each value; the gap falls as 1 / M.
        :return: shape ``(*,)``, the logarithm of an unbiased estimate of the density.
        :raises ValueError: if ``num_index_samples`` is not a positive integer, or ``value`` no vector of
            length D.
        """
        count = check_positive_int("num_index_samples", num_index_samples)
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[-1] != self.event_shape[0]:
            raise ValueError(f"value: expected shape (*, {self.event_shape[0]}), got {_described(value)}")
        return log_mean_exp(self._log_ratios(value, count))

    def rsample_with_bound(
        self, sample_shape: Shape = (), num_index_samples: int = NUM_INDEX_SAMPLES
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws with bounds on their log densities: in the mean, lower ≤ log q ≤ upper.

        :param sample_shape: the shape S of independent draws.
        :param num_index_samples: the number M of index draws for each; the upper bound has M + 1 with
            its own.
        :return: draws ``S + batch_shape + (D,)``, lower and upper bounds ``S + batch_shape``.
        :raises ValueError: if ``num_index_samples`` is not a positive integer.
        """
        count = check_positive_int("num_index_samples", num_index_samples)
        z, _, own = self._draw(Size(sample_shape))
        ratios = self._log_ratios(z, count)
        return z, log_mean_exp(ratios), log_mean_exp(torch.cat([own.unsqueeze(0), ratios]))

    def _log_ratios(self, z: Tensor, num_index_samples: int) -> Tensor:
        return index_log_ratios(self.extended, self.event_shape[0], z, num_index_samples)

    def _draw(self, sample_shape: Size) -> tuple[Tensor, Tensor, Tensor]:
        """Draws, the noise of the indices that made them, and the log ratios of these."""
        y, log_prob = self.extended.rsample_and_log_prob(sample_shape)
        z, noise = y.tensor_split([self.event_shape[0]], -1)
        return z, noise, log_prob - standard_normal_log_prob(noise)

    def _with_extra(self, z: Tensor, bound: Tensor) -> Tensor:
        return tightened(self.extended, self.event_shape[0], z, bound, self.num_extra)

    # -- a distribution -----------------------------------------------------------------------------

    def rsample_and_log_prob(self, sample_shape: Shape = ()) -> tuple[Tensor, Tensor]:
        """Draws with the bound that an ELBO takes: on average above their log densities.

        So log p(x, z) less the bound is a lower bound on the evidence, and its exponential unbiased.

        :param sample_shape: the shape S of independent draws.
        :return: draws, shape ``S + batch_shape + (D,)``, and bounds, shape ``S + batch_shape``.
        """
        z, _, bound = self._draw(Size(sample_shape))
        return z, self._with_extra(z, bound)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws that carry gradients, shape ``S + batch_shape + (D,)``."""
        z, noise, bound = self._draw(Size(sample_shape))
        self._memo = _Memo(z, noise, self._with_extra(z, bound), self._versions(z))
        return z

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws without gradients, shape ``S + batch_shape + (D,)``."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """The bound on the last draw if ``value`` is that very tensor; an estimate for any other.

        Of its own draw it is the upper bound of :meth:`rsample_and_log_prob`, which makes an ELBO, for as
        long as neither draw, parameters, base nor context change in place.  Of any other value it is
        :meth:`log_prob_bound`, which makes none: so a guide may not transform or copy what it draws from
        this distribution before it is scored.  Draw it at an auxiliary site, and put the image there with
        ``pyro.sample(name, dist.Delta(image, log_density=-log_det, event_dim=1))``.

        :param value: shape ``(*, D)``, broadcastable with the batch shape.
        :return: shape ``(*,)``.
        :raises ValueError: with validation on, if ``value`` is not a real vector of length D.
        """
        if self._validate_args and value.numel():  # torch cannot check an empty batch
            self._validate_sample(value)
        memo = self._memo
        if memo is not None and value is memo.z and memo.versions == self._versions(value):
            bound, memo.bound = memo.bound, None
            if bound is not None and (bound.requires_grad or not torch.is_grad_enabled()):
                return bound
            # Again, or with the gradient that the draw was made without.
            again = self.extended.log_prob(torch.cat([value, memo.noise], -1))
            return self._with_extra(value, again - standard_normal_log_prob(memo.noise))
        return self.log_prob_bound(value, self.num_index_samples)

    def _versions(self, drawn: Tensor) -> list[Any]:
        """Counts of in-place changes, and dtypes, of all that a bound depends on."""
        flow: Any = self.extended.transform
        tensors = [drawn, *flow.parameters(), *flow.buffers(), *_tensors(self.extended.base)]
        if self._context is not None:
            tensors.append(self._context)
        return [(tensor._version, tensor.dtype) for tensor in tensors if not tensor.is_inference()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": None}  # tensors of a graph have no copy

    def expand(self, batch_shape: Shape, _instance: Self | None = None) -> Self:
        """The same law with a larger batch shape; its draws are its own."""
        new: Self = self._get_checked_instance(IndexedFlow, _instance)
        new.extended = self.extended.expand(batch_shape)
        new.num_index_samples, new.num_extra = self.num_index_samples, self.num_extra
        new._context, new._memo = self._context, None
        super(IndexedFlow, new).__init__(Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the layers' parameters and the base, as ``nn.Module.to``; returns self."""
        self.extended.to(*args, **kwargs)
        self._memo = None
        return self


def _tensors(distribution: Distribution | None) -> Iterator[Tensor]:
    """The tensors that a distribution is made of, at any depth."""
    for value in vars(distribution).values() if distribution is not None else ():
        if isinstance(value, Distribution):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value
