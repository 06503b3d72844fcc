"""AutoFlowMixture: a mixture of flows over all continuous latents of an unmodified Pyro model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import pyro
import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn

from .._checks import check_positive, check_positive_int
from .._compile.log_density import ValueAndGrad, traced
from .._program.log_density import UnconstrainedModel
from .._types import AffineKind, InitFn, Program
from ..distributions import MixtureOfFlows
from ..distributions.mixture_of_flows import pick_component
from ..flows import check_layer_flow
from ..init import PRIOR_DRAWS, Effort, Gaussian, find_modes
from ..transforms import Compose, Stacked
from ..transforms.compose import Chain
from ._affine import set_affine
from ._component_search import AUTO, ComponentSearch
from ._mixture_sites import (
    ComponentCall,
    ComponentIndex,
    LatentGivenComponent,
    NotSummedOut,
    refuse_objectives,
)
from ._mode_masses import ModeMasses, masses_of
from ._protocol import FitOptions
from ._summaries import QUANTILE_DRAWS, QUANTILE_ELEMENTS, reference_normal, sample_quantiles
from .flow import AutoFlow
from .named import sized_flow

__all__ = ["AutoFlowMixture", "WeightedStack"]

LEAST_PARTICLES = 32
"""Draws a step of each component, where all together are as many as another guide has."""
ENUMERATIONS = ("auto", "parallel", "sequential")
_NO_PLACE = "affine: expected an affine map, by which a component has its place, got None"


class WeightedStack(Compose):
    """K transforms in one, and the logarithms of their weights up to a constant.

    :param parts: transforms with the batch shape ``(K,)``.
    :param dim: the length of the vectors.
    :param logits: shape ``(K,)``.

    Example::

        >>> parts = [Stacked(pyro_flowvi.FLOWS["planar"](2) for _ in range(3))]
        >>> WeightedStack(parts, 2, torch.nn.Parameter(torch.zeros(3))).batch_shape
        torch.Size([3])
    """

    def __init__(self, parts: Sequence[Any], dim: int, logits: nn.Parameter) -> None:
        super().__init__(parts, dim)
        self.logits = logits


class AutoFlowMixture(ComponentSearch):
    r"""A mixture of K flows over all continuous latents, for posteriors with several modes.

    Of the four mixtures of flows this is the guide, over the latents of a model;
    :class:`~pyro_flowvi.VMoNF` is a Pyro model of rows of data, :class:`~pyro_flowvi.models.FlowMixture` the
    scikit-learn estimator that trains one, and :class:`~pyro_flowvi.distributions.MixtureOfFlows` the
    distribution that all are made of.

    :math:`q(z) = \sum_k w_k q_k(z)`, where each component is a flow of a standard normal and then a trainable
    affine map of its own.  The component is a discrete site of the guide, which ``TraceEnum_ELBO`` sums out:
    the bound is exact in the weights, at K times the model's cost a step.  ``fit`` takes it, with the path
    gradient of :class:`pyro_flowvi.infer.TraceEnumSTL_ELBO`.  A value is scored by the whole mixture.

    ``fit`` starts with a component at each mode that it finds; for stock ``SVI`` :meth:`find_modes` does so.
    Otherwise the components start apart by ``init_spread``, and may all end at the same mode.

    With ``num_components="auto"`` the search goes on until three rounds of runs from new starting points, or
    eight where there are several modes, bring no new one.  Modes with a path between them on which the
    density falls by less than a factor of e, or whose Gaussians share mass, are one; what has less than .5 %
    of the mass is left out, and all but the heaviest 32; above 200 latents one component is all.
    ``num_components`` is the number from set-up on.  ``fit`` searches anew in its data, unless ``init``
    gives a guide to go on from, and ``modes`` of its result says what the guide has in the end.  A state that
    is loaded brings its own number.

    Under ``Trace_ELBO`` and ``RenyiELBO`` (from two particles on) the component is drawn, and gradients are
    unbiased, but noisier.  Others whose gradient would be wrong are refused by name: ``TraceGraph_ELBO``,
    ``TraceMeanField_ELBO``, ``TraceTailAdaptive_ELBO``, :class:`pyro_flowvi.infer.TraceSTL_ELBO` and what is
    made of them; and all of ``torch.jit``, such as ``JitTrace_ELBO``.

    :param model: a Pyro model.
    :param num_components: the number K of components, or "auto" for one at each mode that a search finds:
        see below.
    :param flow: a key of :data:`pyro_flowvi.FLOWS`, or a callable from the number of latents to a module that
        is a transform.
    :param num_layers: layers of a named flow; by default of :data:`pyro_flowvi.flows.DEFAULTS`.
    :param hidden: widths of the hidden layers of a named flow's networks; by default of the same table.
    :param enumerate: "parallel" runs the model once for all components, which gives it values with one more
        dimension at the left; "sequential" once for each; "auto" tests at set-up whether the model gives the
        former the densities that it gives single values.
    :param init_spread: standard deviation, in unconstrained units, of where the components but the first
        start, around ``init_loc_fn``.
    :param name: as of :class:`AutoFlow`, as are the other keywords; ``affine`` None leaves nothing to start
        apart.
    :raises ValueError: if an argument is not of the described kind, or ``affine`` is None with "auto".
    :raises ValueError: at a call under an objective that is refused.
    :raises NotImplementedError: at a call under ``TraceGraph_ELBO``.

    Reference: Pires and Figueiredo, *Variational Mixture of Normalizing Flows*, 2020, and for the bound
    Morningstar, Vikram, Ham, Gallagher and Dillon, *Automatic Differentiation Variational Inference with
    Mixtures*, 2021.

    Example::

        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 3.0))
        ...     pyro.sample("y", dist.Normal(x.abs(), 0.5), obs=torch.tensor(4.0))
        >>> guide = AutoFlowMixture(model, num_components=2).materialize().find_modes()
        >>> guide.weights.tolist(), guide.sample_posterior(100)["x"].sign().sum().abs() < 2
        ([0.5, 0.5], tensor(True))

    The number of components left to the search::

        >>> guide = AutoFlowMixture(model, num_components="auto").materialize()
        >>> guide.num_components
        2
    """

    serves_rows: ClassVar[bool] = False

    def __init__(
        self,
        model: Program,
        num_components: int | Literal["auto"] = 4,
        flow: str | Callable[[int], nn.Module] = "realnvp",
        num_layers: int | None = None,
        hidden: Sequence[int] | None = None,
        *,
        enumerate: Literal["auto", "parallel", "sequential"] = "auto",
        init_spread: float = 1.0,
        name: str | None = None,
        init_loc_fn: InitFn = init_to_median,
        init_scale: float = 0.1,
        affine: AffineKind | None = "auto",
        tails: bool = False,
    ) -> None:
        check_layer_flow(flow, hidden)
        if enumerate not in ENUMERATIONS:
            raise ValueError(f"enumerate: expected one of {list(ENUMERATIONS)}, got {enumerate!r}")
        if not isinstance(flow, str) and num_layers is not None:
            raise ValueError(f"num_layers: expected None with a callable flow, got {num_layers}")
        build = sized_flow(flow, num_layers, hidden) if isinstance(flow, str) else flow
        if isinstance(num_components, str):
            if num_components != AUTO:
                raise ValueError(
                    f'num_components: expected a positive integer or "auto", got {num_components!r}'
                )
            if affine is None:
                raise ValueError(_NO_PLACE)
        else:
            num_components = check_positive_int("num_components", num_components)
        init_spread = float(init_spread) and check_positive("init_spread", init_spread)
        super().__init__(
            model,
            build,
            name=name,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
            affine=affine,
            tails=tails,
            structure=None,
        )
        self._look_for(num_components)
        self._init_spread = init_spread
        self._enumerate = enumerate
        self._counter = [0]

    # -- set-up --------------------------------------------------------------------------------

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        if self._enumerate == "auto":
            with torch.random.fork_rng(), self._apart():
                batched = self.density(*args, **kwargs).batched
            self._enumerate = "parallel" if batched else "sequential"

    def _parts(self, layer: Any) -> list[Any]:
        each = [super(AutoFlowMixture, self)._parts(layer) for _ in range(self.num_components)]
        parts = [Stacked(column, self.latent_dim) for column in zip(*each, strict=True)]
        if not all(part.exact_inverse for part in parts):
            raise ValueError(
                "flow: expected a transform with an exact inverse, by which every component scores the "
                f"others' draws, got {parts[0].each!r}"
            )
        return parts

    def _compose(self, parts: list[Any]) -> Chain:
        logits = nn.Parameter(torch.zeros(self.num_components), requires_grad=self.num_components > 1)
        return WeightedStack(parts, self.latent_dim, logits)

    def _start_at(self, affine: Any, loc: Tensor) -> None:
        spread = self._init_spread * torch.randn(self.num_components, len(loc)).to(loc)
        spread[0] = 0.0
        affine.each.loc.data.copy_(loc + spread)

    def find_modes(self, *args: Any, **kwargs: Any) -> Self:
        """Searches for the posterior's modes and starts a component at each; returns the guide.

        The heaviest modes get a component each, and weights by their masses; components that are left over
        double these.  With ``num_components="auto"`` all modes that are found get one, so that parameters
        may be new: to be called before there is an optimizer.  ``fit`` does so by itself.

        :param args: the model's arguments, as the keyword ones; by default those of :meth:`materialize`.
        :raises RuntimeError: if the guide does not know its data.
        :raises ValueError: if it has no trainable affine maps.
        """
        if args or kwargs or self._data is None:
            self.materialize(*args, **kwargs)
        if self.affine is None:
            raise ValueError(_NO_PLACE)
        args, kwargs = self._data or ((), {})
        with self._apart():
            density = self.density(*args, **kwargs)
            if self._auto:
                self._adopt(self._find_all(density))
                self._place_found()
                return self
            value_and_grad = traced(density, 2 * Effort().starts)
            effort = Effort() if value_and_grad.batched else Effort.small()
            self._place_at_modes(density, value_and_grad, effort)
        return self

    def _place_at_modes(
        self, density: UnconstrainedModel, value_and_grad: ValueAndGrad, effort: Effort
    ) -> Gaussian:
        modes, self._modes = self._modes, None
        if modes is None:
            prior = density.prior_draws(PRIOR_DRAWS)
            modes = find_modes(value_and_grad, density.start, self.num_components, effort, prior)
        self.place(modes.gaussian.loc, modes.gaussian.scale, modes.weights)
        return modes.gaussian

    def _search(self, density: UnconstrainedModel, effort: Effort) -> tuple[str, Tensor, Tensor]:
        value_and_grad = traced(density, 2 * effort.starts)  # from the prior's draws and wide ones as well
        found = self._place_at_modes(density, value_and_grad, effort)
        return found.kinds[0], found.loc, found.scale

    def fit_options(self) -> FitOptions:
        """Every component has a share of the particles of one flow, but not too small a one."""
        options = replace(super().fit_options(), num_components=self.num_components)
        if self.flow_name is None:
            return options
        share = max(LEAST_PARTICLES, options.num_particles // self.num_components)
        return replace(options, num_particles=share)

    def masses(self, density: UnconstrainedModel | None) -> ModeMasses:
        """Of the modes that the components are at."""
        return masses_of(self, density)

    def trained_map(self, model: Program) -> Chain | None:
        """The flows and their weights, for the guide's own model and with its methods as they are here."""
        own = type(self)
        as_written = (
            own.forward is AutoFlow.forward
            and own.sample_latent is AutoFlowMixture.sample_latent
            and own.get_posterior is AutoFlowMixture.get_posterior
        )
        return self._flow if as_written and self._raw_model[0] == model else None

    def place_at(self, loc: Tensor, scale: Tensor) -> None:
        """Where one Gaussian is says nothing of the components."""
        raise ValueError(
            f"init: expected a guide with the flow, components and latents of {self.name}, for a mixture"
        )

    @torch.no_grad()
    def place(self, loc: Tensor, scale: Tensor, weights: Tensor) -> None:
        """Moves the components to Gaussians, as far as their flows are the identity.

        :param loc: shape ``(K, D)``.
        :param scale: lower factors of the covariances, ``(K, D, D)``, or standard deviations ``(K, D)``.
        :param weights: shape ``(K,)``.
        :raises ValueError: if a shape is another, or the guide has no affine maps.
        """
        flow: Any = self._flow
        shape = self.num_components, self.latent_dim
        if self.affine is None:
            raise ValueError(_NO_PLACE)
        if loc.shape != shape:
            raise ValueError(f"loc: expected shape {shape}, got {tuple(loc.shape)}")
        if scale.shape not in (shape, (*shape, self.latent_dim)):
            raise ValueError(f"scale: expected shape {(*shape, self.latent_dim)}, got {tuple(scale.shape)}")
        if weights.shape != shape[:1]:
            raise ValueError(f"weights: expected shape {shape[:1]}, got {tuple(weights.shape)}")
        set_affine(self.affine, loc.to(flow.logits), scale.to(flow.logits))
        flow.logits.copy_(weights.log())

    # -- posterior -----------------------------------------------------------------------------

    @property
    def affine(self) -> Any:
        """The trainable affine maps, with ``loc`` and ``log_scale`` of shape ``(K, D)``; None without one."""
        stacked = super().affine
        return None if stacked is None else stacked.each

    @property
    def weights(self) -> Tensor:
        """The weights of the components, shape ``(K,)``."""
        flow: Any = self._flow
        weights: Tensor = flow.logits.detach().softmax(-1)
        return weights

    def get_transform(self, *args: Any, **kwargs: Any) -> Chain:
        """There is none.

        :raises NotImplementedError: always: what takes a standard normal to the latents is no function.
        """
        raise NotImplementedError(
            f"{self.name}: a mixture of flows is no bijection of the latents, since its component is random, "
            "so that NeuTraReparam cannot use it; take AutoRealNVP or another flow guide"
        )

    def get_posterior(self, *args: Any, **kwargs: Any) -> MixtureOfFlows:
        """The distribution over the packed unconstrained latents; scores any value."""
        flow: Any = self._flow
        return MixtureOfFlows(None, flow, flow.logits, validate_args=False)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draws the component and, given it, the packed unconstrained latents, as auxiliary sites."""
        refuse_objectives(self.name)
        call = ComponentCall(self.get_posterior(), self._counter, self._call_dtype())
        kind = self._enumerate if call.enumerates else NotSummedOut(self._enumerate)
        infer: Any = {"enumerate": kind, "is_auxiliary": True, "marginal": True}
        name = f"_{self._pyro_name}_component"
        component: Tensor = pyro.sample(name, ComponentIndex.of(call), infer=infer)
        given = LatentGivenComponent(call, component)
        latent: Tensor = pyro.sample(f"_{self._pyro_name}_latent", given, infer={"is_auxiliary": True})
        return latent

    # -- summaries -----------------------------------------------------------------------------

    def _quantile(self, probs: Tensor) -> dict[str, Tensor]:
        flow, weights = self._flow, self.weights
        points = reference_normal(QUANTILE_DRAWS, self.latent_dim + 1)
        share = torch.special.ndtr(points[:, 0]).to(weights)
        component = torch.searchsorted(weights.cumsum(0)[:-1].contiguous(), share, right=True)
        # In parts: a spline has 23 parameters for each latent of each point.
        rows = max(1, QUANTILE_ELEMENTS // (self.latent_dim * self.num_components))
        latent = torch.cat(
            [
                pick_component(flow(x.unsqueeze(-2)), k)
                for x, k in zip(points[:, 1:].to(weights).split(rows), component.split(rows), strict=True)
            ]
        )
        return sample_quantiles(self._split_points(latent), probs.to(weights), self._bijection)
