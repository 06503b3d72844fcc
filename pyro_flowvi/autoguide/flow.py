"""AutoFlow: a normalizing flow over all continuous latents of an unmodified Pyro model."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn
from torch.distributions import Transform

from .._checks import check_dtype, check_positive
from .._program.param_store import check_name
from .._program.pyro_private import is_module_local_param_enabled
from .._shapes import sample_shape
from .._types import AffineKind, InitFn, Program, StructureKind
from ..distributions import FlowDistribution, IndexedFlow, MixtureOfFlows
from ..distributions.flow import Shape
from ..flows import FLOWS, recipe_name
from ..transforms import Compose, HeavyTails
from ..transforms.compose import Chain
from ._affine import affine_layer
from ._arguments import check_arguments
from ._exporting import ExportingGuide
from ._latent_site import CallPosterior
from ._message_map import MessageMap
from ._on_roots import OnRoots
from ._root_tails import RootTails
from ._summaries import marginal_quantiles, reference_normal
from .resample import importance_resample

__all__ = ["AutoFlow"]


class AutoFlow(ExportingGuide):
    """A guide whose posterior is a normalizing flow over all continuous latents of the model.

    Posterior = flow(standard normal) followed by a trainable affine map that starts from
    ``init_loc_fn`` and ``init_scale``, so that the flow works at unit scale wherever the posterior is.
    A drop-in for Pyro's autoguides: constrained supports, plates, flat priors (``ImproperUniform``)
    and latent mixtures included.  Discrete sites that the model enumerates are left to it.

    :param model: a Pyro model.
    :param flow: a key of :data:`pyro_flowvi.FLOWS`, or a callable from the number of latents to a
        transform of vectors, Pyro's own included.
    :param name: prefix of the guide's parameters in the param store; by default the class name, with
        _1, _2, ... while another live guide holds it.  A guide adopts the values of a restored store; one
        that is given a name also adopts what an earlier guide of that name, no longer alive, left there.
        From one that lives (or a model that has the name), as where a notebook's cell is run again, it takes
        the name over and starts afresh: what that one wrote leaves the store, a call of it raises, and its
        draws, densities and ``state_dict`` remain its own.
    :param init_loc_fn: a per-site function of ``pyro.infer.autoguide.initialization``.
    :param init_scale: standard deviation, in unconstrained units, to start from.
    :param affine: "lower" (location and Cholesky factor), "low_rank" (diagonal and low rank),
        "elementwise", None for no affine map, or "auto": "lower" up to 200 latents, "low_rank" above.
    :param tails: adds a trainable tail index for each latent (:class:`pyro_flowvi.transforms.HeavyTails`)
        before the affine map, for posteriors with tails heavier than a Gaussian's.
    :param structure: "auto" draws latents by the model's own priors where these depend on other latents, and
        ``fit`` may go back to a flow over one flat vector; "program" always does so; None never.
        :attr:`structure` says what was found and taken.
    :param amortize: a network that reads the latents of each row of a plate off the row's data: an
        ``nn.Module`` that takes the observed values of B rows, a tensor ``(B, *)`` for each observed site,
        to ``(B, H)``, or "auto" for one of two layers.  Where the plate is subsampled by indices, each row
        has a correction of its own beside it.
    :param create_plates: as of Pyro's autoguides: from the model's arguments to a plate, or several, in which
        the guide draws; those that it does not return are made as usual.
    :raises ValueError: if an argument is not of the described kind; at set-up, naming the site, for a
        model that continuous variational inference cannot serve.
    :raises RuntimeError: at a call of a guide whose name another has taken over.

    Parameters exist after :meth:`materialize` or the first call.  From then on a call answers with the
    latents of that set-up, whatever its arguments: none, new rows for ``Predictive``, a longer horizon of a
    forecast.  New rows that have latents of their own take those from the model, with
    ``Predictive(model, posterior_samples=globals)`` and ``globals`` what they share with the old ones.

    Elements of latents that the model masks out and nothing else sees (padding, what ``obs_mask`` says is
    observed) are left out of the flow: they are drawn from a standard normal whose density counts nowhere, so
    that the ELBO is that of the model without them.  The model's masks are read at every call.

    Reference: Rezende and Mohamed, *Variational Inference with Normalizing Flows*, 2015.

    Example::

        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).to_event(1), obs=y)
        >>> y = torch.tensor([9.0, 10.0, 11.0])
        >>> guide = AutoFlow(model, "planar_radial").materialize(y)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        >>> loss = svi.step(y)
        >>> guide.sample_posterior(100)["mu"].shape
        torch.Size([100])
    """

    lower_bound: ClassVar[bool] = False
    """Whether :meth:`log_prob` is an estimate from below."""

    def __init__(
        self,
        model: Program,
        flow: str | Callable[[int], Any],
        *,
        name: str | None = None,
        init_loc_fn: InitFn = init_to_median,
        init_scale: float = 0.1,
        affine: AffineKind | None = "auto",
        tails: bool = False,
        structure: StructureKind = "auto",
        amortize: nn.Module | str | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        check_arguments(model, flow, name, affine, tails, structure, amortize, create_plates)
        init_scale = check_positive("init_scale", init_scale)
        # Takes the name over, so after all checks.
        super().__init__(model, init_loc_fn, name, structure, amortize)
        self.create_plates = create_plates
        self._build = flow
        self._init_scale = init_scale
        self._affine = affine
        self._tails = tails
        self.flow_name = flow if isinstance(flow, str) else recipe_name(flow)

    # -- set-up --------------------------------------------------------------------------------

    def _layers(self) -> list[Any]:
        """The flow's parts, first one first."""
        build = FLOWS[self._build] if isinstance(self._build, str) else self._build
        transform = build(self._flow_dim)
        if not isinstance(transform, Transform):
            raise ValueError(f"flow: expected it to return a Transform, got {transform!r}")
        return [transform]

    def _parts(self, layer: MessageMap | None) -> list[Any]:
        """All parts of the guide's transform but a message map, the affine map last if there is one."""
        parts = self._layers()
        if self._tails:
            parts.append(HeavyTails(self._flow_dim))
        elif layer is not None and len(roots := layer.plan.root_places()):
            # Near zero the prior alone holds the logarithm of a scale: its tail falls no faster than exp(u).
            tails = RootTails(len(roots))
            parts.append(tails if len(roots) == self._flow_dim else OnRoots(tails, roots, self._flow_dim))
        if self._affine is not None:
            parts.append(affine_layer(self._affine, self._flow_dim, self._init_scale))
        return parts

    def _compose(self, parts: list[Any]) -> Chain:
        return Compose(parts, dim=self.latent_dim)

    def _start_at(self, affine: Any, loc: Tensor) -> None:
        """Puts the affine map where the guide starts."""
        affine.loc.data.copy_(loc)

    def _build_flow(self) -> None:
        if self._structure.taken and self._restored_flat():
            super()._take_flat("as in the state that was restored")
        loc = self._init_loc()
        device, dtype = self._placement
        loc = loc.to(device=device, dtype=dtype).nan_to_num(0.0, 0.0, 0.0)
        check_dtype("dtype of the latents", loc.dtype)
        layer = self._make_map(self._init_scale)
        places = self._flow_places(layer)
        self._flow_dim = self.latent_dim if places is None else len(places)
        parts = self._parts(layer)
        if self._affine is not None:
            self._start_at(parts[-1], self._noise_start(layer, parts[-1], loc))
        if places is not None:
            parts = [OnRoots(part, places, self.latent_dim) for part in parts]
        flow = self._compose(parts if layer is None else [*parts, layer])
        flow = flow.to(device=loc.device, dtype=loc.dtype)
        for param in flow.parameters():
            param.data = param.data.contiguous()
        self._modules["flow"] = flow  # not as an attribute: PyroModule would register it as well
        if self._pending_state:
            state, self._pending_state = self._pending_state, {}
            flow.load_state_dict(state)

    def _noise_start(self, layer: MessageMap | None, affine: Any, loc: Tensor) -> Tensor:
        """Where the affine map starts.  That of a message map's noise starts as the identity."""
        if layer is None:
            return loc
        layer.centre_at(loc)
        roots = layer.plan.root_places()
        if self._flow_dim < self.latent_dim:
            return loc[roots]
        start = torch.zeros_like(loc).index_put((roots,), loc[roots])
        log_scale = affine.log_scale.data
        affine.log_scale.data = torch.zeros_like(log_scale)
        affine.log_scale.data[..., roots] = log_scale[..., roots]
        return start

    def _take_flat(self, why: str) -> None:
        super()._take_flat(why)
        self._build_flow()

    @property
    def _flow(self) -> Chain:
        """The whole transform, in step with the param store."""
        if self.prototype_trace is None:
            raise RuntimeError(
                f"{self.name}: the guide has not seen data yet; call materialize(*args, **kwargs) "
                "with the model's arguments first"
            )
        flow: Any = self._modules["flow"]
        if not is_module_local_param_enabled():
            self._adopt_store(flow)
        whole: Chain = flow
        return whole

    def pushforward(self, model: Program) -> Chain | None:
        """The flow, if the posterior is its image of a standard normal, and the model the guide's own."""
        if self._rows is not None:
            return None
        own = type(self)
        as_written = own.forward is AutoFlow.forward and own.sample_latent is AutoFlow.sample_latent
        posterior = self.get_posterior()
        plain = type(posterior) is FlowDistribution and posterior.base is None
        flow: Chain | None = self._flow if as_written and plain and self._raw_model[0] == model else None
        return flow

    def trained_map(self, model: Program) -> Chain | None:
        """What steps outside Pyro train: :meth:`pushforward`."""
        return self.pushforward(model)

    # -- posterior -----------------------------------------------------------------------------

    @property
    def affine(self) -> Any:
        """The trainable affine map after the flow, with ``loc`` and ``log_scale``; None without one."""
        if self._affine is None or not self.latent_dim:
            return None
        layer = self._flow[-1 if self._map is None else -2]
        return layer.inner if isinstance(layer, OnRoots) else layer

    def get_base_dist(self) -> Any:
        """The standard normal over the latents."""
        like = next(self._flow.parameters(), torch.zeros(()))
        return dist.Normal(like.new_zeros(self.latent_dim), 1.0).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Chain:
        """The flow with the affine map: from the standard normal to the unconstrained latents."""
        return self._flow

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution | IndexedFlow | MixtureOfFlows:
        """The distribution over the packed unconstrained latents; scores any value."""
        return FlowDistribution(None, self._flow, dim=self.latent_dim)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draws the packed unconstrained latents as an auxiliary site; of rows those that all share."""
        if not self.latent_dim:  # all latents are those of rows: the site tells the shape of a draw
            nothing = dist.Normal(torch.zeros(1), 1.0).to_event(1).mask(False)
            return pyro.sample(f"_{self._pyro_name}_latent", nothing, infer={"is_auxiliary": True})
        posterior = CallPosterior(None, self._flow, dim=self.latent_dim)
        posterior.dtype = self._call_dtype()
        latent: Tensor = pyro.sample(f"_{self._pyro_name}_latent", posterior, infer={"is_auxiliary": True})
        return latent

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws every latent site, in the model's plates.

        :param args: the model's arguments.  The first call sets the guide up with them; later ones may leave
            them out, or give others: a guide answers with the latents that it was set up for.
        :param kwargs: the model's keyword arguments.
        :raises ValueError: at set-up as the class says; later if an element that the model had masked out
            at set-up no longer is.
        :raises RuntimeError: if another guide or model has taken over the name.
        """
        check_name(self, self.name)
        self._ready(args, kwargs)
        self._announce_params()
        if self._rows is not None:
            return self._rows.call(self, args, kwargs)
        packing = self._packing
        latent = packing.complete(self.sample_latent(*args, **kwargs), self._sample_left_out)
        plates, drawn = self._create_plates(*args, **kwargs), {}
        for site, free in self._site_values(latent):
            name = site["name"]
            value, log_det = packing.latents[name].constrain(free)
            log_density = 0.0 if poutine.get_mask() is False else -log_det
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[name]:
                    stack.enter_context(plates[frame.name])
                delta = dist.Delta(value, log_density=log_density, event_dim=site["fn"].event_dim)
                drawn[name] = pyro.sample(name, delta)
        return drawn

    def _sample_left_out(self, shape: tuple[int, ...]) -> Tensor:
        """Draws what no density touches, as an auxiliary site without a density of its own."""
        like = next(self._flow.parameters(), torch.zeros(()))
        noise = dist.Normal(like.new_zeros(shape[-1]), 1.0).to_event(1).mask(False)
        site = f"_{self._pyro_name}_left_out"
        rest: Tensor = pyro.sample(site, noise, infer={"is_auxiliary": True})
        return rest

    @torch.no_grad()
    def sample_posterior(
        self,
        num_samples: int | Shape = (),
        resample: bool = False,
        *,
        sites: Sequence[str] | None = None,
        rows: Any = None,
    ) -> dict[str, Tensor]:
        """Independent draws of every latent site, in its constrained space.

        :param num_samples: number of draws, or a sample shape.
        :param resample: whether to correct the draws by Pareto-smoothed importance weights, with the model
            and the data that the guide was last materialized or fitted with: four times as many draws are
            scored, and of them these are kept, some more than once.
        :param sites: names of the sites that are wanted; None for all.
        :param rows: indices of rows of a subsampled plate, in whose latents the draws are to be; None for
            all.  They are drawn in pages as long as the model's, so that a few rows of many cost little.
        :return: site name -> tensor of shape ``sample shape + site shape``, of a site under a subsampled
            plate with as many rows as there are, or as are wanted.
        :raises RuntimeError: with ``resample``, if the guide does not know all of its data.
        :raises ValueError: for unknown sites or rows, or for rows where no plate is subsampled.
        """
        shape = sample_shape(num_samples)
        if self._rows is not None:
            if resample:
                self._density_of_all()  # raises
            return self._rows.sample(self, shape, sites, rows)
        self._refuse_rows(rows)
        if resample:
            density = self._density_of_all()
            draw: Any = super().draw_latent
            flow = self.pushforward(self._require_model())
            latent = importance_resample(draw, density, math.prod(shape), flow)
            latent = latent.reshape(*shape, self.latent_dim)
        else:
            latent = self.get_posterior().sample(shape)
        drawn = self._packing.constrain(latent)
        return {site: drawn[site] for site in self._chosen(sites)}

    def log_prob(self, samples: Mapping[str, Tensor]) -> Tensor:
        """Log density of values of all latent sites, in their constrained space.

        :param samples: site name -> tensor of shape ``S + site shape``, as of :meth:`sample_posterior`.
        :return: shape ``S``; -inf outside the support.
        :raises ValueError: if a site is missing, unknown, of another shape, or NaN.
        """
        if self._rows is not None:
            return self._rows.log_prob(self, samples)
        like = next(self._flow.parameters(), torch.zeros(()))
        latent, log_det, inside = self._packing.pack(samples, like)
        log_prob = self.get_posterior().log_prob(latent) - log_det
        return torch.where(inside, log_prob, -torch.inf)

    # -- summaries -----------------------------------------------------------------------------

    def _quantile(self, probs: Tensor) -> dict[str, Tensor]:
        if self._rows is not None:
            return self._rows.quantile(self, probs)

        def split(latent: Tensor) -> dict[str, Tensor]:
            return self._split_points(latent[..., : self.latent_dim])

        return marginal_quantiles(self._flow, probs, split, self._bijection)

    def _split_points(self, latent: Tensor) -> dict[str, Tensor]:
        """Unconstrained values by site of many points; what is left out is the same at every call."""
        rest = reference_normal(len(latent), self._packing.num_left_out) if self._packing.left_out else latent
        return self._packing.split(latent, rest)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The marginal posterior median of every site; the model's arguments set the guide up if need be.

        Of vector supports such as the simplex: the image of the median in the unconstrained space.
        """
        if self.prototype_trace is None and (args or kwargs):
            self.materialize(*args, **kwargs)
        return self._quantile(torch.tensor(0.5))

    @torch.no_grad()
    def quantiles(self, quantiles: list[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal posterior quantiles of every site.

        :param quantiles: probabilities, n of them.
        :return: site name -> tensor of shape ``(n,) + site shape``.
        :raises ValueError: if a probability is outside [0, 1].
        """
        if self.prototype_trace is None and (args or kwargs):
            self.materialize(*args, **kwargs)
        probs = torch.as_tensor(quantiles, dtype=torch.float64)
        if bool(((probs < 0) | (probs > 1)).any()):
            raise ValueError(f"quantiles: expected probabilities in [0, 1], got {quantiles}")
        return self._quantile(probs)
