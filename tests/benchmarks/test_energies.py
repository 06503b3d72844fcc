"""The benchmark of the four energies: densities in its lines of results."""

import json

import numpy as np

from benchmarks.fits.energies import GRID, grid, packed, unpacked


def test_a_density_survives_its_line():
    z = grid().numpy()
    density = np.exp(-0.5 * (z**2).sum(-1)).astype(np.float32)
    line = json.dumps(packed(density))
    assert len(line) < 0.5 * GRID**2
    np.testing.assert_allclose(unpacked(json.loads(line)), density, atol=density.max() / 500)
