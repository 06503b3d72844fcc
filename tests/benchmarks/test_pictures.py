"""Pictures with a palette: small, opaque, and of nearly the same colours."""

import numpy as np
import pytest

from benchmarks.common.pictures import digest, drawn_from, packed, save, unpacked

pyplot = pytest.importorskip("matplotlib.pyplot")


def test_a_palette_changes_little(tmp_path):
    from PIL import Image

    figure, axis = pyplot.subplots()
    axis.imshow(np.random.default_rng(0).random((80, 80)) ** 4, cmap="Blues")
    figure.savefig(tmp_path / "full.png", dpi=80)
    results = tmp_path / "results.jsonl"
    results.write_text("{}\n")
    save(figure, tmp_path / "small.png", results, dpi=80)
    pyplot.close(figure)
    names = ("full.png", "small.png")
    full, small = (np.asarray(Image.open(tmp_path / name).convert("RGB"), int) for name in names)
    assert np.abs(full - small).max() < 20
    assert drawn_from(tmp_path / "small.png") == digest(results)
    assert (tmp_path / "small.png").stat().st_size < 0.6 * (tmp_path / "full.png").stat().st_size


def test_counts_survive_their_line():
    counts = np.zeros((50, 50))
    counts[3:9, 20:30] = np.random.default_rng(0).integers(0, 60_000, (6, 10))
    text = packed(counts)
    assert len(text) < 500
    assert (unpacked(text, 50) == counts).all()
