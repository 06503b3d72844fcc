"""The benchmark of posteriors of images: the split, the sizes, and paired differences."""

import argparse
import math

import numpy as np
import pytest
import torch

from benchmarks.common import mnist
from benchmarks.common.pairs import differences, over_images
from benchmarks.fits import cif_images
from benchmarks.measured import images, mixtures
from tests.idx_files import write_idx


@pytest.fixture
def folder(tmp_path):
    """As many images as MNIST tests with, of 4 x 4 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (10_000, 4, 4)).astype(np.uint8)
    write_idx(tmp_path / mnist.TEST_IMAGES, pixels)
    write_idx(tmp_path / mnist.TEST_LABELS, (np.arange(10_000) % 10).astype(np.uint8))
    return tmp_path


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
            row["warm_up"] = 0
            found.append(row)
    return found


def test_differences_are_paired():
    whole = rows()
    for first, second, gain in (("NSF", "VAE", 2.0), ("CIF-NSF", "NSF", 0.5)):
        both = [[row for row in whole if row["posterior"] == kind] for kind in (first, second)]
        seeds = differences(*both, "test_ll")
        assert seeds.shape == (4,)
        # Of one seed the noise is .5 √2 / √1000; what all posteriors share, of 5 and 20, is not in it.
        assert np.abs(seeds - gain).max() < 5 * 0.5 * math.sqrt(2.0 / 1000)
        at_images = over_images(*both, "image_ll")
        assert at_images.mean() == pytest.approx(seeds.mean())
        assert at_images.std() == pytest.approx(0.5 * math.sqrt(2.0 / 4), rel=0.15)
    assert over_images(both[0], [], "image_ll").size == 0


def test_the_page_has_differences_beside_published_ones():
    text = images.cif_images(rows())
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
