"""Data sets of the source papers, embedded so that nothing is downloaded."""

import gzip
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import constraints

from ._checks import check_positive_int
from .numerics import safe_norm

__all__ = [
    "EIGHT_SCHOOLS",
    "ENERGIES",
    "ENERGY_BOX",
    "Energy",
    "LabelledImages",
    "Reference",
    "digits",
    "eight_schools_reference",
    "idx_images",
    "read_idx",
    "two_moons",
]

EIGHT_SCHOOLS: Final[dict[str, list[float]]] = {
    "y": [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0],
    "sigma": [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0],
}
"""Coaching effects on SAT scores in eight schools, points (Rubin 1981; Gelman et al., *Bayesian
Data Analysis*, section 5.5): estimated effects ``y`` and their standard errors ``sigma``."""


@dataclass(frozen=True)
class Reference:
    """A trusted posterior to compare with.

    :param names: of the D scalar quantities.
    :param mean: posterior means of the whole run, shape ``(D,)``.
    :param sd: posterior standard deviations of the whole run, shape ``(D,)``.
    :param draws: a thinned subset, shape ``(S, D)``.

    Example::

        >>> reference = Reference(("x",), np.zeros(1), np.ones(1), np.zeros((5, 1), np.float32))
        >>> reference.draws.shape
        (5, 1)
    """

    names: tuple[str, ...]
    mean: NDArray[np.float64]
    sd: NDArray[np.float64]
    draws: NDArray[np.float32]


def eight_schools_reference() -> Reference:
    """The stored long NUTS run on the eight schools.

    ``benchmarks/eight_schools_reference.py`` regenerates it.  Sampled in the non-centred form,
    since NUTS on the centred funnel is biased.

    Example::

        >>> reference = eight_schools_reference()
        >>> reference.names[:3], reference.draws.shape
        (('mu', 'tau', 'theta[0]'), (2000, 10))
    """
    with files("pyro_flowvi").joinpath("data/eight_schools_reference.npz").open("rb") as file:
        stored: Any = np.load(file)
        return Reference(tuple(map(str, stored["names"])), stored["mean"], stored["sd"], stored["draws"])


@dataclass(frozen=True)
class LabelledImages:
    """Images of integers, and what they show.

    :param images: integers from 0 to ``num_levels`` - 1, shape ``(N, C, H, W)``.
    :param labels: integers, shape ``(N,)``.
    :param num_levels: the number of levels.

    Example::

        >>> LabelledImages(np.zeros((5, 1, 8, 8), np.int64), np.arange(5), 17).images.shape
        (5, 1, 8, 8)
    """

    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    num_levels: int


def digits(seed: int = 0) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """The 1797 handwritten digits of 8 x 8 pixels and 17 levels that come with scikit-learn.

    Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998:
    its test part.

    :param seed: of the order from which the parts are cut.
    :return: 1297 images to train with, 100 to validate and 400 to test, in random order.
    :raises ImportError: without scikit-learn, the extra ``sklearn``.

    Example::

        >>> train, validation, test = digits()  # doctest: +SKIP
        >>> train.images.shape, test.labels.shape  # doctest: +SKIP
        ((1297, 1, 8, 8), (400,))
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = "digits needs scikit-learn: install pyro-flowvi with the extra 'sklearn'"
        raise ImportError(message) from error
    whole = load_digits()
    images = whole.images.astype(np.int64)[:, None]
    labels = whole.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    train, validation, test = (
        LabelledImages(images[rows], labels[rows], num_levels=17) for rows in np.split(order, [1297, 1397])
    )
    return train, validation, test


_IDX_DTYPES: Final = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_idx(path: str | Path) -> NDArray[Any]:
    """An array in the IDX format, in which MNIST and its kin are distributed; gzipped or not.

    :param path: of the file.
    :return: the array, in the machine's byte order.
    :raises ValueError: if the file is not of that format, or cut short.

    Example::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory) / "labels-idx1-ubyte"
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
        ...     read_idx(path).tolist()
        [7, 2, 1]
    """
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_DTYPES:
        raise ValueError(f"path: expected an IDX file, got {Path(path).name} with the start {data[:4]!r}")
    dtype, rank = np.dtype(_IDX_DTYPES[data[2]]), data[3]
    start = 4 + 4 * rank
    shape = tuple(np.frombuffer(data[4:start], ">u4").astype(int)) if len(data) >= start else (-1,)
    if len(data) != start + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"path: expected an IDX file of shape {shape}, got {len(data)} bytes")
    array: NDArray[Any] = np.frombuffer(data, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def idx_images(directory: str | Path) -> tuple[LabelledImages, LabelledImages]:
    """The training and test part of MNIST, Fashion-MNIST or another set in the same four files.

    :param directory: with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and their counterparts
        whose names start with ``t10k``; a dot for the second dash, and ``.gz`` at the end, are fine.
    :return: images of 256 levels, shape ``(N, 1, H, W)``, with their labels.
    :raises ValueError: if a file is missing or not of that format.

    Example::

        >>> train, test = idx_images("mnist")  # doctest: +SKIP
        >>> train.images.shape, test.images.shape  # doctest: +SKIP
        ((60000, 1, 28, 28), (10000, 1, 28, 28))
    """

    def array(split: str, kind: str, rank: int) -> NDArray[Any]:
        names = [f"{split}-{kind}{mark}idx{rank}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
        found = [path for name in names if (path := Path(directory) / name).is_file()]
        if not found:
            raise ValueError(f"directory: expected {names[0]} or {names[1]} there, got none in {directory}")
        values = read_idx(found[0])
        if values.ndim != rank:
            raise ValueError(f"directory: expected {rank} dimensions in {found[0].name}, got {values.ndim}")
        return values.astype(np.int64)

    train, test = (
        LabelledImages(array(split, "images", 3)[:, None], array(split, "labels", 1), num_levels=256)
        for split in ("train", "t10k")
    )
    return train, test


def two_moons(num: int = 100, noise: float = 0.05, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Two interleaving half circles of radius 1, evenly spaced along them, with Gaussian noise.

    The curves of scikit-learn's ``make_moons``; it is not needed.

    :param num: the number of points N, of which the upper moon has N // 2.
    :param noise: standard deviation of the noise in each coordinate.
    :param seed: of the noise.
    :return: points, shape ``(N, 2)``, and labels, 0 on the upper moon and 1 on the lower, shape ``(N,)``.
    :raises ValueError: if ``num`` is not a positive integer, or ``noise`` is negative or not finite.

    Example::

        >>> points, labels = two_moons(100)
        >>> points.shape, labels.sum()
        ((100, 2), np.int64(50))
    """
    upper = check_positive_int("num", num) // 2
    if not 0.0 <= noise < math.inf:
        raise ValueError(f"noise: expected a number that is not negative, got {noise!r}")
    first, second = np.linspace(0.0, math.pi, upper), np.linspace(0.0, math.pi, num - upper)
    moons = np.concatenate(
        [
            np.stack([np.cos(first), np.sin(first)], -1),
            np.stack([1.0 - np.cos(second), 0.5 - np.sin(second)], -1),
        ]
    )
    labels = np.repeat([0, 1], [upper, num - upper])
    return moons + noise * np.random.default_rng(seed).standard_normal(moons.shape), labels


ENERGY_BOX: Final = (-4.0, 4.0)
"""The interval to which z1 is confined under the :data:`ENERGIES`: three of them are improper without."""


def _bell(x: Tensor, scale: float) -> Tensor:
    """The logarithm of a Gaussian bell of height 1."""
    return -0.5 * (x / scale).square()


def _wave(z: Tensor) -> Tensor:
    """z2 - w1, the height above the wave w1 = sin(2 pi z1 / 4)."""
    return z[..., 1] - torch.sin(0.5 * math.pi * z[..., 0])


def _ring(z: Tensor) -> Tensor:
    two_spots = torch.logaddexp(_bell(z[..., 0] - 2.0, 0.6), _bell(z[..., 0] + 2.0, 0.6))
    return -_bell(safe_norm(z) - 2.0, 0.4) - two_spots


def _one_wave(z: Tensor) -> Tensor:
    return -_bell(_wave(z), 0.4)


def _split_wave(z: Tensor) -> Tensor:
    w2 = 3.0 * _bell(z[..., 0] - 1.0, 0.6).exp()
    return -torch.logaddexp(_bell(_wave(z), 0.35), _bell(_wave(z) + w2, 0.35))


def _forked_wave(z: Tensor) -> Tensor:
    w3 = 3.0 * torch.sigmoid((z[..., 0] - 1.0) / 0.3)
    return -torch.logaddexp(_bell(_wave(z), 0.4), _bell(_wave(z) + w3, 0.35))


@dataclass(frozen=True)
class Energy:
    r"""An unnormalised density of two variables, :math:`p(z) = e^{-U(z)} / Z` for z1 in ENERGY_BOX.

    For a guide q of :meth:`model`, KL(q || p) = E[log q(z) + U(z)] + log Z = -ELBO + log Z, exactly.

    :param name: of the energy.
    :param function: U, from z of shape ``(*, 2)`` to ``(*,)``.
    :param log_normalizer: log Z.

    Example::

        >>> energy = Energy("bowl", lambda z: 0.5 * z.square().sum(-1), 1.837814)
        >>> energy(torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
        tensor([0.0000, 2.5000])
    """

    name: str
    function: Callable[[Tensor], Tensor]
    log_normalizer: float

    def __call__(self, z: Tensor) -> Tensor:
        """U(z), shape ``(*,)``, of z of shape ``(*, 2)``."""
        return self.function(z)

    def model(self, weight: float | Tensor = 1.0) -> None:
        """A Pyro model of the sites "z1", in ENERGY_BOX, and "z2", real, of log density -``weight`` U.

        :param weight: 1 for the target; less, to begin with a flatter one (annealing).
        """
        z1 = pyro.sample("z1", dist.ImproperUniform(constraints.interval(*ENERGY_BOX), (), ()))
        z2 = pyro.sample("z2", dist.ImproperUniform(constraints.real, (), ()))
        pyro.factor("minus_energy", -weight * self(torch.stack([z1, z2], -1)))


ENERGIES: Final[Mapping[str, Energy]] = MappingProxyType(
    {
        "U1": Energy("U1", _ring, 1.877502),
        "U2": Energy("U2", _one_wave, 2.082089),
        "U3": Energy("U3", _split_wave, 2.641705),
        "U4": Energy("U4", _forked_wave, 2.710698),
    }
)
"""The four test energies of Rezende and Mohamed, *Variational Inference with Normalizing Flows*, 2015,
table 1: a ring with two spots, a wave, a wave that splits and joins, a wave that forks::

    >>> ENERGIES["U2"](torch.tensor([1.0, 1.0]))
    tensor(0.)
    >>> guide = pyro_flowvi.AutoPlanar(ENERGIES["U2"].model).materialize()
    >>> sorted(guide.sample_posterior(3))
    ['z1', 'z2']
"""
