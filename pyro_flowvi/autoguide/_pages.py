"""Pages of rows of a subsampled plate: each a plain model, with a map from noise to its latents."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._compile.errors import CannotCompile
from .._compile.log_density import TracedDensity, traced
from .._compile.priors import PriorGraph, no_priors, record_priors
from .._program.log_density import UnconstrainedModel
from .._program.packing import Packing
from .._program.rows import RowPlate, per_row, showing
from .._program.structure import LatentStructure
from .._types import Program
from ._message_map import MessageMap
from ._message_plan import MessagePlan
from ._row_layout import RowLayout

__all__ = ["Call", "Page", "View", "padded", "rows_that_see_others", "same_shapes"]

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of a model."""


class Page:
    """The model with B rows alone, which are replaced in place.

    :param model: the model.
    :param plate: the plate whose rows these are.
    :param call: the model's arguments.  Where these differ from page to page, their tensors are replaced as
        well.
    :param rows: ``(B,)``.
    :param dtype: of the rows' weights.
    :param device: of these; rows may lie elsewhere, as indices may.
    """

    def __init__(
        self,
        model: Program,
        plate: RowPlate,
        call: Call,
        rows: Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rows = rows.clone()
        self.weights = torch.ones(len(rows), dtype=dtype, device=device)
        """By which the densities of each row are multiplied."""
        leaves, spec = pytree.tree_flatten((tuple(call[0]), dict(call[1])))
        self._seen, own_data = list(leaves), plate.data_change
        self._versions = [leaf._version if isinstance(leaf, Tensor) else 0 for leaf in leaves]
        """Which a tensor counts that is changed in place."""
        self._leaves = [
            leaf.detach().clone() if own_data and isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        self._own_data = own_data
        args, kwargs = pytree.tree_unflatten(self._leaves, spec)
        self.call: Call = (args, kwargs)
        self.program: Program | None = showing(model, plate, None if plate.given else self.rows, self.weights)

    def __getstate__(self) -> dict[str, Any]:
        kept = [leaf if isinstance(leaf, Tensor) and self._own_data else None for leaf in self._leaves]
        return {**self.__dict__, "program": None, "call": ((), {}), "_seen": [], "_leaves": kept}

    @property
    def tensors(self) -> list[Tensor]:
        """All that is replaced from page to page."""
        own = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)] if self._own_data else []
        return [self.rows, self.weights, *own]

    def turn_to(self, rows: Tensor, call: Call | None = None, weight: float | Tensor = 1.0) -> None:
        """Shows other rows, in place of those before."""
        self.rows.copy_(rows)
        if isinstance(weight, Tensor):
            self.weights.copy_(weight)
        else:
            self.weights.fill_(weight)
        if call is None or not self._own_data:
            return
        for i, leaf in enumerate(pytree.tree_leaves((tuple(call[0]), dict(call[1])))):
            if isinstance(leaf, Tensor) and (leaf is not self._seen[i] or leaf._version != self._versions[i]):
                self._leaves[i].copy_(leaf)
                self._seen[i], self._versions[i] = leaf, leaf._version


class View:
    """What a guide knows of the model's pages of one size.

    :param page: the page.
    :param density: of the page's latents, roots included.
    :param by_prior: whether the latents of rows are drawn by the model's priors.
    :param scale: standard deviation that a message alone has at first.
    :param follow: whether messages may move with the roots.
    :param placement: device and dtype of the map, where they are not the model's.
    """

    def __init__(
        self,
        page: Page,
        plate: RowPlate,
        density: UnconstrainedModel,
        by_prior: bool,
        scale: float,
        follow: bool,
        placement: tuple[torch.device | None, torch.dtype | None],
    ) -> None:
        self.page = page
        self.density: UnconstrainedModel | None = density
        density.weigh = partial(_weigh, plate, page.weights, density.stacks)
        self.packing: Packing = density.packing
        latents = self.packing.latents
        local = [name for name in latents if plate.holds(density.stacks[name])]
        roots = tuple(name for name in latents if name not in local)
        self.why_not: str | None = None
        """Why no priors are known; None if they are."""
        priors = no_priors(latents, density.start)
        if by_prior:
            try:
                assert page.program is not None
                priors = record_priors(page.program, *page.call, self.packing, density.start)
            except (CannotCompile, ValueError, RuntimeError, KeyError) as error:
                self.why_not = f"the model's priors could not be recorded: {error}"
        messages = {site: priors.parents[site] for site in local if site in priors.joint}
        free = tuple(site for site in local if site not in messages)
        self.structure = LatentStructure(roots, messages, free)
        self.priors: PriorGraph = priors
        layout = RowLayout(self.packing, plate, local, page.weights)
        layer = MessageMap(self.packing, self.structure, priors, scale, layout, follow)
        device, dtype = placement
        self.layer = layer.to(device=device or density.start.device, dtype=dtype or density.start.dtype)
        """The map from noise to the latents."""
        self.root_places = self.layer.plan.root_places().to(density.start.device)
        self.axis = {
            site: len(latents[site].shape) - latents[site].fn.event_dim + plate.dim for site in local
        }
        """The dimension of the rows in the shapes of those sites that have some."""
        own = {tensor.data_ptr() for tensor in page.tensors[2:]}
        self.depends_on_data = any(value.data_ptr() in own for value in priors.constants)
        """Whether priors of rows read what comes with each batch."""
        self._graphs: dict[int, TracedDensity] = {}

    def __getstate__(self) -> dict[str, Any]:
        # The priors reach the page's tensors, which have to be the same ones afterwards.
        memory = [tensor.data_ptr() for tensor in self.page.tensors]
        links = {
            i: memory.index(value.data_ptr())
            for i, value in enumerate(self.priors.constants)
            if value.data_ptr() in memory
        }
        return {**self.__dict__, "density": None, "_graphs": {}, "_links": links}

    def __setstate__(self, state: dict[str, Any]) -> None:
        links = state.pop("_links")
        self.__dict__.update(state)
        for i, j in links.items():
            self.priors.constants[i] = self.page.tensors[j]
        rows = self.layer.rows
        assert rows is not None
        rows.weights = self.page.weights
        self.layer.plan = MessagePlan(self.packing, self.structure, self.priors)

    @property
    def size(self) -> int:
        """B, the rows of a page."""
        return len(self.page.rows)

    @property
    def numbers_each(self) -> int:
        """Latents of a row."""
        return (self.packing.dim - len(self.root_places)) // self.size

    def graph(self, width: int) -> TracedDensity:
        """The density of so many points at once."""
        assert self.density is not None
        return traced(self.density, width)

    def narrow_graph(self, width: int) -> TracedDensity:
        """The density of as many points at once as stay in a processor's cache, at most so many."""
        assert self.density is not None
        return self.graph(max(1, min(width, NARROW // self.density.largest)))

    def with_roots(self, roots: Tensor, x: Tensor) -> Tensor:
        """Noise ``(P, D)`` of a page of ``x`` ``(P, D)`` with the places of roots taken by ``(P, R)``."""
        places = self.root_places.to(x.device)
        return x.index_copy(-1, places, roots.to(x)) if len(places) else x

    def draw_rows(self, roots: Tensor, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Unconstrained latents of the page's rows, and their log densities given the roots, by site.

        :param roots: ``(P, R)``.
        :param x: standard normal noise, ``(P, D)``.
        :return: of each site ``(P, *free shape)`` and ``(P, *batch shape)``.
        """
        z, log_dets = self.layer.run_by_site(self.with_roots(roots, x))
        values, noise = self.packing.split(z), self.packing.split(x)
        return {site: (values[site], self._log_q(site, noise[site], -log_dets[site])) for site in log_dets}

    def log_q_of_rows(self, z: Tensor) -> dict[str, Tensor]:
        """The log densities of latents ``(P, D)`` of the page's rows given the roots, by site."""
        x, log_dets = self.layer.run_by_site(z, forward=False)
        noise = self.packing.split(x)
        return {site: self._log_q(site, noise[site], log_dets[site]) for site in log_dets}

    def _log_q(self, site: str, noise: Tensor, log_det: Tensor) -> Tensor:
        latent = self.packing.latents[site]
        batch = len(latent.shape) - latent.fn.event_dim
        normal = -0.5 * (noise.square() + LOG_2_PI)

        def over_events(value: Tensor) -> Tensor:
            return value.flatten(1 + batch).sum(-1) if value.dim() > 1 + batch else value

        return over_events(normal) + over_events(log_det)

    def by_row(self, values: Mapping[str, Tensor]) -> Tensor:
        """Totals of each row, ``(P, B)``, of values ``(P, *batch shape)`` by site."""
        rows = self.layer.rows
        assert rows is not None
        totals = []
        for site, value in values.items():
            row_of = rows.row_of[site]
            batch = value.dim() - 1
            first = row_of.flatten(batch)[..., 0] if row_of.dim() > batch else row_of
            total = value.new_zeros(len(value), self.size)
            totals.append(total.index_add(1, first.flatten().to(value.device), value.flatten(1)))
        return torch.stack(totals).sum(0)

    def split_roots(self, roots: Tensor) -> dict[str, Tensor]:
        """Unconstrained values of the roots by site, ``(P, *free shape)``, of ``(P, R)``."""
        latents = self.packing.latents
        sizes = [latents[site].free_shape.numel() for site in self.structure.roots]
        parts = roots.split(sizes, -1) if sizes else ()
        return {
            site: part.reshape(len(roots), *latents[site].free_shape)
            for site, part in zip(self.structure.roots, parts, strict=True)
        }

    def constrained_roots(self, roots: Tensor) -> dict[str, Tensor]:
        """The roots in their supports."""
        latents = self.packing.latents
        return {site: latents[site].constrain(free)[0] for site, free in self.split_roots(roots).items()}


LOG_2_PI = math.log(2.0 * math.pi)
NARROW = 100_000
"""Numbers of the largest site, at all points that a density is asked for at once, of pages with much data."""


def _weigh(
    plate: RowPlate, weights: Tensor, stacks: Mapping[str, tuple[Any, ...]], site: str, log_det: Tensor
) -> Tensor:
    """Log-determinants of a site times the weights of its rows."""
    return log_det * per_row(weights, plate) if plate.holds(stacks[site]) else log_det


def rows_that_see_others(view: View) -> bool:
    """Whether densities of a row depend on the latents of another one."""
    density, page = view.density, view.page
    assert density is not None
    rows = view.layer.rows
    assert rows is not None
    kept = page.weights.clone()
    index = torch.arange(view.size, device="cpu")
    wave = torch.cos(torch.arange(density.dim, dtype=torch.float64)).to(density.start)
    point = (density.start + 0.1 * wave).unsqueeze(0)
    try:
        # Of any two rows there is a digit in which their numbers differ: each is seen once without the other.
        for digit in range(max(1, (view.size - 1).bit_length())):
            for shown in (0, 1):
                seen = (index >> digit) % 2 == shown
                page.weights.copy_(seen.to(kept))
                parts = density.packing.split(density.value_and_grad(point)[1][0])
                if any(bool((parts[site][~seen[rows.row_of[site]]].abs() > 0).any()) for site in rows.sites):
                    return True
    finally:
        page.weights.copy_(kept)
    return False


def padded(call: Call, count: int, size: int) -> Call:
    """The arguments of ``count`` rows as those of more, of which the others repeat the first."""

    def longer(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != count:
            return leaf
        return torch.cat([leaf, leaf[:1].expand(size - count, *leaf.shape[1:])])

    args, kwargs = pytree.tree_map(longer, (tuple(call[0]), dict(call[1])))
    return args, kwargs


def same_shapes(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether leaves of two calls can stand for each other."""
    return len(one) == len(other) and all(
        (a.shape == b.shape and a.dtype == b.dtype)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else (a is b or a == b)
        for a, b in zip(one, other, strict=True)
    )
