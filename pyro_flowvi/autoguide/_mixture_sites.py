"""The latent of one call of a mixture guide: drawn from one component, scored by all of them."""

import math
import sys
from typing import Any, ClassVar, Self

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.score_parts import ScoreParts
from pyro.infer import ELBO, TraceMeanField_ELBO, TraceTailAdaptive_ELBO
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Size, Tensor

from .._program.pyro_private import PYRO_STACK
from .._program.scoring import is_scoring
from .._shapes import broadcast_shapes
from ..distributions import MixtureOfFlows
from ..distributions.flow import Shape
from ..distributions.mixture_of_flows import pick_component, refuse_dense_traces
from ..objectives import TraceSTL_ELBO

__all__ = ["ComponentCall", "ComponentIndex", "LatentGivenComponent", "NotSummedOut", "refuse_objectives"]

_NONE: Any = 0
"""Pyro's mark of a term that a site does not have."""


class NotSummedOut(str):
    """How a site is enumerated, where the objective draws it: false, so that Pyro does not warn of it.

    Example::

        >>> kind = NotSummedOut("parallel")
        >>> kind == "parallel", bool(kind)
        (True, False)
    """

    __slots__ = ()

    def __bool__(self) -> bool:
        return False


def _objective() -> ELBO | None:
    """The objective that runs the guide, of which Pyro tells a program nothing."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",) and isinstance(own := frame.f_locals.get("self"), ELBO):
            return own
        frame = frame.f_back  # type: ignore[assignment]
    return None


def refuse_objectives(name: str) -> None:
    """Raises where an objective runs the guide whose gradient would be wrong, or that torch.jit traces.

    :param name: of the guide.
    :raises ValueError: with the objective's name and those to take.
    :raises NotImplementedError: within ``TraceGraph_ELBO``.
    """
    objective = _objective()
    kind, why = type(objective).__name__, ""
    if kind.startswith("Jit"):
        why = "whose torch.jit cannot trace K flows in one call; CompiledSVI compiles the step of those"
    elif isinstance(objective, TraceMeanField_ELBO | TraceTailAdaptive_ELBO | TraceSTL_ELBO):
        why = "which leaves out the score of the component; TraceEnumSTL_ELBO has path gradients"
    if why:
        raise ValueError(f"{name}: expected TraceEnum_ELBO, Trace_ELBO or RenyiELBO, got {kind}, {why}")
    refuse_dense_traces(name)


class ComponentCall:
    """What the two sites of one call share, the component k and the latent given k.

    The first is scored log w_k, the second log q(z) - log w_k with q the whole mixture: together log q(z).
    Where Pyro enumerates k that is all.  Where k is drawn, the objective's gradient needs log q(z) times the
    score of w_k, which Pyro leaves out of the sites that a model does not know:

    - ``Trace_ELBO`` takes it from the entropy term of the second site (:class:`LatentGivenComponent`);
    - of ``RenyiELBO``, whose gradient is built from the log densities themselves, it is put into the backward
      pass (:meth:`_score_of_renyi`).

    :param mixture: the guide's posterior.
    :param counter: of calls that were scored since the last backward pass, a list of one number.
    :param dtype: of draws and densities, if not that of the mixture.

    Example::

        >>> from pyro_flowvi.transforms import Planar, Stacked
        >>> mixture = MixtureOfFlows(None, Stacked(Planar(2) for _ in range(2)))
        >>> ComponentCall(mixture, [0]).log_weight(torch.tensor([0, 1, 1])).exp()
        tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(self, mixture: MixtureOfFlows, counter: list[int], dtype: torch.dtype | None = None) -> None:
        self.mixture, self._counter, self.dtype = mixture, counter, dtype
        self.enumerates = any(isinstance(handler, EnumMessenger) for handler in PYRO_STACK)
        """Whether the objective sums discrete sites out."""
        self._path = self.enumerates and is_scoring() and torch.is_grad_enabled()
        self._scale = math.prod(h.scale for h in PYRO_STACK if isinstance(h, ScaleMessenger))
        self._log_weight: tuple[Tensor, Tensor] | None = None
        self._from_latent: Tensor | None = None

    def log_weight(self, component: Tensor) -> Tensor:
        """log w_k of a component of any shape; one tensor for both sites."""
        if self._log_weight is None or self._log_weight[0] is not component:
            log_weights: Tensor = self.mixture.logits.to(dtype=self.dtype)
            if getattr(component, "_pyro_categorical_support", None) is not None:  # all of them, in order
                value = log_weights.reshape(component.shape)
            else:
                value = log_weights.index_select(0, component.reshape(-1)).reshape(component.shape)
            self._log_weight = component, value
        return self._log_weight[1]

    def log_q(self, value: Tensor) -> Tensor:
        """The log density of the mixture; within :class:`Scoring` its gradient is that through the value."""
        value = value.to(self.mixture.logits.dtype)
        if not self._path:
            return self.mixture.log_prob(value).to(dtype=self.dtype)
        with torch.enable_grad():
            leaf = value.detach().requires_grad_()
            log_q = self.mixture.log_prob(leaf)
            (score,) = torch.autograd.grad(log_q.sum(), leaf)
        return (log_q.detach() + (score * (value - value.detach())).sum(-1)).to(dtype=self.dtype)

    def latent_log_prob(self, log_q: Tensor, component: Tensor) -> Tensor:
        """log q - log w_k."""
        log_weight = self.log_weight(component)
        result = log_q - log_weight
        if not self.enumerates and log_weight.requires_grad and result.requires_grad:
            self._counter[0] += 1
            # A tensor's hook sees its whole gradient, and that of the result comes first.
            result.register_hook(self._remember)
            log_weight.register_hook(self._score_of_renyi)
        return result

    def _remember(self, gradient: Tensor) -> None:
        self._from_latent = gradient

    def _score_of_renyi(self, gradient: Tensor) -> Tensor:
        """The gradient for log w_k, of the loss.

        ``RenyiELBO`` gives the latent's log density the gradient v, the particle's share of the mean of the
        W^(1 - a), and log w_k the gradient -a v / (1 - a), beside the -v through the latent.  The score's
        factor should be L - b, with L the log of that mean divided by 1 - a and b what does not depend on
        this particle: VIMCO's choice, L without the particle, makes it -log(1 - v) / (1 - a) and a constant
        of mean zero (Mnih and Rezende, *Variational inference for Monte Carlo objectives*, 2016).  Where the
        two gradients are the same, as in wake-sleep, the factor is 0, as it should be.
        """
        count, self._counter[0] = self._counter[0], 0
        shares, self._from_latent = self._from_latent, None
        if shares is None:  # Trace_ELBO, whose gradient does not go through the latent's log density
            return gradient
        particles = shares.numel() > 1  # run together, at the first dimension
        total = shares.sum(0) if particles else shares
        known = torch.where(total == 0, 1.0, total)  # zero where the guide is masked
        ratio = ((gradient + shares).sum(0) if particles else gradient + shares) / known
        tiny, eps = torch.finfo(shares.dtype).tiny, torch.finfo(shares.dtype).eps
        if particles:
            # Sums of the others, of which a difference to the total would round off all but the leading.
            zero = torch.zeros_like(shares[:1])
            before = torch.cat([zero, shares.cumsum(0)[:-1]])
            after = torch.cat([shares.flip(0).cumsum(0).flip(0)[1:], zero])
            others = (before + after).clamp(min=tiny) / known
            factor = others.clamp(min=tiny).log() - math.log1p(-1.0 / max(2, len(shares)))
        else:
            share = shares / self._scale
            if count == 1 and bool(share == 1.0):
                raise ValueError(
                    "num_particles: expected at least 2 for RenyiELBO with a guide that draws its component, "
                    "got 1; with one particle it is the ELBO: take TraceEnum_ELBO"
                )
            factor = (1.0 - share).clamp(min=8.0 * eps).log()
        return torch.where(total == 0, 0.0, (1.0 - ratio) * factor)


class ComponentIndex(dist.Categorical):
    """The component of a call.

    Example::

        >>> from pyro_flowvi.transforms import Planar, Stacked
        >>> mixture = MixtureOfFlows(None, Stacked(Planar(2) for _ in range(3)))
        >>> ComponentIndex.of(ComponentCall(mixture, [0])).sample((5,)).max() < 3
        tensor(True)
    """

    call: ComponentCall
    in_cost: ClassVar[bool] = True

    @classmethod
    def of(cls, call: ComponentCall) -> Self:
        """The index of one call."""
        index = cls(logits=call.mixture.logits.detach(), validate_args=False)
        index.call = call
        return index

    def log_prob(self, value: Tensor) -> Tensor:
        log_weight = self.call.log_weight(value)
        shape = broadcast_shapes(log_weight.shape, self.batch_shape)
        return log_weight if log_weight.shape == shape else log_weight.expand(shape)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Self:
        new: Self = super().expand(batch_shape, _instance)
        new.call = self.call
        return new


class LatentGivenComponent(TorchDistribution):
    """The latent given the component: draws of that component, scored log q(z) - log w_k.

    :param call: what it shares with the component's site.
    :param component: of any shape; the batch shape.

    Example::

        >>> from pyro_flowvi.transforms import Planar, Stacked
        >>> mixture = MixtureOfFlows(None, Stacked(Planar(2) for _ in range(3)))
        >>> LatentGivenComponent(ComponentCall(mixture, [0]), torch.tensor([2, 0])).rsample().shape
        torch.Size([2, 2])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True
    in_cost: ClassVar[bool] = True
    """That the entropy term has what ``Trace_ELBO`` leaves out of a score's cost."""

    def __init__(self, call: ComponentCall, component: Tensor) -> None:
        self.call, self.component = call, component
        super().__init__(component.shape, call.mixture.event_shape, validate_args=False)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        shape, mixture = Size(sample_shape) + self.batch_shape, self.call.mixture
        if getattr(self.component, "_pyro_categorical_support", None) is not None and not sample_shape:
            # Enumerated, at the leftmost dimension: as many draws of each, not K times as many.
            drawn = mixture.rsample_components(shape[1:]).movedim(-2, 0).contiguous()
        else:
            drawn = pick_component(mixture.rsample_components(shape), self.component.expand(shape))
        return drawn.to(dtype=self.call.dtype)

    def log_q(self, value: Tensor) -> Tensor:
        """The log density of the mixture."""
        log_q = self.call.log_q(value)
        return log_q.expand(broadcast_shapes(log_q.shape, self.batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.call.latent_log_prob(self.log_q(value), self.component)

    def score_parts(self, x: Tensor) -> ScoreParts:
        log_q = self.log_q(x)
        log_prob = self.call.latent_log_prob(log_q, self.component)
        if self.call.enumerates:
            return ScoreParts(log_prob, _NONE, log_prob)
        log_weight = self.call.log_weight(self.component)
        # Trace_ELBO multiplies the score of the component by the model's part of the integrand alone.
        return ScoreParts(log_prob, _NONE, log_q + log_q.detach() * (log_weight - log_weight.detach()))

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "LatentGivenComponent":
        new: LatentGivenComponent = self._get_checked_instance(LatentGivenComponent, _instance)
        new.call, new.component = self.call, self.component
        super(LatentGivenComponent, new).__init__(Size(batch_shape), self.event_shape, validate_args=False)
        return new
