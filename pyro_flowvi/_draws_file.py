"""The file that ``pyro-flowvi fit`` writes, draws or a posterior: what it needs, and how it is written."""

import importlib.util
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyro
import torch

from ._paths import check_file, replacing
from .diagnostics import to_arviz

__all__ = ["check_output", "check_writable", "save_draws"]

ENGINES: Final = {"h5netcdf": ("h5netcdf", "h5py"), "netcdf4": ("netCDF4",)}
"""What writes netCDF, and the modules that it needs.  ArviZ before 1.0 brings the first along."""
INSTALL: Final = "pip install 'pyro-flowvi[arviz]'"


def check_writable(option: str, path: str) -> None:
    """Whether a file can be written there: before the fit, not after it.

    :raises ValueError: naming the option, if it is a folder, or none can be written in its folder.

    Example::

        >>> check_writable("--output", "nowhere/draws.npz")
        Traceback (most recent call last):
        ValueError: --output: expected a file in a folder that exists, got 'nowhere/draws.npz'
    """
    if path.endswith(("/", os.sep)):
        raise ValueError(f"{option}: expected a file in a folder that exists, got {path!r}")
    try:
        with tempfile.TemporaryFile(dir=check_file(option, path).parent):
            pass
    except OSError as error:
        why = error.strerror
        raise ValueError(
            f"{option}: expected a folder that can be written in, got {path!r}: {why}"
        ) from error


def check_output(path: str, replace: bool, resample: bool = False) -> None:
    """Whether draws, or the posterior, can be saved there.

    :param replace: whether a file that is there may be replaced.
    :param resample: whether draws are to be resampled.
    :raises ValueError: for another ending, a file that exists, or where what writes netCDF is not installed.
    """
    check_writable("--output", path)
    ending = Path(path).suffix.lower()
    if ending not in (".npz", ".nc", ".pt"):
        raise ValueError(f"--output: expected a file that ends in .npz, .nc or .pt, got {path!r}")
    if ending == ".pt" and resample:
        raise ValueError(f"--output: expected .npz or .nc for resampled draws, got {path!r}")
    if Path(path).exists() and not replace:
        raise ValueError(f"--output: expected a new file, or --overwrite with it, got {path!r}, which exists")
    if ending == ".nc":
        for needed, found in (("ArviZ", _is_there("arviz")), ("h5netcdf and h5py, or netCDF4,", _engine())):
            if not found:
                raise ValueError(f"--output: expected {needed} for {path!r}, got none: {INSTALL}")


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _engine() -> str | None:
    return next((name for name, needs in ENGINES.items() if all(map(_is_there, needs))), None)


@torch.no_grad()
def save_draws(
    path: str,
    model: Callable[..., Any],
    data: Mapping[str, Any],
    guide: Any,
    *,
    num_samples: int,
    resample: bool,
    seed: int,
) -> None:
    """Draws of a guide, or its posterior, in a file; in the place of one that is there once all is written.

    :param path: as :func:`check_output` has found it good.
    """
    ending = Path(path).suffix.lower()
    with replacing(Path(path)) as partial:
        if ending == ".pt":
            guide.export(partial)
        elif ending == ".nc":
            options: dict[str, Any] = {"num_samples": num_samples, "resample": resample, "seed": seed}
            to_arviz(model, guide, model_kwargs=data, **options).to_netcdf(str(partial), engine=_engine())
        else:
            pyro.set_rng_seed(seed)  # the same draws from a checkpoint that had ended
            draws = guide.sample_posterior(num_samples, resample=resample)
            _write_arrays(partial, {name: value.cpu().numpy() for name, value in draws.items()})


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """An .npz of arrays with any names, also those of arguments of numpy's ``savez``."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
