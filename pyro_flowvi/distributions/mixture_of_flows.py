"""MixtureOfFlows: K normalizing flows and their weights as one distribution."""

from typing import ClassVar, Self

import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.score_parts import ScoreParts
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Size, Tensor
from torch.distributions import Distribution, Transform

from .._checks import check_count, check_positive_int
from .._program.pyro_private import PYRO_STACK
from .._shapes import broadcast_shapes
from .flow import FlowDistribution, Shape
from .indexed_flow import NUM_INDEX_SAMPLES, WithNoise, index_log_ratios, log_mean_exp

__all__ = ["GivenComponent", "MixtureOfFlows", "pick_component", "stratified_indices"]


def stratified_indices(weights: Tensor, num: int) -> Tensor:
    """``num`` components whose counts are as near to ``num * weights`` as integers can be, in random order.

    Systematic sampling: each index alone has the distribution ``weights``.

    :param weights: shape ``(*, K)``, each row a distribution.
    :return: shape ``(num, *)``.

    Example::

        >>> stratified_indices(torch.tensor([0.5, 0.25, 0.25]), 8).sort().values
        tensor([0, 0, 0, 0, 1, 1, 2, 2])
    """
    batch = weights.shape[:-1]
    grid = torch.arange(num, dtype=weights.dtype, device=weights.device)
    offset = torch.rand(batch + (1,), dtype=weights.dtype, device=weights.device)
    levels = (grid + offset) / max(num, 1)
    edges = weights.cumsum(-1)[..., :-1].contiguous()
    indices = torch.searchsorted(edges, levels, right=True)
    order = torch.rand(levels.shape, device=weights.device).argsort(-1)
    return indices.gather(-1, order).movedim(-1, 0)


def refuse_dense_traces(name: str) -> None:
    """NotImplementedError within ``TraceGraph_ELBO``, which drops score parts that sites do not have alone.

    Example::

        >>> refuse_dense_traces("guide")
    """
    if any(isinstance(h, TraceMessenger) and h.graph_type == "dense" for h in PYRO_STACK):
        raise NotImplementedError(
            f"{name}: expected TraceEnum_ELBO, Trace_ELBO or RenyiELBO, got TraceGraph_ELBO, which leaves "
            "the score of the component out of the gradient"
        )


class MixtureOfFlows(TorchDistribution):
    r"""The mixture :math:`p(x) = \sum_k w_k p_k(x)` of K flows of one family.

    All K flows run in one batched call.  A value is scored by the marginal over components.

    Of the four mixtures of flows, :class:`~pyro_flowvi.AutoFlowMixture` is the guide, over the latents of a
    model; :class:`~pyro_flowvi.VMoNF` a Pyro model of rows of data; :class:`~pyro_flowvi.models.FlowMixture`
    the scikit-learn estimator that trains one; and :class:`~pyro_flowvi.distributions.MixtureOfFlows` the
    distribution that all are made of.

    :param base: a distribution over vectors, the same for all components or with a batch shape ``(K,)``;
        the standard normal if None.
    :param transform: K transforms of vectors as one whose ``batch_shape`` ends with K, such as
        :class:`~pyro_flowvi.transforms.Stacked`, or a composition of it with transforms that all components
        share.
    :param logits: the logarithms of the weights, up to a constant, shape ``(*, K)``; equal weights if None.
    :param index_dim: of continuously-indexed components, which are transforms of D + ``index_dim``
        coordinates (:class:`~pyro_flowvi.transforms.IndexedCompose`): the number of the indices' noise.
    :param num_index_samples: the number of index draws with which the density of such components is
        estimated, on average from below, as by :class:`IndexedFlow`.
    :param validate_args: as in torch.
    :raises ValueError: if ``transform`` has no batch shape, ``logits`` not K elements, or a number is not of
        the described kind.

    Shapes: ``batch_shape`` is that of transform and logits without the K, ``event_shape`` is ``(D,)``.

    A draw is reparameterised given its component: :meth:`rsample` carries gradients to the flows, and
    ``score_parts`` has the score of the component, with which Pyro's ``Trace_ELBO`` has an unbiased gradient
    in the weights too.  (Pathwise gradients in the weights alone would need the components' conditional
    distribution functions.)  For an expectation with exact weights take :meth:`rsample_components`.

    Reference: Pires and Figueiredo, *Variational Mixture of Normalizing Flows*, 2020.

    Example::

        >>> from pyro_flowvi import FLOWS
        >>> from pyro_flowvi.transforms import Stacked
        >>> mixture = MixtureOfFlows(None, Stacked(FLOWS["realnvp"](2) for _ in range(3)), torch.zeros(3))
        >>> x = mixture.sample((100,))
        >>> mixture.log_prob(x).shape, mixture.component_log_prob(x).shape
        (torch.Size([100]), torch.Size([100, 3]))
        >>> mixture.responsibilities(x).shape
        torch.Size([100, 3])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        base: Distribution | None,
        transform: Transform,
        logits: Tensor | None = None,
        *,
        index_dim: int = 0,
        num_index_samples: int = NUM_INDEX_SAMPLES,
        validate_args: bool | None = None,
    ) -> None:
        self.index_dim = check_count("index_dim", index_dim)
        self.num_index_samples = check_positive_int("num_index_samples", num_index_samples)
        if base is not None and index_dim:
            base = WithNoise(base, index_dim)
        self.components = FlowDistribution(base, transform, validate_args=False)
        """The components: a distribution whose batch shape ends with K."""
        shape = self.components.batch_shape
        if not shape or not getattr(transform, "batch_shape", ()):
            raise ValueError(f"transform: expected a batch shape (*, K), got () of {transform!r}")
        if logits is None:
            logits = next(iter(transform.parameters()), torch.zeros(())).new_zeros(shape[-1])  # type: ignore
        if logits.dim() == 0 or logits.shape[-1] != shape[-1]:
            raise ValueError(f"logits: expected shape (*, {shape[-1]}), got {tuple(logits.shape)}")
        self.logits = logits.log_softmax(-1)
        """The log weights, shape ``(*, K)``."""
        self._drawn: tuple[Tensor, Tensor] | None = None
        batch_shape = broadcast_shapes(shape[:-1], logits.shape[:-1])
        dim = self.components.event_shape[0] - self.index_dim
        super().__init__(batch_shape, Size((check_positive_int("dim", dim),)), validate_args=validate_args)

    @property
    def num_components(self) -> int:
        """The number K of components."""
        return self.logits.shape[-1]

    @property
    def weights(self) -> Tensor:
        """The weights, shape ``(*, K)``."""
        return self.logits.exp()

    # -- scoring -------------------------------------------------------------------------------

    def component_log_prob(self, value: Tensor) -> Tensor:
        """Log density of each component, shape ``(*, K)``, at ``value`` of shape ``(*, D)``."""
        return self.matched_log_prob(value.unsqueeze(-2))

    def matched_log_prob(self, value: Tensor) -> Tensor:
        """Log density of each component at a vector of its own, shape ``(*, K)``, of shape ``(*, K, D)``."""
        if not self.index_dim:
            return self.components.log_prob(value)
        return log_mean_exp(index_log_ratios(self.components, value.shape[-1], value, self.num_index_samples))

    def joint_log_prob(self, value: Tensor) -> Tensor:
        """log w_k + log p_k, shape ``(*, K)``, at ``value`` of shape ``(*, D)``."""
        return self.logits + self.component_log_prob(value)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the mixture.

        :param value: shape ``(*, D)``, broadcastable with the batch shape.
        :return: shape ``(*,)``.
        :raises ValueError: with validation on, if ``value`` is not a real vector of length D.
        """
        if self._validate_args and value.numel():  # torch cannot check an empty batch
            self._validate_sample(value)
        log_prob = self.joint_log_prob(value).logsumexp(-1)
        return log_prob.expand(broadcast_shapes(log_prob.shape, self.batch_shape))

    def responsibilities(self, value: Tensor) -> Tensor:
        """The posterior of the component, p(k | x), shape ``(*, K)``."""
        return self.joint_log_prob(value).softmax(-1)

    def given(self, index: Tensor) -> "GivenComponent":
        """The component of that index, which may be enumerated: see :class:`GivenComponent`."""
        return GivenComponent(self, index)

    # -- drawing -------------------------------------------------------------------------------

    def rsample_components(self, sample_shape: Shape = ()) -> Tensor:
        """As many draws of *every* component, reparameterised, shape ``S + batch_shape + (K, D)``.

        :math:`\\sum_k w_k f(z_k)` is an unbiased, stratified estimate of the expectation of f, and its
        gradient one of the gradient, in the weights too.
        """
        shape = self.batch_shape + (self.num_components,)
        return self.components.expand(shape).rsample(sample_shape)[..., : self.event_shape[0]]

    def rsample_with_component(self, sample_shape: Shape = ()) -> tuple[Tensor, Tensor]:
        """Draws as :meth:`rsample` and their components, shapes ``S + batch_shape + (D,)`` and without D."""
        sample_shape = Size(sample_shape)
        weights = self.weights.detach().expand(self.batch_shape + (self.num_components,))
        indices = stratified_indices(weights, sample_shape.numel())
        indices = indices.reshape(sample_shape + self.batch_shape)
        draws = self.rsample_components(sample_shape)
        return pick_component(draws, indices), indices

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws whose components are stratified, shape ``S + batch_shape + (D,)``.

        Each draw has the law of the mixture; together they hold every component in proportion to its weight,
        as near as whole numbers allow, so averages vary less.  Gradients reach the parameters of the flows
        through the draws, and those of the weights through ``score_parts`` only.
        """
        refuse_dense_traces(type(self).__name__)
        z, indices = self.rsample_with_component(sample_shape)
        self._drawn = z, indices
        return z

    def rsample_and_log_prob(self, sample_shape: Shape = ()) -> tuple[Tensor, Tensor]:
        """Draws as :meth:`rsample`, shape ``S + batch_shape + (D,)``, with their log densities."""
        z, _ = self.rsample_with_component(sample_shape)
        return z, self.log_prob(z)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """As :meth:`rsample`, without gradients."""
        with torch.no_grad():
            return self.rsample_with_component(sample_shape)[0]

    def score_parts(self, x: Tensor) -> ScoreParts:
        """log q, log w of the drawn component, and log q: ``Trace_ELBO``'s gradient is unbiased with them.

        :raises ValueError: if ``x`` is not the last draw, whose component is not known then.
        """
        if self._drawn is None or x is not self._drawn[0]:
            raise ValueError("x: expected the last draw of rsample, of which the component is known")
        log_q = self.log_prob(x)
        logits = self.logits.expand(x.shape[:-1] + (self.num_components,))
        log_weight = logits.gather(-1, self._drawn[1].unsqueeze(-1)).squeeze(-1)
        return ScoreParts(log_q, log_weight, log_q)

    def expand(self, batch_shape: Shape, _instance: Self | None = None) -> Self:
        """The same law with a larger batch shape."""
        new: Self = self._get_checked_instance(MixtureOfFlows, _instance)
        new.components = self.components
        new.logits = self.logits
        new.index_dim, new.num_index_samples = self.index_dim, self.num_index_samples
        new._drawn = None
        super(MixtureOfFlows, new).__init__(Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


class GivenComponent(TorchDistribution):
    """One component of a :class:`MixtureOfFlows`, chosen by an index that a model draws or enumerates.

    However many values the index has, all K flows score a value once, and the index picks among them.

    :param mixture: the mixture.
    :param index: integers from 0 to K - 1, of any shape, such as ``(K, 1)`` when Pyro enumerates it.

    Shapes: ``batch_shape`` is that of the index with the mixture's, ``event_shape`` is ``(D,)``.

    Example::

        >>> from pyro_flowvi import FLOWS
        >>> from pyro_flowvi.transforms import Stacked
        >>> mixture = MixtureOfFlows(None, Stacked(FLOWS["realnvp"](2) for _ in range(3)))
        >>> mixture.given(torch.arange(3).unsqueeze(-1)).log_prob(torch.zeros(5, 2)).shape
        torch.Size([3, 5])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mixture: MixtureOfFlows, index: Tensor) -> None:
        self.mixture = mixture
        self.index = index
        batch_shape = broadcast_shapes(index.shape, mixture.batch_shape)
        super().__init__(batch_shape, mixture.event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the component at ``value``, shape ``(*, D)``, which is broadcast with the index."""
        each = self.mixture.component_log_prob(value)
        shape = broadcast_shapes(each.shape[:-1], self.batch_shape)
        index = self.index.expand(shape).unsqueeze(-1)
        return each.expand(shape + each.shape[-1:]).gather(-1, index).squeeze(-1)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws that carry gradients to the flows, shape ``S + batch_shape + (D,)``."""
        shape = Size(sample_shape) + self.batch_shape
        extra = shape[: len(shape) - len(self.mixture.batch_shape)]
        draws = self.mixture.rsample_components(extra)
        return pick_component(draws, self.index.expand(shape))

    def expand(self, batch_shape: Shape, _instance: Self | None = None) -> Self:
        """The same law with a larger batch shape."""
        new: Self = self._get_checked_instance(GivenComponent, _instance)
        new.mixture = self.mixture
        new.index = self.index
        super(GivenComponent, new).__init__(Size(batch_shape), self.event_shape, validate_args=False)
        return new


def pick_component(draws: Tensor, index: Tensor) -> Tensor:
    """The vector of each index among draws of all components, ``(*, K, D)``: shape ``(*, D)``.

    Example::

        >>> pick_component(torch.tensor([[[1.0], [2.0]]]), torch.tensor([1]))
        tensor([[2.]])
    """
    place = index[..., None, None].expand(index.shape + (1, draws.shape[-1]))
    return draws.gather(-2, place).squeeze(-2)
