"""The benchmark of calibration: its models can be simulated, and parts are put together as they are."""

import json

import numpy as np
import pytest

from benchmarks.common.results import read
from benchmarks.fits.calibration import FITS, MODELS, by_model, report
from pyro_flowvi._program.simulation import GenerativeModel


@pytest.mark.parametrize("name", MODELS)
def test_models_are_joint_distributions(name):
    model, args = MODELS[name]
    drawn = GenerativeModel(model, args()).draw()
    assert set(drawn.data) == {"y"}


def test_parts_are_put_together(tmp_path):
    path = tmp_path / "rows.jsonl"
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 1001, FITS - part) for part in range(2)]
    for part in (1, 0):
        row = {
            "model": "schools",
            "part": part,
            "seconds": 10.0,
            "verdicts": ["good"] * (FITS - part),
            "failures": ["FitDiverged: lost"] * part,
            "notes": {},
            "ranks": {"mu": parts[part].tolist()},
        }
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    found, seconds = by_model(read(path))["schools"]
    np.testing.assert_array_equal(found.ranks["mu"], np.concatenate(parts))
    assert (len(found), len(found.failures), seconds) == (2 * FITS - 1, 1, [1.0, 1.0])
    assert "| schools | good | 19 |" in report(path)
