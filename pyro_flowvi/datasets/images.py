"""Labelled images: the digits that come with scikit-learn, and files in the IDX format."""

import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["LabelledImages", "digits", "idx_images", "read_idx"]


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
