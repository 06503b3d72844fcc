"""The benchmark of posteriors of images: the split, the sizes, and paired differences."""

import argparse
import gzip
import math
import struct

import numpy as np
import pytest
import torch

from benchmarks.common import mnist
from benchmarks.common.paired import by_image, by_seed, with_error
from benchmarks.fits import cif_images
from benchmarks.measured import mixtures


def write_idx(path, array):
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.fixture
def folder(tmp_path):
    """As many images as MNIST tests with, of 4 x 4 pixels, each with its place in its first three pixels."""
    places = np.arange(10_000)
    images = np.random.default_rng(0).integers(0, 256, (10_000, 4, 4))
    images[:, 0, 0], images[:, 0, 1] = places // 256, places % 256
    write_idx(tmp_path / mnist.TEST_IMAGES, images)
    write_idx(tmp_path / mnist.TEST_LABELS, places % 10)
    return tmp_path


def places(part):
    return part.images[:, 0, 0, 0] * 256 + part.images[:, 0, 0, 1]


def test_the_parts_share_no_image(folder):
    parts = mnist.parts(folder, 0)
    assert [len(part.images) for part in parts] == [8000, 1000, 1000]
    found = np.concatenate([places(part) for part in parts])
    assert sorted(found) == list(range(10_000))
    for part in parts:
        assert (part.labels == places(part) % 10).all()
    assert mnist.name_of(parts) == "MNIST, 8,000 images"
    assert (places(mnist.parts(folder, 0)[2]) == places(parts[2])).all()
    assert (places(mnist.parts(folder, 1)[2]) != places(parts[2])).any()


def test_a_run_scores_every_image(folder, tmp_path):
    torch.set_default_dtype(torch.float32)  # that of the images
    whole = mnist.parts(folder, 0)
    few = tuple(mnist.taken(part, np.arange(n)) for part, n in zip(whole, (200, 10, 7), strict=True))
    key = {"layers": 1, "posterior": "VAE", "seed": 0, "steps": 3, "rate": 1e-3, "warm_up": 0}
    arguments = argparse.Namespace(device="cpu", checkpoints=tmp_path / "runs")
    row = cif_images.run_published(key, few, arguments)
    assert row["steps_taken"] == 3
    assert row["parameters"] == cif_images.check_sizes(cif_images.published(1), (1, 4, 4))["VAE"]
    assert len(row["image_ll"]) == 7
    assert np.mean(row["image_ll"]) == pytest.approx(row["test_ll"], abs=0.01)
    assert row["test_elbo"] < row["test_ll"] < 0.0
    assert len(list(arguments.checkpoints.iterdir())) == 1


@pytest.mark.parametrize("layers", [1, 5, 10])
def test_parameters_match(layers):
    shape = (1, 28, 28)
    sizes = cif_images.check_sizes(cif_images.published(layers), shape)
    assert sizes["NSF"] == pytest.approx(sizes["CIF-NSF"], rel=0.01)
    with pytest.raises(ValueError, match=r"^hidden: expected widths that match"):
        cif_images.check_sizes(cif_images.Setting(20, layers, ((44, 44), (44, 44)), 2), shape)


def test_log_evidence_is_that_of_the_marginal():
    """A decoder that reads no latent leaves p(x) a product of Bernoullis."""
    decoder = torch.nn.Linear(2, 16)
    torch.nn.init.zeros_(decoder.weight)
    x = torch.bernoulli(torch.full((5, 16), 0.4))
    p = decoder.bias.sigmoid()
    expected = (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)
    torch.testing.assert_close(cif_images.log_evidence(decoder, x), expected.detach(), rtol=0, atol=1e-3)


def rows():
    """Values that differ much from seed to seed and from image to image, and little between posteriors."""
    generator = np.random.default_rng(3)
    gains = {"VAE": 0.0, "NSF": 2.0, "CIF-NSF": 2.5}
    found = []
    for seed in range(4):
        common = -90.0 + 5.0 * generator.standard_normal() + 20.0 * generator.standard_normal(1000)
        for kind, gain in gains.items():
            values = common + gain + 0.5 * generator.standard_normal(1000)
            row = {"posterior": kind, "seed": seed, "image_ll": values.tolist(), "test_ll": values.mean()}
            row |= {"test_elbo": values.mean() - 3.0, "parameters": 1000, "cpu_seconds": 10.0}
            row |= {"data": "MNIST, 8,000 images", "test": "published", "steps": 50, "rate": 0.1, "layers": 2}
            found.append(row)
    return found


def test_differences_are_paired():
    whole = rows()
    for first, second, gain in (("NSF", "VAE", 2.0), ("CIF-NSF", "NSF", 0.5)):
        seeds = by_seed(whole, first, second, "test_ll")
        assert seeds.shape == (4,)
        # Of one seed the noise is .5 √2 / √1000; what all posteriors share, of 5 and 20, is not in it.
        assert np.abs(seeds - gain).max() < 5 * 0.5 * math.sqrt(2.0 / 1000)
        images = by_image(whole, first, second)
        assert images.mean() == pytest.approx(seeds.mean())
        assert images.std() == pytest.approx(0.5 * math.sqrt(2.0 / 4), rel=0.15)


def test_only_seeds_of_both_are_paired():
    whole = [row for row in rows() if not (row["posterior"] == "NSF" and row["seed"] == 2)]
    assert len(by_seed(whole, "NSF", "VAE", "test_ll")) == 3
    assert len(by_seed(whole[:1], "NSF", "VAE", "test_ll")) == 0
    assert by_image(whole[:1], "NSF", "VAE").size == 0


def test_a_mean_has_its_standard_error():
    assert with_error(np.array([1.0, 3.0]), 2) == "2.00 ± 1.00"
    assert with_error(np.array([1.5]), 1) == "1.5 ± nan"
    assert with_error(np.array([])) == "–"


def test_the_page_has_differences_beside_published_ones():
    text = mixtures.cif_images(rows())
    assert "| CIF-NSF less NSF | 0.5" in text
    assert text.count("0.73 ± 0.17 |") == 1
    assert "-82.95 ± 0.11" in text


def test_the_table_of_islands_has_the_range_of_all_seeds():
    key = {"target": "nine", "layers": 5, "base": "1", "tempered": False, "flow": "cif", "steps": 9}
    scores = [(-0.5, 0.10, 0.13), (-0.1, 0.05, 0.12), (-0.2, 0.09, 0.20)]
    whole = [
        {**key, "seed": seed, "elbo": elbo, "least": least, "most": most, "cpu_seconds": 7.0 + seed}
        | {"least_resampled": 0.11, "most_resampled": 0.11}
        for seed, (elbo, least, most) in enumerate(scores)
    ]
    line = mixtures.cif_mixture(whole).splitlines()[-1]
    assert "| -0.200 (-0.500 to -0.100) | 0.050 to 0.200 | 0.110 to 0.110 | 8 |" in line
