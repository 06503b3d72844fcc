"""Draws by scalar: of a guide, a mapping, an array, a run of MCMC, or ArviZ's data."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine

from .._checks import check_positive_int
from .._program.sites import latent_sites
from .._shapes import scalar_name

__all__ = ["Draws", "as_array"]

Array = NDArray[Any]


def as_array(value: Any) -> Array:
    """A tensor, or what numpy takes, as an array of floats."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, dtype=float)


class Draws:
    """Draws of which each scalar has a name, such as ``tau`` or ``theta[2]``.

    :param source: site name -> ``(S, ...)``; an array ``(S, D)``; a fitted guide; an object with
        ``get_samples``, as Pyro's MCMC; with ``names`` and ``draws``, as this package's references; or with a
        group ``posterior``, as ArviZ's.
    :param what: what the argument is called.
    :param columns: names of an array's columns.
    :param num_samples: draws of a guide.
    :raises ValueError: if the source is none of these.

    Example::

        >>> draws = Draws({"tau": torch.ones(5), "theta": torch.ones(5, 2)})
        >>> list(draws), len(draws), draws.named(["theta"])
        (['tau', 'theta[0]', 'theta[1]'], 3, ['theta[0]', 'theta[1]'])
    """

    def __init__(
        self, source: Any, what: str = "draws", columns: Sequence[str] | None = None, num_samples: int = 2000
    ) -> None:
        self._what = what
        self._draw: Callable[[list[str]], Mapping[str, Any]]
        posterior = getattr(source, "posterior", source)
        if hasattr(posterior, "data_vars"):  # (chain, draw, ...)
            sites: Mapping[str, Any] = {
                str(name): (array := np.asarray(value.values, dtype=float)).reshape(-1, *array.shape[2:])
                for name, value in posterior.data_vars.items()
            }
        elif isinstance(source, Mapping):
            sites = source
        elif hasattr(source, "get_samples"):
            sites = source.get_samples()
        elif hasattr(source, "draws") and hasattr(source, "names"):
            sites = dict(zip(source.names, as_array(source.draws).T, strict=True))
        elif hasattr(source, "sample_posterior"):
            num = check_positive_int("num_samples", num_samples)
            self._shapes = {name: tuple(v.shape[1:]) for name, v in source.sample_posterior(1).items()}
            self._draw = lambda sites: source.sample_posterior(num, sites=sites)
            return
        elif callable(source) and not isinstance(source, torch.Tensor):
            num = check_positive_int("num_samples", num_samples)
            self._shapes = {name: tuple(value.shape) for name, value in _one_draw(source, what).items()}
            drawn: dict[str, Any] = {}

            def draw(sites: list[str]) -> Mapping[str, Any]:
                if not drawn:
                    every = [_one_draw(source, what) for _ in range(num)]
                    drawn.update({name: torch.stack([one[name] for one in every]) for name in every[0]})
                return drawn

            self._draw = draw
            return
        else:
            array = as_array(source)
            if array.ndim != 2:
                raise ValueError(
                    f"{what}: expected a guide, a mapping or an array (S, D), got shape {array.shape}"
                )
            names = [f"x[{i}]" for i in range(array.shape[1])] if columns is None else list(columns)
            if len(names) != array.shape[1] or len(set(names)) != len(names):
                raise ValueError(
                    f"names: expected {array.shape[1]} names, of the columns of {what}, got {names}"
                )
            sites = dict(zip(names, array.T, strict=True))
        values = {str(name): as_array(value) for name, value in sites.items()}
        if not values or any(not value.ndim or not len(value) for value in values.values()):
            raise ValueError(f"{what}: expected at least one draw of at least one site, got none")
        self._shapes = {name: value.shape[1:] for name, value in values.items()}
        self._draw = lambda sites: values

    def __len__(self) -> int:
        """The number of scalars."""
        return sum(int(np.prod(shape)) for shape in self._shapes.values())

    def __iter__(self) -> Iterator[str]:
        for site in self._shapes:
            yield from self._scalars(site)

    def _scalars(self, site: str) -> Iterator[str]:
        for index in np.ndindex(self._shapes[site]):
            yield scalar_name(site, index)

    def first(self, num: int) -> list[str]:
        """The names of the first scalars."""
        return list(islice(self, num))

    def note(self, shown: Sequence[str]) -> str:
        """What a picture of some scalars says of those that it leaves out; nothing of all."""
        return f"{len(shown)} of {len(self)} scalars" if len(shown) < len(self) else ""

    def _place(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """Site and index of a scalar; None if there is no such scalar."""
        if self._shapes.get(name) == ():
            return name, ()
        found = re.fullmatch(r"(.*)\[(\d+(?:,\s*\d+)*)\]", name, re.DOTALL)
        shape = self._shapes.get(found[1]) if found else None
        if found is None or shape is None:
            return None
        index = tuple(int(i) for i in found[2].split(","))
        inside = len(index) == len(shape) and all(i < n for i, n in zip(index, shape, strict=True))
        return (found[1], index) if inside else None

    def named(self, names: Sequence[str]) -> list[str]:
        """The scalars that are meant by names of scalars or of sites, each once.

        :raises ValueError: for a name that is unknown.
        """
        found: dict[str, None] = {}
        for name in [names] if isinstance(names, str) else names:
            if self._place(name) is not None:
                found[name.replace(" ", "") if name not in self._shapes else name] = None
            elif name in self._shapes:
                found.update(dict.fromkeys(self._scalars(name)))
            else:
                raise ValueError(
                    f"names: expected scalars of the {self._what}, such as {self.first(12)}, or its sites, "
                    f"{sorted(self._shapes)[:12]}, got {name!r}"
                )
        if not found:
            raise ValueError("names: expected at least one scalar, got none")
        return list(found)

    def take(self, names: Sequence[str]) -> dict[str, Array]:
        """The finite draws of each scalar that is wanted, in their order; NaN where one is not finite."""
        places = {name: self._place(name) for name in self.named(names)}
        values = self._draw(list(dict.fromkeys(place[0] for place in places.values() if place)))
        taken = {}
        for name, place in places.items():
            if place is None:
                continue
            column = np.moveaxis(as_array(values[place[0]]), 0, -1)[place[1]]
            if not np.isfinite(column).any():
                raise ValueError(f"{self._what}: expected finite draws of {name!r}, got none")
            taken[name] = np.where(np.isfinite(column), column, np.nan)
        return taken


@torch.no_grad()
def _one_draw(guide: Callable[..., Any], what: str) -> dict[str, torch.Tensor]:
    """What a guide of Pyro draws when it is called without data."""
    try:
        with poutine.block():
            trace: Any = poutine.trace(guide).get_trace()
    except Exception as error:  # whatever a program raises that was not set up, or needs its data
        raise ValueError(
            f"{what}: expected a fitted guide that can be called without data, or its draws, got {error!r}"
        ) from error
    return {
        name: site["value"]
        for name, site in latent_sites(trace)
        if not site["infer"].get("is_auxiliary") and isinstance(site["value"], torch.Tensor)
    }
