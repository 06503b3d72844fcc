"""Draws, quantiles and densities of a guide with rows, page by page."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.utils import _pytree as pytree

from .._checks import check_sites
from ._message_start import NEWTON_STEPS, Starter
from ._pages import Call, View
from ._row_tables import pages_of
from ._rows import RowPages
from ._summaries import reference_normal, sample_quantiles

__all__ = ["Rows"]

MOST_NUMBERS = 1_000_000
"""Numbers of all draws of a page at once."""
QUANTILE_DRAWS = 2048
NEW_NUMBERS = 10_000
"""Latents of new rows for which messages are found at once."""


class Rows(RowPages):
    """The rows of a guide's subsampled plate, and what is asked of them once they are trained."""

    def check_rows(self, rows: Any) -> Tensor:
        """Indices of rows as a tensor, all of them with None.

        :raises ValueError: if they are no whole numbers from 0 to N - 1.
        """
        if rows is None:
            return torch.arange(self.plate.size)
        found = torch.as_tensor(list(rows) if isinstance(rows, range) else rows)
        whole = not found.is_floating_point() and found.dtype != torch.bool and found.dim() <= 1
        found = found.long().reshape(-1)
        if not whole or bool(((found < 0) | (found >= self.plate.size)).any()):
            raise ValueError(
                f"rows: expected whole numbers from 0 to {self.plate.size - 1}, the rows of the plate "
                f"{self.plate.name!r}, got {rows!r}; for rows that the guide has not seen, sample_new_rows"
            )
        return found

    def check_sites(self, sites: Sequence[str] | None) -> list[str]:
        """Names of latent sites, all of them with None.

        :raises ValueError: if one is unknown.
        """
        return check_sites(sites, self.first_view().packing.latents)

    def parts(self, guide: Any, rows: Tensor) -> Iterator[tuple[View, int, Tensor]]:
        """Pages of rows with their messages in the view's map; how many of each are wanted, its first."""
        view = self.first_view()
        if self.plate.given and view.depends_on_data:
            raise RuntimeError(
                f"plate {self.plate.name!r}: the priors of its latents depend on data that come with each "
                "batch, which are not known here; draw with the batch, `guide(*batch)`"
            )
        for some in rows.split(view.size):
            page = torch.cat([some, some[:1].expand(view.size - len(some))])
            view.page.turn_to(page)
            with self.messages(guide, view, page):
                yield view, len(some), page

    @torch.no_grad()
    def sample(
        self,
        guide: Any,
        shape: tuple[int, ...],
        sites: Sequence[str] | None = None,
        rows: Any = None,
    ) -> dict[str, Tensor]:
        """Draws of sites in their constrained spaces, of some rows or all, page by page."""
        wanted, indices = self.check_sites(sites), self.check_rows(rows)
        num = math.prod(shape)
        view = self.first_view()
        roots = guide.draw_roots(num)
        values = {site: [value] for site, value in view.constrained_roots(roots).items()}
        local = [site for site in wanted if site not in values]
        for page, count, _ in self.parts(guide, indices) if local else ():
            found: dict[str, list[Tensor]] = {site: [] for site in local}
            for some in roots.split(max(1, MOST_NUMBERS // page.packing.dim)):
                drawn = page.draw_rows(some, torch.randn(len(some), page.packing.dim).to(some))
                for site in local:
                    found[site].append(page.packing.latents[site].constrain(drawn[site][0])[0])
            for site in local:
                whole = torch.cat(found[site])
                values.setdefault(site, []).append(whole.narrow(1 + page.axis[site], 0, count))
        return {
            site: torch.cat(values[site], 1 + view.axis.get(site, -1)).unflatten(0, shape)
            if shape
            else torch.cat(values[site], 1 + view.axis.get(site, -1))[0]
            for site in wanted
        }

    @torch.no_grad()
    def sample_new(self, guide: Any, num: int, call: Call, sites: Sequence[str] | None) -> dict[str, Tensor]:
        """Draws of the roots, and of the latents of rows that no table knows: their messages are found at the
        modes given the roots, and move with these."""
        wanted, roots = self.check_sites(sites), guide.draw_roots(num)
        centre, sds = roots.mean(0), roots.std(0) if num > 1 else guide.draw_roots(64, fixed=True).std(0)
        first = self.first_view()
        values = {site: [value] for site, value in first.constrained_roots(roots).items()}
        count = self.count_rows(guide, call)
        most = max(1, NEW_NUMBERS * first.size // first.packing.dim)
        length = count if self.plate.given else min(count, most)
        view = self.new_view(guide, call, torch.arange(length))
        view.layer.shapes, view.layer.shaped = first.layer.shapes, first.layer.shaped
        starter = Starter(view.layer, view.graph(max(1, 2 * len(centre))))
        assert view.density is not None
        for page, new in pages_of(count, length):
            view.page.turn_to(page)
            z = view.density.start.index_copy(0, view.root_places, centre.to(view.density.start))
            modes, factors = starter.given.newton(z.unsqueeze(0), NEWTON_STEPS)
            if factors[0] is None:
                raise RuntimeError("no mode was found of the latents of new rows given the others")
            starter.put(modes[0], factors[0], sds)
            drawn = view.draw_rows(roots, torch.randn(num, view.packing.dim).to(roots))
            for site in wanted:
                if site in drawn:
                    whole = view.packing.latents[site].constrain(drawn[site][0])[0]
                    part = whole.narrow(1 + view.axis[site], length - new, new)
                    values.setdefault(site, []).append(part)
        return {site: torch.cat(values[site], 1 + view.axis.get(site, -1)) for site in wanted}

    def count_rows(self, guide: Any, call: Call) -> int:
        """How many rows other data have.

        :raises ValueError: if they do not have the plate.
        """
        leaves = pytree.tree_leaves((tuple(call[0]), dict(call[1])))
        lengths = {
            len(new)
            for old, new in zip(self._leaves[0], leaves, strict=False)
            if isinstance(old, Tensor) and isinstance(new, Tensor) and self.plate.size in old.shape[:1]
        }
        if len(lengths) == 1 and not self.plate.given:  # fewer rows, maybe, than a page of the model has
            return lengths.pop()
        with torch.random.fork_rng(), guide._apart():
            init = InitMessenger(guide._init_fn)(guide._require_model())
            nodes = poutine.trace(init).get_trace(*call[0], **call[1]).nodes
        frames = {
            frame.name: frame
            for node in nodes.values()
            if node["type"] == "sample"
            for frame in node["cond_indep_stack"]
        }
        if self.plate.name not in frames:
            raise ValueError(f"expected data with the plate {self.plate.name!r}, got plates {sorted(frames)}")
        frame = frames[self.plate.name]
        return int(frame.size if self.plate.given else frame.full_size or frame.size)

    @torch.no_grad()
    def quantile(self, guide: Any, probs: Tensor) -> dict[str, Tensor]:
        """Marginal quantiles of every site, of all rows, ``probs.shape + site shape``."""
        view = self.first_view()
        roots = guide.draw_roots(QUANTILE_DRAWS, fixed=True)
        probs = probs.to(roots)

        def bijection(site: str) -> Any:
            return view.packing.latents[site].bijection

        found = {
            site: [value]
            for site, value in sample_quantiles(view.split_roots(roots), probs, bijection).items()
        }
        x = reference_normal(QUANTILE_DRAWS, view.packing.dim).to(roots)
        for page, count, _ in self.parts(guide, torch.arange(self.plate.size)):
            points = {site: free for site, (free, _) in page.draw_rows(roots, x).items()}
            for site, value in sample_quantiles(points, probs, bijection).items():
                part = value.narrow(probs.dim() + page.axis[site], 0, count)
                found.setdefault(site, []).append(part)
        return {
            site: torch.cat(found[site], probs.dim() + view.axis.get(site, -1))
            if site in view.axis
            else value[0]
            for site, value in ((site, found[site]) for site in view.packing.latents)
        }

    def log_prob(self, guide: Any, samples: Mapping[str, Tensor]) -> Tensor:
        """Log density of values of all sites, of all rows, shape ``S``; -inf outside the support.

        :raises ValueError: if a site is missing, unknown, of another shape, or NaN.
        """
        view, like = self.first_view(), next(guide._flow.parameters())
        for site in view.axis:
            value, latent = samples.get(site), view.packing.latents[site]
            axis = view.axis[site] - len(latent.shape)
            if value is not None and (value.dim() < -axis or value.shape[axis] != self.plate.size):
                shape = list(latent.shape)
                shape[axis] = self.plate.size
                raise ValueError(
                    f"samples[{site!r}]: expected shape (*, {', '.join(map(str, shape))}), got "
                    f"{tuple(value.shape)}"
                )
        total: Any = 0.0
        inside: Any = True
        for page, count, rows in self.parts(guide, torch.arange(self.plate.size)):
            shown = {
                site: value.index_select(
                    page.axis[site] - len(page.packing.latents[site].shape), rows.to(value.device)
                )
                if site in page.axis
                else value
                for site, value in samples.items()
            }
            z, _, valid = page.packing.pack(shown, like)
            flat = z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
            values, densities = page.packing.split(flat), page.log_q_of_rows(flat)
            for site in densities:
                densities[site] = densities[site] - page.packing.latents[site].constrain(values[site])[1]
            total = total + page.by_row(densities)[:, :count].sum(-1).reshape(z.shape[:-1])
            inside = inside & valid
            outside = z
        roots = outside[..., view.root_places]
        free = view.split_roots(roots.reshape(math.prod(roots.shape[:-1]), roots.shape[-1]))
        for site, value in free.items():
            log_det = view.packing.latents[site].constrain(value)[1].reshape(len(value), -1).sum(-1)
            total = total - log_det.reshape(roots.shape[:-1])
        if len(view.root_places):
            total = total + guide.get_posterior().log_prob(roots)
        return torch.where(inside, total, -torch.inf)
