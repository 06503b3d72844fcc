"""The parts of MNIST, and what is said of variational autoencoders on images."""

import numpy as np
import pytest

from benchmarks.common import mnist, pairs
from benchmarks.measured import images
from tests.idx_files import write_idx


def write_part(folder, split, count, side=2):
    """Images of which each pixel says the place, modulo 256."""
    places = np.arange(count) % 256
    write_idx(
        folder / f"{split}-images-idx3-ubyte.gz",
        np.tile(places[:, None, None], (1, side, side)).astype(np.uint8),
    )
    write_idx(folder / f"{split}-labels-idx1-ubyte.gz", (places % 10).astype(np.uint8))


def row(flow, layers, seed, bound, groups):
    scores = {"bound": bound, "nll": bound - 4.0, "train_bound": bound - 2.0, "groups": groups}
    return {
        "data": "MNIST",
        "gradient": "usual",
        "steps": 10,
        "flow": flow,
        "layers": layers,
        "seed": seed,
        **scores,
    }


class TestParts:
    def test_the_test_images_alone_are_cut_by_a_seed(self, tmp_path):
        write_part(tmp_path, "t10k", 10_000)
        parts = mnist.parts(tmp_path, seed=3)
        assert [part.images.shape for part in parts] == [(n, 1, 2, 2) for n in (8000, 1000, 1000)]
        whole = np.concatenate([part.images[:, 0, 0, 0] for part in parts])
        np.testing.assert_array_equal(np.sort(whole), np.sort(np.arange(10_000) % 256))
        for part in parts:
            np.testing.assert_array_equal(part.images[:, 0, 0, 0] % 10, part.labels)
        same, other = mnist.parts(tmp_path, seed=3), mnist.parts(tmp_path, seed=4)
        np.testing.assert_array_equal(same[2].images, parts[2].images)
        assert (other[2].images != parts[2].images).any()

    def test_of_four_files_a_tenth_of_the_training_images_validates(self, tmp_path):
        write_part(tmp_path, "train", 50)
        write_part(tmp_path, "t10k", 7)
        train, validation, test = mnist.parts(tmp_path)
        places = np.concatenate([train.images[:, 0, 0, 0], validation.images[:, 0, 0, 0]])
        np.testing.assert_array_equal(np.sort(places), np.arange(50))
        assert len(validation.images) == 5
        np.testing.assert_array_equal(test.images[:, 0, 0, 0], np.arange(7))
        assert mnist.name_of(tmp_path / "mnist", (train, validation, test)) == "MNIST, 45 images"
        assert mnist.name_of(tmp_path / "Fashion", (train, validation, test)) == "Fashion-MNIST, 45 images"

    def test_without_a_folder_there_is_an_error(self):
        with pytest.raises(ValueError, match="--data"):
            mnist.parts(None)


class TestPairs:
    def test_differences_are_of_the_seeds_that_both_have(self):
        ours = [{"seed": 2, "a": 5.0}, {"seed": 0, "a": 1.0}, {"seed": 1, "a": None}]
        theirs = [{"seed": 0, "a": 0.5}, {"seed": 2, "a": 7.0}, {"seed": 1, "a": 1.0}]
        np.testing.assert_allclose(pairs.differences(ours, theirs, "a"), [0.5, -2.0])

    def test_rows_of_two_settings_are_not_mixed(self):
        with pytest.raises(ValueError, match=r"rows: expected one of each seed, got seeds \[0, 0\]"):
            pairs.differences([{"seed": 0, "a": 1.0}, {"seed": 0, "a": 2.0}], [{"seed": 0, "a": 1.0}], "a")

    def test_standard_error(self):
        assert pairs.with_error(np.array([1.0, 2.0, 3.0])) == "2.00 ± 0.58"
        assert pairs.with_error(np.array([1.25])) == "1.25"
        assert pairs.with_error(np.array([])) == "–"


class TestFlowVAETable:
    def test_bounds_differences_and_published_figures(self):
        rows = [
            row("planar", 10, 0, 98.0, [97.0, 99.0]),
            row("none", 0, 0, 100.0, [99.0, 101.0]),
            row("planar", 10, 1, 97.0, [96.0, 98.0]),
            row("none", 0, 1, 101.0, [99.0, 103.0]),
            row("planar", 40, 1, 96.5, [96.0, 97.0]),
        ]
        lines = images.flow_vae(rows).splitlines()
        assert lines[0] == "MNIST, 10 steps with the gradient of `Trace_ELBO`:"
        # Pairs: -2 and -4 by the seed; -2.5 and -3.5 by the groups of images.
        assert lines[4].startswith("| none | 0 | 2 | 100.50 ± 0.50 |")
        assert lines[4].endswith("| – | – | 89.9 |")
        assert lines[5].endswith("| 93.50 ± 0.50 | 95.50 ± 0.50 | -3.00 ± 1.00 (images: ± 0.50) | – | 87.5 |")
        assert lines[6].endswith("| -4.50 (images: ± 1.50) | -0.50 (images: ± 0.50) | 85.7 |")
