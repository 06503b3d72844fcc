"""Outputs of a model, observed or computed sites, at many values of its latents."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor
from torch.distributions import Categorical
from torch.nn.functional import one_hot

from .._program.batching import NUM_PROBES, align, batched, even_sizes
from .._program.left_out import counted
from .._program.sites import innermost, is_computed, observed_sites
from .._shapes import scalar_name
from .._types import Site, Trace
from ._weighted_draws import WeightedDraws

__all__ = ["Evaluated", "Outputs"]

Array = NDArray[np.float64]
MOST_OUTPUTS: Final = 1000
"""Numbers of which an output is told apart; of more, so many are taken at even distances."""
REPEATS: Final = 4
"""Values of a random output that are drawn at each value of the latents, unless there are very many."""
FEW_DRAWS: Final = 500
"""Values of the latents at which a model is run that takes them one by one."""
MOST_DRAWN: Final = 100_000_000
"""Numbers that are drawn in all, unless so few draws tell nothing."""
MOST_NUMBERS: Final = 10_000_000
"""Numbers of all sites at once."""


class Evaluated(NamedTuple):
    """Outputs at S values of the latents, each a row."""

    first: Array
    """E[output | latents], ``(S, N)``; not finite where the output has no mean."""
    second: Array
    """E[output² | latents], ``(S, N)``."""
    drawn: Array
    """Draws of the outputs, ``(R, S, N)``; of counts smeared over one unit, so that no two are equal."""

    def take(self, rows: slice) -> "Evaluated":
        """Some of the rows."""
        return Evaluated(self.first[rows], self.second[rows], self.drawn[:, rows])


class Outputs:
    """The outputs by which a guide is judged.

    :param draws: of the guide.
    :param of: "predictions" for all observed sites, else a name or names.
    :raises ValueError: if ``of`` is no such thing, or the outputs are not to be had at given latents.

    Example::

        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 2.0), obs=torch.tensor(1.0))
        >>> from pyro_flowvi.diagnostics._weighted_draws import weighted_draws
        >>> draws = weighted_draws(model, pyro.infer.autoguide.AutoNormal(model), (), None, 100)
        >>> outputs = Outputs(draws, "predictions")
        >>> found = outputs.at(torch.tensor([[0.5]]))
        >>> outputs.names, found.first.tolist(), found.second.tolist(), found.drawn.shape
        (['y'], [[0.5]], [[4.25]], (4, 1, 1))
    """

    def __init__(self, draws: WeightedDraws, of: str | Sequence[str]) -> None:
        if not (of and isinstance(of, str | Sequence) and all(isinstance(name, str) for name in of)):
            raise ValueError(f"of: expected 'predictions' or names of sites, got {of!r}")
        if draws.particles.structure.subsampled:
            raise ValueError(
                "of: expected None where the model subsamples its data, since each run has other outputs, "
                f"got {of!r}; call it with all data, or judge the latents"
            )
        if draws.density is None:
            raise ValueError(f"of: expected None, since {draws.why}; got {of!r}")
        self._pair, self._density = draws.particles, draws.density
        self._batched = self._density.batched
        self._random = self._pair.structure.sums_out
        self._sites = self._find(of)
        self._size = sum(site["value"].numel() for site in self._sites.values())
        self._repeats = REPEATS if self._size <= MOST_OUTPUTS else 1
        self._columns, self.total = self._choose()
        self.names: list[str] = [label for site in self._sites for label in self._labels(site)]
        """Of each output, such as ``y[3]``."""
        if self._batched:
            self._batched = self._agree()

    @property
    def sites(self) -> list[str]:
        """The names of the sites."""
        return list(self._sites)

    @property
    def most_draws(self) -> int:
        """Values of the latents that are enough."""
        return max(FEW_DRAWS, MOST_DRAWN // self._size) if self._batched else FEW_DRAWS

    def _find(self, of: str | Sequence[str]) -> dict[str, Site]:
        (one,) = self._run(self._density.start.unsqueeze(0))
        there = {name: site for name, site in observed_sites(one).items() if name not in self._latents}
        observed = [name for name, site in there.items() if not is_computed(site)]
        wanted = observed if of == "predictions" else [of] if isinstance(of, str) else list(of)
        unknown = [name for name in wanted if name not in there]
        if unknown or not wanted:
            computed = sorted(there.keys() - set(observed))
            raise ValueError(
                f"of: expected observed sites ({', '.join(observed) or 'there are none'}) or sites of "
                f"pyro.deterministic ({', '.join(computed) or 'there are none'}), got {of!r}"
            )
        return {name: there[name] for name in dict.fromkeys(wanted)}

    def _choose(self) -> tuple[dict[str, Tensor], int]:
        """Which elements of each site are outputs, flat, and how many there are: masked ones are none."""
        shown = {}
        for name, site in self._sites.items():
            kept = torch.ones(site["value"].shape, dtype=torch.bool) if is_computed(site) else counted(site)
            size = _num_categories(site["fn"])
            shown[name] = (kept.unsqueeze(-1).expand(*kept.shape, size) if size else kept).reshape(-1).cpu()
        every = torch.cat(list(shown.values()))
        places = every.nonzero().squeeze(-1)
        if not len(places):
            raise ValueError(f"of: expected sites of which the mask leaves a part, got {list(self._sites)}")
        chosen = torch.zeros_like(every)
        some = torch.linspace(0, len(places) - 1, min(len(places), MOST_OUTPUTS), device="cpu").round().long()
        chosen[places[some]] = True
        parts = chosen.split([len(part) for part in shown.values()])
        columns = {name: part.nonzero().squeeze(-1) for name, part in zip(shown, parts, strict=True)}
        return columns, len(places)

    def _labels(self, name: str) -> list[str]:
        shape = self._shape(self._sites[name])
        places = (
            zip(*np.unravel_index(self._columns[name].cpu().numpy(), shape), strict=True) if shape else [()]
        )
        return [scalar_name(name, place) for place in places]

    @property
    def _latents(self) -> Any:
        return self._density.packing.latents

    @staticmethod
    def _shape(site: Site) -> tuple[int, ...]:
        size = _num_categories(site["fn"])
        return (*site["value"].shape, size) if size else tuple(site["value"].shape)

    def _run(self, z: Tensor, together: bool = False) -> list[Trace]:
        """A trace of the model at all rows of ``z``, or one of each."""
        pair, nesting = self._pair, self._pair.structure.max_plate_nesting
        values = self._density.packing.constrain(z.to(self._density.start))
        with torch.no_grad(), poutine.block(), pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")

            def trace(model: Callable[..., Any], data: dict[str, Tensor]) -> Trace:
                return poutine.trace(poutine.condition(model, data=data)).get_trace(*pair.args, **pair.kwargs)

            if together:
                aligned = {k: align(v, self._latents[k].fn.event_dim, nesting) for k, v in values.items()}
                return [trace(batched(pair.model, len(z), nesting), aligned)]
            return [trace(pair.model, {k: v[i] for k, v in values.items()}) for i in range(len(z))]

    def _agree(self) -> bool:
        """Whether a few runs at once have the outputs that they have one by one."""
        start = self._density.start
        step = torch.linspace(-0.1, 0.1, NUM_PROBES).unsqueeze(-1).to(start)
        points = start + step * torch.cos(torch.arange(len(start))).to(start)
        try:
            many = self._evaluate(points, True)
            if self._random:  # no two runs are alike
                return True
            alone = self._evaluate(points, False)
        except Exception:  # whatever a program raises that was not written for batches
            return False
        pairs = zip(many[:2], alone[:2], strict=True)
        return all(np.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True) for a, b in pairs)

    def at(self, z: Tensor) -> Evaluated:
        """The outputs at points ``(S, D)`` of the unconstrained space."""
        largest = max(self._pair.structure.largest, self._size)
        sizes = even_sizes(len(z), max(1, MOST_NUMBERS // (self._repeats * largest)))
        parts = [self._evaluate(part, self._batched) for part in z.split(sizes)]
        first, second, drawn = zip(*parts, strict=True)
        return Evaluated(np.concatenate(first), np.concatenate(second), np.concatenate(drawn, 1))

    def _evaluate(self, z: Tensor, together: bool) -> Evaluated:
        # Where sites are summed out, each run draws these anew, as data to come would.
        runs = [
            self._moments(self._run(z, together), len(z)) for _ in range(self._repeats if self._random else 1)
        ]
        first, second, drawn = zip(*runs, strict=True)
        return Evaluated(np.mean(first, 0), np.mean(second, 0), np.concatenate(drawn))

    def _moments(self, traces: list[Trace], size: int) -> Evaluated:
        columns: list[list[Tensor]] = [[], [], []]
        repeats = 1 if self._random else self._repeats
        for name, one in self._sites.items():
            shape, size_of_one = self._shape(one), size // len(traces)
            found = [_site_moments(trace.nodes[name], repeats) for trace in traces]
            for i, column in enumerate(columns):
                values = [_rows(part[i], size_of_one, shape) for part in found]
                column.append(torch.cat(values, -2)[..., self._columns[name].to(values[0].device)])
        first, second, drawn = (torch.cat(column, -1).double().cpu().numpy() for column in columns)
        return Evaluated(first[0], second[0], np.nan_to_num(drawn))


def _num_categories(fn: Any) -> int:
    """Categories of a site whose values name one; 0 for a site of numbers."""
    inner = innermost(fn)
    return int(inner.probs.shape[-1]) if isinstance(inner, Categorical) else 0


def _rows(value: Tensor, size: int, shape: tuple[int, ...]) -> Tensor:
    """``(R, S, N)`` of a value ``(R, [S, 1, ...,] *shape)``."""
    lead = value.dim() - 1 - len(shape)
    ones = value.shape[:2] if lead > 0 else (value.shape[0], 1)
    value = value.reshape(*ones, *value.shape[1 + max(lead, 0) :])
    return value.expand(value.shape[0], size, *shape).reshape(value.shape[0], size, -1)


def _site_moments(site: Site, repeats: int) -> tuple[Tensor, Tensor, Tensor]:
    """First and second moment given the latents, and draws, with a dimension for repetitions in front."""
    fn, value = site["fn"], site["value"]
    if is_computed(site):
        value = value.unsqueeze(0).to(torch.get_default_dtype())
        return value, value.square(), value.expand(repeats, *value.shape[1:])
    drawn = torch.stack([fn.sample() for _ in range(repeats)])
    size = _num_categories(fn)
    if size:
        probs = innermost(fn).probs.expand(*drawn.shape[1:], size).unsqueeze(0)
        return probs, probs, _smeared(one_hot(drawn.long(), size).to(probs))
    if fn.support.is_discrete:
        drawn = _smeared(drawn.to(torch.get_default_dtype()))
    try:
        mean = fn.mean.unsqueeze(0)
        second = mean.square() + fn.variance.unsqueeze(0)
    except (NotImplementedError, AttributeError):
        mean = second = torch.full_like(drawn[:1], torch.nan)
    return mean, second, drawn


def _smeared(counts: Tensor) -> Tensor:
    return counts + torch.rand_like(counts) - 0.5
