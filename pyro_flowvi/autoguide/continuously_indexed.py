"""AutoCIF: a continuously-indexed flow over all continuous latents of an unmodified Pyro model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import pyro
import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn

from .._checks import check_count, check_positive, check_positive_int, check_widths
from .._types import AffineKind, InitFn, Program, StructureKind
from ..distributions import FlowDistribution, IndexedFlow
from ..distributions.flow import Shape, standard_normal_log_prob
from ..distributions.indexed_flow import NUM_INDEX_SAMPLES, tightened
from ..flows import check_layer_flow, indexed_layers
from ..transforms import IndexedCompose
from ..transforms.compose import Chain
from ..transforms.indexed import HIDDEN, INDEX_SCALE, ORDERS
from ._latent_site import CallPosterior
from ._protocol import FitOptions
from .flow import AutoFlow

__all__ = ["AutoCIF", "IndexedCallPosterior"]

PARTICLES, FEW_LATENTS = 256, 32
"""Draws a step with few latents.  On nine modes a fit ended at an ELBO of -.13 with 64, another at -.03 with
256."""


class IndexedCallPosterior(CallPosterior):
    """Latent and standardised indices of one guide call, scored by the log ratio log q(w, u) / r(u | z).

    Of the indices the value has what r would have to explain: that ratio is a function of the value, exact
    for any, and for q and r the log density of an ordinary flow less that of a standard normal.

    Example::

        >>> from pyro_flowvi.transforms import IndexedLayer, Planar
        >>> site = IndexedCallPosterior(IndexedCompose([IndexedLayer(Planar(2))]), num_extra=0)
        >>> value = site.rsample()
        >>> value.shape, torch.allclose(site.log_prob(value), site.log_prob(value.clone()), atol=1e-5)
        (torch.Size([3]), True)
    """

    indexed: ClassVar[bool] = True

    def __init__(self, transform: Chain, *, num_extra: int) -> None:
        super().__init__(None, transform)
        self.num_extra = num_extra

    @property
    def _inner_dim(self) -> int:
        flow: Any = self.transform
        return flow.inner_dim  # type: ignore[no-any-return]

    def drawn_score(self, value: Tensor) -> Tensor | None:
        score = None if self.num_extra else super().drawn_score(value)
        if score is None:
            return None
        noise = value.detach()[..., self._inner_dim :]
        return torch.cat([score[..., : self._inner_dim], score[..., self._inner_dim :] + noise], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        dim = self._inner_dim
        own = super().log_prob(value) - standard_normal_log_prob(value[..., dim:])
        latent = value[..., :dim].to(self._like()[0])
        return tightened(FlowDistribution(None, self.transform), dim, latent, own, self.num_extra)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "IndexedCallPosterior":
        new = self._get_checked_instance(IndexedCallPosterior, _instance)
        new.num_extra = self.num_extra
        super().expand(batch_shape, new)
        return new  # type: ignore[no-any-return]


class AutoCIF(AutoFlow):
    r"""A continuously-indexed flow over all continuous latents, for posteriors that a bijection cannot reach.

    Every layer of the flow is moved by an index of its own, :math:`G(w; u) = e^{s(u)} \odot g(w) + t(u)`, so
    that the guide is a continuum of flows, of which each may go to another mode.  Its density is bounded, not
    known: the ELBO that is trained is that of the extended space of latents and indices, a lower bound on
    the usual one (Caterini, Cornish, Sejdinovic and Doucet 2020).  Exact under ``Trace_ELBO``,
    ``TraceEnum_ELBO``, ``TraceGraph_ELBO``, ``RenyiELBO`` and this package's objectives, path gradients
    included.  :meth:`log_prob` is an estimate, on average from below; importance weights, k-hat and
    effective sample size are those of the extended space.

    :param model: a Pyro model.
    :param flow: a key of :data:`pyro_flowvi.FLOWS`, or a callable from the number of latents to the
        transform of one layer.
    :param num_layers: the number of layers.
    :param index_dim: the length of each layer's index.
    :param hidden: widths of the hidden layers of a named flow's networks; by default of
        :data:`pyro_flowvi.flows.DEFAULTS`.
    :param index_hidden: widths of the hidden layers of the networks of the indices.
    :param order: "after" or "before", as in :class:`pyro_flowvi.transforms.IndexedLayer`.
    :param index_scale: how far the indices move the latents at first, as in
        :class:`pyro_flowvi.transforms.IndexedLayer`; with 0 the guide starts as the flow without indices, a
        saddle that is left slowly if at all.
    :param num_extra: index draws beside its own in the bound of each draw.  0 is the auxiliary ELBO, more are
        the importance-weighted auxiliary ELBO of that many and one: tighter, at the cost of an inverse each.
    :param num_index_samples: index draws for each value that :meth:`log_prob` scores.
    :param name: as of :class:`AutoFlow`, as are the other keywords.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x.abs(), 0.1))
        >>> guide = AutoCIF(model, num_layers=2, hidden=(8,)).materialize()
        >>> guide.log_prob(guide.sample_posterior(7)).shape
        torch.Size([7])
    """

    lower_bound: ClassVar[bool] = True
    covers_modes: ClassVar[bool] = True

    serves_rows: ClassVar[bool] = False

    def __init__(
        self,
        model: Program,
        flow: str | Callable[[int], nn.Module] = "neural_spline_ar",
        num_layers: int = 5,
        index_dim: int = 1,
        hidden: Sequence[int] | None = None,
        index_hidden: Sequence[int] = HIDDEN,
        *,
        order: Literal["after", "before"] = "after",
        index_scale: float = INDEX_SCALE,
        num_extra: int = 0,
        num_index_samples: int = NUM_INDEX_SAMPLES,
        name: str | None = None,
        init_loc_fn: InitFn = init_to_median,
        init_scale: float = 0.1,
        affine: AffineKind | None = "auto",
        tails: bool = False,
        structure: StructureKind = "auto",
    ) -> None:
        check_layer_flow(flow, hidden)
        if order not in ORDERS:
            raise ValueError(f"order: expected one of {list(ORDERS)}, got {order!r}")
        extra = check_count("num_extra", num_extra)
        samples = check_positive_int("num_index_samples", num_index_samples)
        build = partial(
            indexed_layers,
            flow,
            num_layers=check_positive_int("num_layers", num_layers),
            hidden=None if hidden is None else check_widths("hidden", hidden),
            index_dim=check_positive_int("index_dim", index_dim),
            index_hidden=check_widths("index_hidden", index_hidden),
            order=order,
            index_scale=float(index_scale) and check_positive("index_scale", index_scale),
        )
        super().__init__(
            model,
            build,
            name=name,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
            affine=affine,
            tails=tails,
            structure=structure,
        )
        self.num_extra, self.num_index_samples = extra, samples
        self.flow_name = flow if isinstance(flow, str) else None

    def _layers(self) -> list[Any]:
        build: Any = self._build
        return list(build(self.latent_dim))

    def _compose(self, parts: list[Any]) -> Chain:
        return IndexedCompose(parts, self.latent_dim)

    def fit_options(self) -> FitOptions:
        """As of :class:`AutoFlow`."""
        options = super().fit_options()
        if self._map is None and self.latent_dim <= FEW_LATENTS:
            options = replace(options, num_particles=max(options.num_particles, PARTICLES))
        return replace(options, settings={**options.settings, "num_extra": self.num_extra})

    def trained_map(self, model: Program) -> Chain | None:
        """The flow over latents and noise of the indices; None with further index draws."""
        own = type(self)
        as_written = own.forward is AutoFlow.forward and own.sample_latent is AutoCIF.sample_latent
        flow = self._flow if as_written and not self.num_extra and self._raw_model[0] == model else None
        return flow

    def get_transform(self, *args: Any, **kwargs: Any) -> Chain:
        """There is none.

        :raises NotImplementedError: always: what takes a standard normal to the latents is no function.
        """
        raise NotImplementedError(
            f"{self.name}: a continuously-indexed flow is no bijection of the latents, since its indices are "
            "random, so that NeuTraReparam cannot use it; take AutoNeuralSpline or another flow guide"
        )

    def get_posterior(self, *args: Any, **kwargs: Any) -> IndexedFlow:
        """The distribution over the packed unconstrained latents; scores any value by an estimate."""
        flow: Any = self._flow
        return IndexedFlow(None, flow, num_index_samples=self.num_index_samples, num_extra=self.num_extra)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draws the packed unconstrained latents, as an auxiliary site together with their indices."""
        posterior = IndexedCallPosterior(self._flow, num_extra=self.num_extra)
        posterior.dtype = self._call_dtype()
        extended: Tensor = pyro.sample(f"_{self._pyro_name}_latent", posterior, infer={"is_auxiliary": True})
        return extended[..., : self.latent_dim]
