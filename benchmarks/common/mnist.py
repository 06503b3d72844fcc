"""MNIST, or another set in its files, in three parts: to train with, to validate and to test.

Of a folder with the four files, the last tenth of the training images in random order validates.  Of one
with MNIST's 10,000 test images alone, a seed makes parts of 8,000, 1,000 and 1,000.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_flowvi.datasets import LabelledImages, idx_images, read_idx
from pyro_flowvi.models import binarize

TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
SPLIT = (8000, 9000)
FIXED_SET = 12345
"""Seed of the binarised validation and test sets."""
Parts = tuple[LabelledImages, LabelledImages, LabelledImages]


def parts(folder: Path | None, seed: int = 0) -> Parts:
    """The three parts; images of 256 levels, shape ``(N, 1, H, W)``.

    :param folder: with all four files, or with the two of the test images alone.
    :param seed: of the order from which the parts are cut.
    :raises ValueError: without a folder, or if its files are not of that format.
    """
    if folder is None:
        raise ValueError("expected --data to name a folder with MNIST's files, got nothing")
    generator = np.random.default_rng(seed)
    if any(folder.glob("train-images*")):
        train, test = idx_images(folder)
        order = generator.permutation(len(train.images))
        rest, held_out = np.split(order, [len(order) - len(order) // 10])
        return taken(train, rest), taken(train, held_out), test
    images = read_idx(folder / TEST_IMAGES).astype(np.int64)[:, None]
    whole = LabelledImages(images, read_idx(folder / TEST_LABELS).astype(np.int64), num_levels=256)
    train, validation, test = (
        taken(whole, rows) for rows in np.split(generator.permutation(len(images)), SPLIT)
    )
    return train, validation, test


def taken(part: LabelledImages, rows: np.ndarray) -> LabelledImages:
    """The images of these rows."""
    return LabelledImages(part.images[rows], part.labels[rows], part.num_levels)


def binarized(whole: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """Means of pixels to train with, and the validation and test images, binarised once; float32."""
    train, validation, test = (
        torch.from_numpy(part.images / (part.num_levels - 1)).float() for part in whole
    )
    return train, binarize(validation, FIXED_SET), binarize(test, FIXED_SET)


def name_of(folder: Path, whole: Parts) -> str:
    """What a folder has, and how many images of it train: so the published split has another name."""
    name = "Fashion-MNIST" if "fashion" in folder.name.lower() else "MNIST"
    return f"{name}, {len(whole[0].images):,} images"
