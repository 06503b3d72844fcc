"""``pyro-flowvi fit``, from a user's point of view."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_flowvi import __version__, diagnose
from pyro_flowvi import _fit_command as command
from pyro_flowvi.__main__ import main
from pyro_flowvi._files import arguments_of, as_floats, load_data, load_model, stacked_columns
from pyro_flowvi.infer._training_loop import TrainingLoop

ROOT = Path(__file__).parents[1]
MODEL = """
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from beside import SCALE


@dataclass
class Prior:
    scale: "float" = SCALE


def model(y, n=None):
    mu = pyro.sample("mu", dist.Normal(0.0, Prior().scale))
    with pyro.plate("rows", len(y) if n is None else n):
        pyro.sample("file", dist.Normal(mu, 1.0), obs=y)


def broken(y):
    raise RuntimeError("no luck")
"""
# The posterior of mu is normal: precision 3 + 1/100, mean 6 over that.
MEAN, SD = 6 / 3.01, 3.01**-0.5


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("beside.py").write_text("SCALE = 10.0\n")
    Path("mine.py").write_text(MODEL)
    Path("data.csv").write_text("city,y\nBern,1\nBasel,2\nGenf,3\n")
    yield tmp_path
    for name in ("beside", "_model_file_mine"):
        sys.modules.pop(name, None)


FIT = ["fit", "--model", "mine.py:model", "--data", "data.csv"]


def process(*argv):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = [sys.executable, "-m", "pyro_flowvi", *argv]
    return subprocess.run(done, env=env, capture_output=True, text=True, timeout=200)


def test_a_fit_in_a_process(folder):
    done = process(*FIT, "--output", "draws.npz")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["mean", "sd", "5%", "50%", "95%", "ess"]
    assert float(lines[1].split()[1]) == pytest.approx(MEAN, abs=0.05)
    assert lines[3].startswith("good: ELBO")
    assert "FitResult(" in done.stderr
    assert "judging the fit" in done.stderr
    with np.load("draws.npz") as draws:
        assert draws["mu"].shape == (4000,)
        assert draws["mu"].dtype == np.float32
        assert draws["mu"].mean() == pytest.approx(MEAN, abs=0.05)
        assert draws["mu"].std() == pytest.approx(SD, rel=0.05)


def test_an_error_in_a_process(folder):
    done = process("fit", "--model", "mine.py:model", "--data", "data.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --data: expected an existing file, got 'data.txt'\n"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pyro-flowvi {__version__}\n"


def test_netcdf_float64_and_no_verdict(folder, capsys):
    arviz = pytest.importorskip("arviz")
    torch.set_default_dtype(torch.float32)
    argv = [*FIT, "--output", "draws.nc", "--num-samples", "50", "--dtype", "float64", "--no-diagnose"]
    assert main([*argv, "--quiet", "--num-steps", "20", "--guide", "planar"]) == 0
    assert torch.get_default_dtype() == torch.float32
    out, err = capsys.readouterr()
    assert "good" not in out
    assert err == ""
    posterior = arviz.from_netcdf("draws.nc").posterior
    assert posterior["mu"].shape == (1, 50)
    assert posterior["mu"].dtype == np.float64


@pytest.mark.parametrize(("asked", "code"), [([], 0), (["--fail-if-poor"], 3)])
def test_a_poor_verdict(folder, monkeypatch, capsys, asked, code):
    def poor(*args, **kwargs):
        return replace(diagnose(*args, **kwargs, probes=False), verdict="poor")

    monkeypatch.setattr(command, "diagnose", poor)
    assert main([*FIT, "--num-steps", "10", *asked]) == code
    assert "poor: ELBO" in capsys.readouterr().out


@pytest.mark.parametrize("checkpoint", [False, True])
def test_ctrl_c_saves_the_best_state(folder, monkeypatch, capsys, checkpoint):
    """The signal comes while steps are taken."""
    step = TrainingLoop.step

    def interrupted(loop):
        if loop.progress.step >= 30:
            signal.raise_signal(signal.SIGINT)
        return step(loop)

    monkeypatch.setattr(TrainingLoop, "step", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    more = ["--checkpoint", "run.ckpt"] if checkpoint else []
    try:
        argv = [*FIT, "--output", "draws.npz", "--tolerance", "1e-9", *more]
        assert main([*argv, "--num-steps", "1000"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert "mu" in out
    assert "good" not in out
    assert "interrupted: this is the best state so far; draws are in draws.npz" in err
    with np.load("draws.npz") as draws:
        assert draws["mu"].mean() == pytest.approx(MEAN, abs=0.1)


@pytest.mark.parametrize(
    ("stage", "words"), [("fit", "before the first step"), ("diagnose", "before the ver")]
)
def test_ctrl_c_elsewhere(folder, monkeypatch, capsys, stage, words):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, stage, interrupted)
    assert main([*FIT, "--num-steps", "10", "--output", "draws.npz"]) == 130
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed", "x"], "--seed: expected an integer from 0 to 4294967295, got 'x'"),
        (["--num-steps", "0"], "--num-steps: expected a positive integer, got '0'"),
        (["--lr", "-1"], "--lr: expected a positive number, got '-1'"),
        (["--dtype", "float16"], "--dtype: expected float32 or float64, got 'float16'"),
        (["--guide", "AutoRealNPV"], "got 'AutoRealNPV'; did you mean AutoRealNVP?"),
        (["--guide-arg", "layers=2"], "--guide-arg: expected some of affine, amortize"),
        (["--guide-arg", "num_layers=x"], "--guide-arg: num_layers: expected a positive integer, got 'x'"),
        (["--arg", "z=2"], "--arg: expected arguments of the model (n, y), got 'z'"),
        (["--arg", "z"], "--arg: expected NAME=VALUE, got 'z'"),
        (["--arg", "y=[1,[2]]"], "--arg: y: expected a list with parts of one length"),
        (["--columns", "y=city"], "--data: expected numbers in column 'city', got 'Bern' in row 1"),
        (["--columns", "y=age"], "got 'age'"),
        (["--float", "city"], "--float: expected one of y, got 'city'"),
        (["--output", "draws.txt"], "--output: expected a file that ends in .npz or .nc, got 'draws.txt'"),
        (["--output", "no/draws.nc"], "--output: expected a file in a folder that exists"),
        (["--resample"], "--resample: expected --output"),
        (["--fail-if-poor", "--no-diagnose"], "--fail-if-poor: expected a verdict, got --no-diagnose"),
        (["--data", "mine.py"], "--data: expected a file that ends in .json, .npz, .csv, .tsv, .parquet"),
        (["--model", "mine.py:Prior"], "--model: expected a function or an instance, got the class 'Prior'"),
    ],
)
def test_bad_usage(folder, capsys, argv, message):
    assert main([*FIT, *argv]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("error: ")
    assert (out, err.count("\n")) == ("", 1)


def test_a_file_that_raises(folder, capsys):
    Path("mine.py").write_text("x = 1\ny = x / 0\n")
    assert main(FIT) == 2
    assert "ZeroDivisionError: division by zero (mine.py, line 2)" in capsys.readouterr().err


def test_a_model_that_raises(folder, capsys):
    argv = ["fit", "--model", "mine.py:broken", "--data", "data.csv", "--quiet"]
    assert main(argv) == 1
    assert capsys.readouterr().err == "error: RuntimeError: no luck (mine.py, line 21)\n"
    with pytest.raises(RuntimeError, match="no luck"):
        main([*argv, "--traceback"])


def test_integers_where_floats_are_needed(folder, capsys):
    text = MODEL.replace("dist.Normal(mu, 1.0)", "dist.Bernoulli(logits=mu)")
    Path("mine.py").write_text(text)
    Path("data.csv").write_text("y\n1\n0\n1\n")
    argv = [*FIT, "--quiet", "--num-steps", "10", "--no-diagnose"]
    assert main(argv) == 1
    assert "see --float" in capsys.readouterr().err
    assert main([*argv, "--float", "y"]) == 0


def test_a_missing_argument(folder, capsys):
    assert main(["fit", "--model", "mine.py:model"]) == 2
    assert "--data: expected a value of the model's argument 'y', got no value" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["json", "csv", "tsv", "npz"])
def test_dtypes(folder, suffix):
    """Integers stay integers, other numbers have the default dtype, gaps are NaN."""
    columns = {"k": [1, 2, 3], "x": [1.0, 2.5, 3.0], "b": [True, False, True], "gap": [1, None, 3]}
    path = Path(f"all.{suffix}")
    if suffix == "json":
        path.write_text(json.dumps(columns))
    elif suffix == "npz":
        arrays = {k: np.array(v, dtype=float if k == "gap" else None) for k, v in columns.items()}
        np.savez(path, **{**arrays, "k": arrays["k"].astype(np.uint8)})
    else:
        rows = zip(*columns.values(), strict=True)
        lines = [columns, *(["" if v is None else str(v) for v in row] for row in rows)]
        path.write_text("\n".join({"csv": ",", "tsv": "\t"}[suffix].join(line) for line in lines))
    data = load_data(str(path))
    assert {name: value.dtype for name, value in data.items()} == {
        "k": torch.int64,
        "x": torch.get_default_dtype(),
        "b": torch.bool,
        "gap": torch.get_default_dtype(),
    }
    assert data["k"].tolist() == [1, 2, 3]
    assert data["x"].tolist() == [1.0, 2.5, 3.0]
    assert data["b"].tolist() == [True, False, True]
    assert data["gap"].isnan().tolist() == [False, True, False]
    assert as_floats(data, ["k"])["k"].dtype == torch.get_default_dtype()


@pytest.mark.parametrize("installed", [True, False])
def test_parquet(folder, monkeypatch, installed):
    if installed:
        pandas = pytest.importorskip("pandas")
        pytest.importorskip("pyarrow")
        frame = pandas.DataFrame({"city": ["a", "b"], "y": [1.5, 2.5], "k": pandas.array([1, None], "Int64")})
        frame.to_parquet("all.parquet")
        data = load_data("all.parquet", lambda y, k: None)
        assert data["y"].tolist() == [1.5, 2.5]
        assert data["k"].isnan().tolist() == [False, True]
        return
    monkeypatch.setitem(sys.modules, "pandas", None)
    Path("all.parquet").write_text("")
    with pytest.raises(ValueError, match="--data: expected pandas and pyarrow"):
        load_data("all.parquet")


def test_columns_make_a_matrix(folder):
    Path("wide.csv").write_text("a,b,text\n1,2.5,u\n3,4.5,v\n")
    columns = stacked_columns(["x=a,b", "one=a,", "y=a"])
    data = load_data("wide.csv", lambda x, one, y: None, columns)
    assert data["x"].tolist() == [[1.0, 2.5], [3.0, 4.5]]
    assert data["one"].tolist() == [[1], [3]]
    assert data["y"].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3\n", "expected 2 cells in each row, got 1 in row 2"),
        ("a,a\n1,2\n", "expected columns of different names"),
        ("a,b\n", "without rows"),
        ("", "without rows"),
    ],
)
def test_bad_tables(folder, text, message):
    Path("bad.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_data("bad.csv")


def test_bad_arrays(folder):
    Path("bad.npz").write_text("no")
    with pytest.raises(ValueError, match="--data: expected arrays"):
        load_data("bad.npz")


def test_single_values_override_data(folder):
    model = load_model("mine.py:model")
    data = arguments_of(model, {"y": torch.zeros(2)}, {"n": 3, "y": [1.5, None]})
    assert data["n"] == 3
    assert data["y"].isnan().tolist() == [False, True]
