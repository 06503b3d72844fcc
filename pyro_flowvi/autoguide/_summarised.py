"""What a guide's draws are like, scalar by scalar, and how a guide prints."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._checks import check_positive_int, check_sites
from .._compile.log_density import log_densities
from .._noise import own_noise
from .._program.batching import even_sizes, in_parts
from .._program.log_density import UnconstrainedModel
from .._shapes import scalar_name
from ..psis import effective_sample_size, psis
from ._groups import GroupedDraws, find_groups
from ._row_fit import RowFit
from ._summary_table import as_table, column_names, describe, rounded
from .resample import CHUNK

__all__ = ["SummarisedGuide"]

Array = NDArray[np.float64]
NUM_SAMPLES, FEWEST_SAMPLES = 4000, 400
"""Draws, and those of very many latents."""
PAGE_NUMBERS = 50_000_000
"""Numbers that are held at once.  What goes beyond is drawn again, page by page."""
STEP_NUMBERS = 2**20
"""Latents that a flow draws at once: a spline has 23 parameters for each."""
MOST_WEIGHED = 10_000
"""Latents up to which draws are weighed: weights of more tell nothing, or take long."""
FEWEST_WEIGHTS = 100
LONG = 100
"""Characters of one line, above which a guide prints as several."""
MOST_SITES = 6


class _Weighed(NamedTuple):
    """Weights of draws, ``(S,)``, summing to one, k-hat, and Kish's effective sample size.

    ``groups`` are the draws, where others than those of the seed.
    """

    weights: Tensor
    khat: float
    ess: float
    groups: GroupedDraws | None


class SummarisedGuide(RowFit):
    """A guide that tells of its posterior in a table, and of itself in a line."""

    @torch.no_grad()
    def summary(
        self,
        num_samples: int | None = None,
        prob: float = 0.9,
        *,
        sites: str | Sequence[str] | None = None,
        rows: Any = None,
        resample: bool = False,
        ess: bool = True,
        digits: int | None = 2,
    ) -> Any:
        """A table of the posterior with a row for each scalar, such as ``theta[0]``.

        The columns are ``mean``, ``sd``, the two ends of the central interval with probability ``prob`` and
        the median (``5%``, ``50%``, ``95%``), and ``ess``: how many independent draws of the posterior give a
        mean as exact as the importance weights do, (sd / standard error)^2, rounded; of a guide that is wider
        than the posterior that may be more than S.  Whether the weights can
        be trusted is for :func:`pyro_flowvi.diagnose` to say.

        The draws are the same at every call, and leave Pyro's generator alone.  Of very many latents they are
        made again page by page, so that memory stays bounded.

        :param num_samples: number S of draws; 4000 by default, above 12,500 latents fewer, 400 at least.
            Models with many independent groups of latents are weighed on fewer, if these take long.
        :param prob: probability of the interval.
        :param sites: names of the sites that are wanted; None for all.
        :param rows: indices of rows of a subsampled plate, as of :meth:`sample_posterior`.
        :param resample: whether mean, sd and quantiles are those by the importance weights.
        :param ess: whether to score the draws under the model and the data that the guide was last
            materialized or fitted with.  The column is NaN without, where the guide does not know all of its
            data (after minibatches, in a copy from a pickle), of latents under a subsampled plate, and above
            10,000 latents.
        :param digits: decimals of the numbers; where the sd of a scalar is below one, as many that the sd has
            so many significant digits: 0.0012 beside 4.30.  None for exact numbers.
        :return: a pandas ``DataFrame``; without pandas a table that prints alike.  ``table["mean"]["mu"]`` is
            a number of either.  ``attrs`` has ``num_samples``, ``ess`` (Kish's) and ``khat``.
        :raises ValueError: for unknown sites or rows, or if an argument is not of the described kind.
        :raises RuntimeError: before the guide has seen data, and with ``resample``, if there are no weights.

        Reference: Owen, *Monte Carlo Theory, Methods and Examples*, 2013, equation 9.9 (the standard error).

        Example::

            >>> def model(y):
            ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
            ...     pyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).to_event(1), obs=y)
            >>> y = torch.tensor([9.0, 10.0, 11.0])
            >>> guide = pyro_flowvi.AutoPlanar(model, num_layers=2)
            >>> result = pyro_flowvi.fit(model, guide, y, seed=0, progress=False)
            >>> guide.summary(digits=1)  # doctest: +NORMALIZE_WHITESPACE, +ELLIPSIS
                mean   sd   5%   50%   95%     ess
            mu  10.0  0.6  9.0  10.0  10.9  39...
        """
        if not (isinstance(prob, float) and 0.0 < prob < 1.0):
            raise ValueError(f"prob: expected a number between 0 and 1, got {prob!r}")
        if digits is not None:
            check_positive_int("digits", digits)
        self._flow  # noqa: B018  which has to be there
        served = self._rows
        total = self.latent_dim + (
            0 if served is None else served.first_view().numbers_each * served.plate.size
        )
        if num_samples is None:
            num_samples = max(FEWEST_SAMPLES, min(NUM_SAMPLES, PAGE_NUMBERS // max(1, total)))
        elif check_positive_int("num_samples", num_samples) < 2:
            raise ValueError(f"num_samples: expected at least 2, got {num_samples}")
        probs = [0.5 - prob / 2, 0.5, 0.5 + prob / 2]
        if served is not None:
            if resample:
                self._density_of_all()  # raises
            found = self._describe_rows(served, num_samples, probs, served.check_sites(sites), rows)
            weighed = None
        else:
            self._refuse_rows(rows)
            weighed = self._weighed(num_samples, needed=resample) if ess or resample else None
            if weighed is not None:
                num_samples = len(weighed.weights)
            found = self._describe_flat(num_samples, probs, self._chosen(sites), weighed, resample)
        index = [
            scalar_name(site, tuple(places[place] if axis == i else place for i, place in enumerate(at)))
            for site, (stats, axis, places) in found.items()
            for at in np.ndindex(stats.shape[:-1])
        ]
        flat = [stats.reshape(-1, stats.shape[-1]) for stats, _, _ in found.values()]
        numbers = np.concatenate([np.zeros((0, len(probs) + 3)), *flat])
        numbers[:, -1] = numbers[:, -1].round()
        if digits is not None:
            numbers = rounded(numbers, digits)
        attrs = {
            "num_samples": num_samples,
            "ess": np.nan if weighed is None else weighed.ess,
            "khat": np.nan if weighed is None else weighed.khat,
        }
        return as_table(index, dict(zip(column_names(probs), numbers.T, strict=True)), attrs)

    def _refuse_rows(self, rows: Any) -> None:
        """:raises ValueError: for rows, of which this guide has none."""
        if rows is not None:
            raise ValueError(f"rows: expected None, as no latent is under a subsampled plate, got {rows!r}")

    def _chosen(self, sites: str | Sequence[str] | None) -> list[str]:
        """The sites that are wanted, in their order.

        :raises ValueError: for unknown ones.
        """
        return check_sites(sites, self._packing.latents)

    def _density_of_all(self) -> UnconstrainedModel:
        """The model with the data that the guide has seen, by which its draws can be weighed.

        :raises RuntimeError: if these are none, or a part.
        """
        density = None
        if self._rows is None:
            if self._data is None:
                raise RuntimeError(
                    f"{self.name}: call materialize(*args, **kwargs) with all data to resample"
                )
            density = self.density(*self._data[0], **self._data[1])
        if density is None or density.subsampled:
            raise RuntimeError(f"{self.name}: the model sees a part of its data, and cannot weigh by all")
        return density

    # -- latents that are drawn together -------------------------------------------------------

    @contextmanager
    def _same_draws(self) -> Iterator[None]:
        """Random numbers that are the same at every call, and no part of the user's stream."""
        like = next(self.parameters(), torch.zeros(()))
        with own_noise(like.device, seed=0):
            yield

    def _draws(self, num: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Packed latents and their log densities in parts, the same each time."""
        components = getattr(self, "num_components", 1)
        most = max(1, STEP_NUMBERS // (max(1, self.latent_dim) * components))
        for size in even_sizes(num, most):
            drawn = self.draw_latent(size)
            assert drawn is not None
            yield drawn

    def _weighed(self, num: int, needed: bool) -> _Weighed | None:
        """Weights of the draws; None where there are none, which is an error if they are needed."""
        try:
            if self._data is not None and self.latent_dim > MOST_WEIGHED:
                most = f"the most are {MOST_WEIGHED}"
                raise RuntimeError(f"{self.name}: {self.latent_dim} latents are too many to weigh; {most}")
            with self._same_draws():
                density = self._density_of_all()
        except (RuntimeError, ValueError, NotImplementedError):  # without its model, or of other latents
            if needed:
                raise
            return None
        found = self._weigh(density, num)
        if found is None and needed:
            few = f"fewer than {FEWEST_WEIGHTS} of {num} draws have a finite density"
            raise RuntimeError(f"{self.name}: {few}")
        return found

    def _weigh(self, density: UnconstrainedModel, num: int) -> _Weighed | None:
        with self._same_draws():
            found = find_groups(self.pushforward(self._require_model()), density)
            groups = None if found is None else found.draw(num, density.start)
        if groups is not None:
            ratios = groups.log_weights
        else:
            parts = []
            with self._same_draws():
                for z, log_q in self._draws(num):
                    with own_noise(z.device):
                        log_p = in_parts(partial(log_densities, density), z, CHUNK)
                    parts.append(log_p - log_q)
            ratios = torch.cat(parts)
        log_ratios = ratios.double().cpu().numpy()
        finite = np.isfinite(log_ratios)
        if finite.sum() < FEWEST_WEIGHTS:
            return None
        smoothed, khat = psis(log_ratios[finite])
        weights = np.zeros(len(log_ratios))
        weights[finite] = np.exp(smoothed)
        kish = effective_sample_size(log_ratios[finite])
        return _Weighed(torch.from_numpy(weights), khat, kish, groups)

    def _describe_flat(
        self, num: int, probs: list[float], wanted: list[str], weighed: _Weighed | None, resample: bool
    ) -> dict[str, tuple[Array, int, Any]]:
        """Figures of each site, ``site shape + (Q + 3,)``."""
        shapes = {site: tuple(self._packing.latents[site].shape) for site in wanted}
        weights, groups = (None, None) if weighed is None else (weighed.weights, weighed.groups)
        found: dict[str, list[Array]] = {site: [] for site in wanted}
        for page in _pages({site: int(np.prod(shapes[site])) for site in wanted}, PAGE_NUMBERS // num):
            own = self._columns(page, num, None if groups is None else groups.z)
            moved = None if groups is None else self._columns(page, num, groups.corrected)
            for i, (site, _, _) in enumerate(page):
                theirs = None if moved is None else moved[i]
                found[site].append(describe(own[i], probs, weights, theirs, resample))
        width = len(probs) + 3
        return {
            site: (np.concatenate([np.zeros((0, width)), *found[site]]).reshape(*shapes[site], width), -1, ())
            for site in wanted
        }

    def _columns(self, page: list[tuple[str, int, int]], num: int, z: Tensor | None) -> list[Tensor]:
        """The numbers ``(S, C)`` of parts of sites."""
        columns: list[list[Tensor]] = [[] for _ in page]
        with self._same_draws():
            for latent in (part for part, _ in self._draws(num)) if z is None else [z]:
                values = self._packing.constrain(latent)
                for i, (site, start, stop) in enumerate(page):
                    columns[i].append(values[site].reshape(len(latent), -1)[:, start:stop].clone())
        return [torch.cat(parts) for parts in columns]

    # -- latents of rows -----------------------------------------------------------------------

    def _describe_rows(
        self, served: Any, num: int, probs: list[float], wanted: list[str], rows: Any
    ) -> dict[str, tuple[Array, int, Any]]:
        """The same of a guide with rows, and which axis is theirs, with the rows' indices."""
        view = served.first_view()
        indices = served.check_rows(rows)
        local = [site for site in wanted if site in view.axis]
        found: dict[str, tuple[Array, int, Any]] = {}
        most = max(1, PAGE_NUMBERS // (num * max(1, view.numbers_each)))
        # A network may know the rows of its last data alone: these are asked for as they are.
        pages = [rows] if len(indices) <= most else list(indices.split(most))
        parts: dict[str, list[Array]] = {site: [] for site in local}
        for page in pages if local else ():
            with self._same_draws():
                drawn = served.sample(self, (num,), local, page)
            for site, value in drawn.items():
                stats = describe(value.reshape(num, -1), probs, None, None, False)
                parts[site].append(stats.reshape(*value.shape[1:], -1))
        with self._same_draws():
            roots = served.sample(self, (num,), [site for site in wanted if site not in local])
        for site in wanted:
            if site in local:
                axis = view.axis[site]
                found[site] = np.concatenate(parts[site], axis), axis, indices.tolist()
            else:
                value = roots[site]
                stats = describe(value.reshape(num, -1), probs, None, None, False)
                found[site] = stats.reshape(*value.shape[1:], -1), -1, ()
        return found

    # -- a guide in a line ---------------------------------------------------------------------

    def __repr__(self) -> str:
        told = self._told_of()
        line = f"{type(self).__name__}({', '.join(f'{key}: {text}' for key, text in told.items())})"
        if len(line) <= LONG:
            return line
        lines = (f"  {key}: {text}" for key, text in told.items())
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])

    def _told_of(self) -> dict[str, str]:
        """What there is to say of the guide, without looking at the param store."""
        known = self.__dict__
        told = {"model": _name_of(known.get("_raw_model", (None,))[0])}
        if known.get("prototype_trace") is not None:
            told["latents"] = self._told_latents()
        flow = known.get("flow_name") or _name_of(getattr(self, "_build", None))
        components = known.get("num_components")
        told["flow"] = flow if components is None else f"{flow}, {components} components"
        if known.get("prototype_trace") is None:
            return told | {"not set up": "it has seen no data yet"}
        told["parameters"] = f"{sum(param.numel() for param in self.parameters() if param.requires_grad):,}"
        if self._structure.taken:
            told["structure"] = f"message map, {self._structure.why}"
        return told

    def _told_latents(self) -> str:
        latents = self._packing.latents
        sizes = {site: tuple(latent.shape) for site, latent in latents.items()}
        total = sum(latent.free_shape.numel() for latent in latents.values()) - self._packing.num_left_out
        if self._rows is not None:
            view, size = self._rows.first_view(), self._rows.plate.size
            total = self.latent_dim + view.numbers_each * size
            for site, axis in view.axis.items():
                shape = list(sizes[site])
                shape[axis] = size
                sizes[site] = tuple(shape)
        names = [f"{site} ({', '.join(map(str, shape))})" if shape else site for site, shape in sizes.items()]
        if len(names) > MOST_SITES:
            names = [*names[: MOST_SITES - 2], "...", names[-1]]
        count = f"{len(sizes)} sites" if len(sizes) != 1 else "1 site"
        return f"{total:,} in {count}, {', '.join(names)}"


def _name_of(program: Any) -> str:
    """What a model, or the builder of a flow, is called; a pickle may have lost it."""
    while hasattr(program, "func") and hasattr(program, "args"):
        program = program.func
    if program is None:
        return "lost"
    name = getattr(program, "__qualname__", None) or type(program).__qualname__
    return str(name).rpartition("<locals>.")[2]


def _pages(sizes: dict[str, int], most: int) -> Iterator[list[tuple[str, int, int]]]:
    """Sites, or parts of them from one number to another, of so many numbers together at most."""
    page: list[tuple[str, int, int]] = []
    left = most = max(1, most)
    for site, size in sizes.items():
        start = 0
        while start < size:
            stop = min(size, start + left)
            page.append((site, start, stop))
            left -= stop - start
            start = stop
            if not left:
                yield page
                page, left = [], most
    if page:
        yield page
