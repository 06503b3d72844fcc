"""The command line, from a user's point of view."""

import json
import math
import re

import numpy as np
import pytest
import torch

from pyro_flowvi import Diagnosis
from pyro_flowvi.__main__ import main
from pyro_flowvi._data_files import load_data
from pyro_flowvi._files import load_model
from pyro_flowvi.datasets import EIGHT_SCHOOLS, eight_schools_reference
from pyro_flowvi.demo import Row, eight_schools, run_demo, table

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib.*")

MODEL = """
import pyro
import pyro.distributions as dist

def model(y, n):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", n):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

number = 3
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "data.json").write_text(json.dumps({"y": [1.0, 2.0, 3.0], "n": 3}))
    return tmp_path


@pytest.fixture(autouse=True)
def _float32():
    torch.set_default_dtype(torch.float32)


@pytest.mark.long
def test_eight_schools(tmp_path, capsys):
    figure = tmp_path / "funnel.png"
    assert main(["demo", "--steps", "20", "--figure", str(figure)]) == 0
    out, err = capsys.readouterr()
    for name in (
        "AutoNormal (Pyro)",
        "AutoPlanar",
        "AutoRadial",
        "AutoRealNVP",
        "PSIS k-hat",
        "verdict",
        "worst |mean error|/sd",
    ):
        assert name in out
    assert str(figure) in out
    assert figure.stat().st_size > 10_000
    assert "judging AutoRealNVP" in err
    assert "judging AutoRealNVP" in err


def test_own_model(files, capsys):
    figure = files / "mine.png"
    argv = ["demo", "--model", f"{files / 'mine.py'}:model", "--data", str(files / "data.json")]
    assert main([*argv, "--steps", "20", "--figure", str(figure)]) == 0
    assert figure.exists()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    for name in ("AutoNormal (Pyro)", "AutoPlanar", "AutoRadial", "AutoRealNVP"):
        place = lines.index(name)
        assert re.match(r"(good|usable|poor): ELBO .*, k-hat (-|\d+\.\d\d)", lines[place + 1])
        assert lines[place + 2].startswith("  - ")
        assert f"judging {name}" in err
    assert "inf" not in out


def test_a_khat_without_meaning_is_a_dash():
    equal = Diagnosis(-3.2, 0.0, -3.2, 4000.0, -math.inf, 4000, "good", ())
    assert table([Row("exact", equal, None, 1.0, {})]).splitlines()[1].split()[-4:] == [
        "-",
        "good",
        "-",
        "1.0",
    ]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mine.py", "--model: expected path.py:name"),
        ("mine.py:", "--model: expected path.py:name"),
        ("other.py:model", "--model: expected an existing file"),
        ("mine.py:nothing", "expected the name of a function in"),
        ("mine.py:number", "--model: expected a function 'number'"),
    ],
)
def test_bad_model(files, capsys, model, message):
    assert main(["demo", "--model", str(files / model)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [("[1, 2]", "a JSON object"), ("{", "expected JSON")])
def test_bad_data(files, capsys, text, message):
    (files / "data.json").write_text(text)
    argv = ["demo", "--model", f"{files / 'mine.py'}:model", "--data", str(files / "data.json")]
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_data_without_a_model(files, capsys):
    assert main(["demo", "--data", str(files / "data.json")]) == 2
    assert "--data: expected --model" in capsys.readouterr().err


def test_loaders(files):
    model = load_model(f"{files / 'mine.py'}:model")
    data = load_data(str(files / "data.json"))
    assert data["n"] == 3
    model(**data)


def test_reference_agrees_with_quadrature():
    """theta integrates out: y_j ~ N(mu, tau² + sigma_j²) leaves a 2-D integral."""
    y, sigma = (np.array(EIGHT_SCHOOLS[key]) for key in ("y", "sigma"))
    mu = np.linspace(-30, 30, 601)[:, None, None]
    log_tau = np.linspace(-9, 5, 1401)[None, :, None]
    tau = np.exp(log_tau)
    variance = tau**2 + sigma**2
    log_density = (-0.5 * (y - mu) ** 2 / variance - 0.5 * np.log(variance)).sum(-1)
    log_density = log_density + (-0.5 * mu**2 / 25 - np.log1p(tau**2 / 25) + log_tau)[..., 0]
    weight = np.exp(log_density - log_density.max())
    weight /= weight.sum()
    shrink = tau**2 / variance
    theta = shrink * y + (1 - shrink) * mu
    means = [(weight * mu[..., 0]).sum(), (weight * tau[..., 0]).sum()]
    means += list((weight[..., None] * theta).sum((0, 1)))
    second = [(weight * mu[..., 0] ** 2).sum(), (weight * tau[..., 0] ** 2).sum()]
    within = shrink * sigma**2
    second += list((weight[..., None] * (theta**2 + within)).sum((0, 1)))
    sd = np.sqrt(np.array(second) - np.array(means) ** 2)
    reference = eight_schools_reference()
    assert (np.abs(reference.mean - means) / sd).max() < 0.03
    assert np.abs(np.log(reference.sd / sd)).max() < 0.03


@pytest.mark.slow
def test_flows_beat_the_gaussian():
    rows = {row.name: row for row in run_demo(progress=False)}
    normal = rows.pop("AutoNormal (Pyro)")
    for row in rows.values():
        assert row.diagnosis.elbo > normal.diagnosis.elbo + 1.0
        assert row.error < normal.error
    assert "AutoPlanar" in table([*rows.values()])


def test_model_is_the_textbooks():
    eight_schools(*(torch.tensor(EIGHT_SCHOOLS[key]) for key in ("y", "sigma")))
