"""A posterior that is read from a file, without the model, the data, or trust in who wrote it."""

import math
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import IO, Any, Final

import torch
from torch import Size, Tensor

from .._checks import check_sites
from .._compile.stored_graph import from_plain
from .._program.packing import check_samples
from .._shapes import broadcast_shapes, sample_shape

__all__ = ["ExportedPosterior", "load_posterior"]

File = str | os.PathLike[str] | IO[bytes]
FORMAT: Final = "pyro_flowvi posterior"
VERSION: Final = 1
"""Of the files that are written.  All from 1 on are read."""
NUM_DRAWS: Final = 256
"""Draws that a graph makes or scores at once."""


class ExportedPosterior:
    """A posterior that was read from a file: draws and densities, without the model and without the data.

    Made by :func:`~pyro_flowvi.load_posterior`.  Draws come from torch's generator, so that
    ``torch.manual_seed`` makes them repeatable.

    Example::

        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale).expand(y.shape).to_event(1), obs=y)
        >>> file = io.BytesIO()
        >>> pyro_flowvi.AutoPlanar(model).materialize(torch.tensor([0.5, -0.4, 0.3])).export(file)
        >>> _ = file.seek(0)
        >>> posterior = pyro_flowvi.load_posterior(file)
        >>> posterior.sites
        {'scale': torch.Size([])}
        >>> posterior.log_prob({"scale": torch.tensor([0.5, -1.0])}).isfinite().tolist()
        [True, False]
    """

    guide: str
    """What the guide was, in words."""
    lower_bound: bool
    """Whether :meth:`log_prob` is an estimate from below."""
    made_by: Mapping[str, str]
    """Versions of this package, torch and Pyro that wrote the file."""
    sites: Mapping[str, Size]
    """Shape of each latent site."""

    def __init__(self, content: Mapping[str, Any], device: torch.device) -> None:
        self.guide, self.lower_bound = content["guide"], content["lower_bound"]
        self.made_by = dict(content["made_by"])
        self.sites = {name: Size(shape) for name, (shape, _) in content["sites"].items()}
        self._dtypes = {name: getattr(torch, dtype) for name, (_, dtype) in content["sites"].items()}
        self._num, self._device = content["num_draws"], device
        tensors = [value.to(device) for value in content["tensors"]]
        self._draw, self._log_prob = (
            from_plain(graph, [tensors[place] for place in graph["constants"]], device)
            for graph in (content["graphs"][name] for name in ("draw", "log_prob"))
        )

    def __repr__(self) -> str:
        sites = ", ".join(f"{name}{list(shape) or ''}" for name, shape in self.sites.items())
        return f"ExportedPosterior({sites}) of {self.guide}"

    @torch.no_grad()
    def sample_posterior(
        self, num_samples: int | Sequence[int] = (), *, sites: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Independent draws of every latent site, in its constrained space, as the guide would make them.

        :param num_samples: number of draws, or a sample shape.
        :param sites: names of the sites that are wanted; None for all.
        :return: site name -> tensor of shape ``sample shape + site shape``.
        :raises ValueError: for unknown sites.
        """
        shape, wanted = sample_shape(num_samples), check_sites(sites, self.sites)
        num = math.prod(shape)
        parts = [self._draw() for _ in range(max(1, math.ceil(num / self._num)))]
        drawn = dict(zip(self.sites, zip(*parts, strict=True), strict=True))
        return {name: torch.cat(drawn[name])[:num].reshape(shape + self.sites[name]) for name in wanted}

    def log_prob(self, samples: Mapping[str, Tensor]) -> Tensor:
        """Log density of values of all latent sites, in their constrained space.

        :param samples: site name -> tensor of shape ``S + site shape``, as of :meth:`sample_posterior`.
        :return: shape ``S``; -inf outside the support.
        :raises ValueError: if a site is missing, unknown, of another shape, or NaN.
        """
        values = {name: torch.as_tensor(value, device=self._device) for name, value in samples.items()}
        check_samples(values, self.sites)
        batches = [
            values[name].shape[: values[name].dim() - len(shape)] for name, shape in self.sites.items()
        ]
        batch = Size(broadcast_shapes(*batches))
        num = math.prod(batch)
        if not num:
            return torch.zeros(batch, dtype=next(iter(self._dtypes.values())), device=self._device)
        # The last part is filled up with the first value.
        places = torch.arange(math.ceil(num / self._num) * self._num, device=self._device)
        places = torch.where(places < num, places, 0)
        rows = [
            values[name].to(self._dtypes[name]).expand(batch + shape).reshape(num, *shape)[places]
            for name, shape in self.sites.items()
        ]
        parts = zip(*(value.split(self._num) for value in rows), strict=True)
        return torch.cat([self._log_prob(*part)[0] for part in parts])[:num].reshape(batch)


def load_posterior(path: File, *, device: str | torch.device = "cpu") -> ExportedPosterior:
    """Reads a posterior that ``guide.export(path)`` has written, in a process without the model and the data.

    Nothing in the file is run but operations of torch on tensors: a file that holds Python objects is refused
    unread.  Files of this and of all earlier versions are read.

    :param path: the file, or a binary stream.
    :param device: where draws are made.
    :raises ValueError: if it is another kind of file, cut short, of a later version, or holds what might run
        code.
    :raises OSError: if it cannot be opened.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> file = io.BytesIO()
        >>> pyro_flowvi.AutoPlanar(model).materialize().export(file)
        >>> _ = file.seek(0)
        >>> load_posterior(file).sample_posterior(3)["x"].shape
        torch.Size([3, 2])
    """
    where = torch.device(device)
    named = f"path: expected a file that guide.export has written, got {_in_words(path)}"
    with open(path, "rb") if isinstance(path, str | os.PathLike) else nullcontext(path) as file:
        try:
            with warnings.catch_warnings():
                # Of a pickle of another protocol torch warns before it refuses.
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                content = torch.load(file, map_location=where, weights_only=True)
        except pickle.UnpicklingError as error:
            why = "which holds Python objects: they are not read, as they may run code"
            raise ValueError(f"{named}, {why}") from error
        except Exception as error:
            raise ValueError(f"{named}, which is of another kind or cut short") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{named}, which is of another kind")
    version = content.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        by, own = content.get("made_by", {}).get("pyro_flowvi"), package_version()
        raise ValueError(f"{named}, of version {version} by pyro_flowvi {by}; {own} reads up to {VERSION}")
    try:
        return ExportedPosterior(content, where)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{named}, in which something is missing: {error}") from error


def _in_words(path: File) -> str:
    return repr(os.fspath(path)) if isinstance(path, str | os.PathLike) else "a stream"


def package_version() -> str:
    from .. import __version__

    return __version__
