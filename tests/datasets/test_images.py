"""Images from files in the IDX format."""

import numpy as np
import pytest

from pyro_flowvi.datasets import idx_images, read_idx
from tests.idx_files import write_idx


def test_read_idx(tmp_path):
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    for name in ("a-ubyte", "a-ubyte.gz"):
        write_idx(tmp_path / name, array)
        assert np.array_equal(read_idx(tmp_path / name), array)
    numbers = np.array([1, -2, 70_000], dtype=np.int32)
    write_idx(tmp_path / "b", numbers, code=12)
    assert read_idx(tmp_path / "b").tolist() == [1, -2, 70_000]
    (tmp_path / "cut").write_bytes((tmp_path / "a-ubyte").read_bytes()[:-1])
    (tmp_path / "text").write_text("no such file")
    for name in ("cut", "text"):
        with pytest.raises(ValueError, match="path: expected an IDX file"):
            read_idx(tmp_path / name)


def test_idx_images(tmp_path):
    rng = np.random.default_rng(0)
    for split, dots, count in (("train", "-", 6), ("t10k", ".", 3)):
        pixels = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        write_idx(tmp_path / f"{split}-images{dots}idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{split}-labels{dots}idx1-ubyte", np.arange(count, dtype=np.uint8))
    train, test = idx_images(tmp_path)
    assert (train.images.shape, train.num_levels) == ((6, 1, 28, 28), 256)
    assert test.labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="directory: expected"):
        idx_images(tmp_path / "missing")
