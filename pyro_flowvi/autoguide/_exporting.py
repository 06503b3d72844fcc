"""Writing a guide's posterior to a file that needs neither the model nor the data."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from .._compile.errors import CannotCompile
from .._compile.stored_graph import as_plain
from .._compile.trace import trace
from .._noise import own_noise
from .._paths import check_file, replacing
from .._program.packing import Packing
from .._types import Program
from ._summarised import SummarisedGuide
from .exported import FORMAT, NUM_DRAWS, VERSION, ExportedPosterior, File, package_version

__all__ = ["ExportingGuide"]


class ExportingGuide(SummarisedGuide):
    """A guide whose posterior can be written to a file of its own."""

    @torch.no_grad()
    def export(self, path: File) -> None:
        """Writes the posterior to a file that :func:`~pyro_flowvi.load_posterior` reads without the model.

        The file holds numbers, and the operations of torch that make draws and densities of them; no Python
        code.  The density of an :class:`~pyro_flowvi.AutoCIF` is an estimate there too.  Of a guide with
        latents under a subsampled plate the file has the latents outside of the plate, which all rows share.
        It may hold what the priors of the latents are computed from, such as covariates of groups.

        Before the file is written, its draws and densities are compared with the guide's.

        :param path: a file, in a folder that exists, or a binary stream.
        :raises RuntimeError: before the guide has seen data; if it cannot be written as operations, as with
            a transform of your own whose ``forward`` depends on values in Python.
        :raises ValueError: if the guide has no latents that all rows share.

        Example::

            >>> def model(y):
            ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
            ...     pyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).to_event(1), obs=y)
            >>> guide = pyro_flowvi.AutoPlanar(model).materialize(torch.tensor([9.0, 10.0, 11.0]))
            >>> file = io.BytesIO()
            >>> guide.export(file)
            >>> _ = file.seek(0)
            >>> posterior = pyro_flowvi.load_posterior(file)
            >>> posterior.sample_posterior(100)["mu"].shape
            torch.Size([100])
        """
        flow = self._flow
        if not self.latent_dim:
            raise ValueError(f"{self.name}: expected latents outside of a subsampled plate, got none")
        packing = self._packing
        if self._rows is not None:
            packing = packing.only(self._rows.first_view().structure.roots)
        like = next(flow.parameters(), torch.zeros(()))
        functions = _Functions(self, packing, like)
        with own_noise(like.device, seed=0):
            sites = list(packing.latents)
            drawn = functions.draw()
            examples = [value.clone() for value in drawn]
            tensors = _Tensors()
            graphs = {
                "draw": _record("sample_posterior", functions.draw, [], tensors),
                "log_prob": _record("log_prob", functions.log_prob, examples, tensors),
            }
        content = {
            "format": FORMAT,
            "version": VERSION,
            "made_by": {
                "pyro_flowvi": package_version(),
                "torch": str(torch.__version__),
                "pyro": str(pyro.__version__),
            },
            "guide": repr(self),
            "lower_bound": self.lower_bound,
            "num_draws": NUM_DRAWS,
            "sites": {
                name: (list(packing.latents[name].shape), str(value.dtype).removeprefix("torch."))
                for name, value in zip(sites, drawn, strict=True)
            },
            "tensors": tensors.kept,
            "graphs": graphs,
        }
        _compare(ExportedPosterior(content, like.device), functions, like.device)
        _write(content, path)


class _Functions:
    """What is recorded of a guide: functions of tensors to tuples of tensors."""

    def __init__(self, guide: Any, packing: Packing, like: Tensor) -> None:
        self._guide, self._packing, self._like = guide, packing, like

    def draw(self) -> tuple[Tensor, ...]:
        """Draws of the sites."""
        return tuple(self._packing.constrain(self._guide.get_posterior().sample((NUM_DRAWS,))).values())

    def log_prob(self, *values: Tensor) -> tuple[Tensor]:
        """Log densities of values that have been checked."""
        samples = dict(zip(self._packing.latents, values, strict=True))
        latent, log_det, inside = self._packing.pack_checked(samples, self._like)
        log_prob = self._guide.get_posterior().log_prob(latent) - log_det
        return (torch.where(inside, log_prob, -torch.inf),)


class _Tensors:
    """What the graphs have in common, each tensor once."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self._places: dict[Any, int] = {}

    def place(self, value: Tensor) -> int:
        """Where a tensor is kept: without the rest of the memory that it is a view of."""
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else id(value)
        if key not in self._places:
            self._places[key] = len(self.kept)
            self.kept.append(value.detach().cpu().clone())
        return self._places[key]


def _record(what: str, function: Program, examples: Sequence[Tensor], tensors: _Tensors) -> dict[str, Any]:
    """A function as plain data, and where its constants are kept.

    :raises RuntimeError: if a graph cannot hold it.
    """
    try:
        found = trace(function, [], examples)
        if found.pinned_args:
            raise CannotCompile("a value is read by Python", found.read_at)
        plain = as_plain(found)
    except CannotCompile as error:
        raise RuntimeError(f"export: {what} cannot be written as operations of torch: {error}") from error
    return {**plain, "constants": [tensors.place(value) for value in found.constants]}


def _compare(stored: ExportedPosterior, functions: _Functions, device: torch.device) -> None:
    """Whether a file gives what the guide gives, at draws other than those that were recorded.

    :raises RuntimeError: if it does not.
    """
    with own_noise(device, seed=1):
        expected = functions.draw()
        scores = functions.log_prob(*expected)
    with own_noise(device, seed=1):
        drawn = stored._draw()
        found = stored._log_prob(*drawn)
    for what, one, other in (("draws", expected, drawn), ("log densities", scores, found)):
        for a, b in zip(one, other, strict=True):
            if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True):
                raise RuntimeError(
                    f"export: the {what} of the file are not those of the guide; nothing is written"
                )


def _write(content: Mapping[str, Any], path: File) -> None:
    if not isinstance(path, str | os.PathLike):
        torch.save(content, path)
        return
    with replacing(check_file("path", path)) as partial:
        torch.save(content, partial)
