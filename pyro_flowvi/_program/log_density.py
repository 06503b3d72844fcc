"""The model as a density over one packed vector of unconstrained latents, for many vectors at once."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide.initialization import init_to_median
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from .._types import Program, Site, Trace
from .batching import NUM_PROBES, Score, align, batched, in_parts, runs_batched, site_log_probs
from .dtypes import dtype_for_sums
from .enumeration import enumerated_log_weights
from .left_out import check_left_out, find_left_out, uncounted
from .packing import Packing
from .pyro_private import compute_model_factors, get_traces
from .sites import innermost, latent_sites
from .start_trace import prototype
from .structure import ProgramStructure

__all__ = ["REFUSALS", "UnconstrainedModel"]

REFUSALS: Final[tuple[type[Exception], ...]] = (ValueError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
"""What a model raises where it has no density: validation, a matrix that is not positive definite."""
_ROUNDING = 1e4
"""Multiples of eps by which a log density may depend on being one of a batch."""


class UnconstrainedModel:
    """A model as a density over one packed vector of unconstrained latents.

    :param model: a Pyro model.
    :param args: the model's positional arguments.
    :param kwargs: the model's keyword arguments.
    :param init_loc_fn: where each latent site starts.
    :param left_out: by site, the unconstrained numbers that are no part of the vector; by default those that
        no density touches.
    :param changing: tensors that the model reaches whose numbers are replaced in place between calls.
    :raises ValueError: as :func:`prototype`, or if a density touches what is to be left out.

    Example::

        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> density = UnconstrainedModel(model)
        >>> density.dim, density.log_density(torch.zeros(2, 1))
        (1, tensor([-0.9189, -0.9189]))
    """

    def __init__(
        self,
        model: Program,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        init_loc_fn: Callable[[Site], Tensor] = init_to_median,
        left_out: Mapping[str, Tensor] | None = None,
        changing: Sequence[Tensor] = (),
    ) -> None:
        self._model, self._args, self._kwargs = model, args, dict(kwargs or {})
        self.changing: list[Tensor] = list(changing)
        self.weigh: Callable[[str, Tensor], Tensor] | None = None
        """What makes log-determinants of a site count as much as its density, where that has weights."""
        trace = prototype(model, args, kwargs, init_loc_fn)
        sites = dict(latent_sites(trace))
        self.packing: Packing = Packing(sites)
        """The sites' places in the vector."""
        self.stacks: dict[str, tuple[Any, ...]] = {
            name: site["cond_indep_stack"] for name, site in sites.items()
        }
        """The plates that each stands in."""
        structure = ProgramStructure.of(trace)
        self._nesting = structure.max_plate_nesting
        self.largest: int = structure.largest
        """Elements of the largest value of a site, data included."""
        self._enumerated = bool(structure.discrete)
        self._dtype = dtype_for_sums(model, args, self._kwargs, trace) if self._enumerated else None
        self.subsampled: bool = structure.subsampled
        """Whether the model sees a random part of its data; here it is the same part at every call."""
        found = find_left_out(sites, self._log_prob)
        shapes = {name: latent.free_shape for name, latent in self.packing.latents.items()}
        if left_out is None or any(out.shape != shapes.get(name) for name, out in left_out.items()):
            left_out = found  # of other latents, as it is for the guide to say
        else:
            check_left_out(left_out, found)
        if left_out:
            self.packing = Packing(sites, left_out)
        self.dim: int = self.packing.dim
        """The number D of unconstrained coordinates."""
        if not self.dim:
            raise ValueError("model: expected a latent that a density touches, got masked ones only")
        start = self.packing.unconstrain({name: site["value"] for name, site in sites.items()})[0]
        self.start: Tensor = start.nan_to_num(0.0, 0.0, 0.0)
        """The starting point, shape ``(D,)``."""
        self.improper: Tensor = self._improper(sites)
        """Whether the prior of a coordinate is flat, or masked; shape ``(D,)``."""
        self.batched: bool = self._runs_batched()
        """Whether the model scores many points in one run."""
        self.graphs: dict[int, Any] = {}
        """What others have recorded of it, by the number of points."""
        self.search: Callable[[Any], Any] | None = None
        """Finds a Gaussian in place of a search here, where this is one part of the data."""

    def at(
        self,
        model: Program,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        changing: Sequence[Tensor] = (),
    ) -> "UnconstrainedModel":
        """The same latents with other data, of which every call sees the same."""
        other = copy.copy(self)
        other._model, other.changing, other.graphs = model, list(changing), {}
        other.subsampled, other.search = False, None
        if args is not None:
            other._args, other._kwargs = args, dict(kwargs or {})
        return other

    @torch.no_grad()
    def prior_draws(self, num: int) -> Tensor:
        """Draws of the latents as the model makes them, data or not, the same at every call.

        :return: shape ``(num, D)``, or ``(0, D)`` where a site cannot be drawn from.
        """
        rows = []
        with torch.random.fork_rng(), poutine.block(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            try:
                for _ in range(num):
                    trace: Trace = poutine.trace(self._model).get_trace(*self._args, **self._kwargs)
                    values = {name: trace.nodes[name]["value"] for name in self.packing.latents}
                    rows.append(self.packing.unconstrain(values)[0])
            except Exception:  # whatever a program raises at values that it does not expect
                rows = []
        return torch.stack(rows).to(self.start) if rows else self.start.new_zeros(0, self.dim)

    def _improper(self, sites: Mapping[str, Site]) -> Tensor:
        parts = []
        for name, latent in self.packing.latents.items():
            # On the CPU, whatever the default device is, as the mask.
            flat = torch.tensor(isinstance(innermost(latent.fn), dist.ImproperUniform), device="cpu")
            masked = uncounted(sites[name])
            parts.append(
                (flat if masked is None else flat | masked.cpu()).expand(latent.free_shape).reshape(-1)
            )
        return self.packing.keep(torch.cat(parts)).to(self.start.device)

    def log_det_gradient(self, z: Tensor) -> Tensor:
        """The gradient of log |det dx/dz|, of ``z`` ``(P, D)``."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            total = torch.stack([log_det.sum() for _, _, log_det in self._values(z)]).sum()
            return torch.autograd.grad(total, z)[0] if total.requires_grad else torch.zeros_like(z)

    def _values(self, z: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, value with the points at dimension ``-1 - nesting``, terms of log |det J| of each point."""
        for name, free in self.packing.split(z).items():
            latent = self.packing.latents[name]
            if z.dim() == 2:
                event = free.dim() - 1 - (len(latent.shape) - latent.fn.event_dim)
                free = align(free, event, self._nesting)
            value, log_det = latent.constrain(free)
            if self.weigh is not None:
                log_det = self.weigh(name, log_det)
            yield name, value, log_det.reshape(z.shape[:-1] + (-1,))

    def log_density(self, z: Tensor) -> Tensor:
        """log p(data, x(z)) + log |det dx/dz|, with gradient.

        :param z: shape ``(D,)`` or ``(P, D)``.
        :return: a scalar, or shape ``(P,)``; for many points in one run of the model where it allows.
        """
        if z.dim() == 2 and not self.batched:
            return torch.stack([self.log_density(row) for row in z])
        rows = z if z.dim() == 2 else z.unsqueeze(0)
        size = len(rows)
        if size == 1:  # as any other program sees the model, without a plate
            rows = rows[0]
        values, log_dets = {}, []
        for name, value, log_det in self._values(rows):
            values[name] = value.to(dtype=self._dtype)
            log_dets.append(log_det.sum(-1))
        density = self._log_prob(values, size) + torch.stack(log_dets).sum(0)
        return density.reshape(z.shape[:-1])

    def log_factors(self, z: Tensor) -> Tensor:
        """The terms that the log density of a point ``(D,)`` is the sum of, with gradient, ``(E,)``.

        :raises ValueError: if discrete sites are summed out, of which no term is left.
        """
        if self._enumerated:
            raise ValueError("discrete sites are summed out")
        values, terms = {}, []
        for name, value, log_det in self._values(z):
            values[name] = value
            terms.append(log_det.reshape(-1))
        with self._conditioned(values) as model:
            trace = self._run(model)
            trace.compute_log_prob()
            sites = trace.nodes.values()
            terms += [site["log_prob"].reshape(-1) for site in sites if site["type"] == "sample"]
        return torch.cat([term.to(z) for term in terms])

    def _run(self, model: Program) -> Trace:
        trace: Trace = poutine.trace(model).get_trace(*self._args, **self._kwargs)
        pruned: Trace = prune_subsample_sites(trace)
        return pruned

    @contextmanager
    def _conditioned(self, values: Mapping[str, Tensor]) -> Iterator[Program]:
        """The model at values by site, of which every run sees the same part of the data."""
        fixed = torch.random.fork_rng() if self.subsampled else ExitStack()
        with fixed, poutine.block(), pyro.validation_enabled(False), warnings.catch_warnings():
            if self.subsampled:
                torch.manual_seed(0)
            warnings.filterwarnings("ignore", "Encountered NaN")
            yield poutine.condition(self._model, data=dict(values))

    def _log_prob(self, values: Mapping[str, Tensor], size: int = 1) -> Tensor:
        """The model's log density of values by site, a scalar; of many points at once shape ``(size,)``."""
        with self._conditioned(values) as model:
            if self._enumerated:
                return self._sum_out(model, size)
            trace = self._run(batched(model, size, self._nesting) if size > 1 else model)
            parts = site_log_probs(trace, size if size > 1 else None, self._nesting)
            return torch.stack(list(parts.values())).sum(0)

    def _sum_out(self, model: Program, size: int) -> Tensor:
        def nothing(*args: Any, **kwargs: Any) -> None:
            """A guide without latents."""

        if size > 1:
            return enumerated_log_weights(model, nothing, self._args, self._kwargs, size, self._nesting)
        elbo = TraceEnum_ELBO(strict_enumeration_warning=False, max_plate_nesting=self._nesting)
        trace = next(get_traces(elbo, model, nothing, self._args, self._kwargs))
        costs, factors, _, sum_dims, scale = compute_model_factors(*trace)
        terms = [cost.sum() for group in costs.values() for cost in group]
        if factors:
            terms.append(scale * contract_to_tensor(factors, sum_dims, frozenset()))
        return torch.stack([torch.as_tensor(term) for term in terms]).sum(0)

    @torch.no_grad()
    def _runs_batched(self) -> bool:
        """Whether a batch of points has the densities that they have one by one."""
        step = torch.linspace(-0.1, 0.1, NUM_PROBES).unsqueeze(-1).to(self.start)
        points = self.start + step * torch.cos(torch.arange(self.dim)).to(self.start)
        self.batched = True
        return runs_batched(
            lambda: {"density": Score(self.log_density(points))},
            lambda i: {"density": Score(self.log_density(points[i]))},
            _ROUNDING,
        )

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities and their gradients, neither with a graph.

        :param z: shape ``(P, D)``.
        :return: shapes ``(P,)`` and ``(P, D)``; minus infinity and zero at a point that the model refuses.
        """
        try:
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                value = self.log_density(z)
                (gradient,) = torch.autograd.grad(value.sum(), z)
            return value.detach(), gradient
        except REFUSALS:
            if len(z) == 1:
                return z.new_full((1,), -torch.inf), torch.zeros_like(z)
            return in_parts(self.value_and_grad, z, -(-len(z) // 2))
