"""``pyro-flowvi fit`` on one process, from a user's point of view."""

import importlib.util
import re
import signal
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_flowvi import FitDiverged, FitResult, __version__, _draws_file, diagnose, load_posterior
from pyro_flowvi import _fit_command as command
from pyro_flowvi.__main__ import main
from pyro_flowvi._command_words import fit_words, in_options
from pyro_flowvi._files import arguments_of, load_model, single_values
from pyro_flowvi.diagnostics import _verdict
from pyro_flowvi.infer._training_loop import TrainingLoop

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


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pyro-flowvi {__version__}\n"


@pytest.mark.parametrize("engine", _draws_file.ENGINES)
def test_netcdf_float64_and_no_verdict(folder, monkeypatch, capsys, engine):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("arviz")
    for module in _draws_file.ENGINES[engine]:
        pytest.importorskip(module)
    monkeypatch.setattr(_draws_file, "ENGINES", {engine: _draws_file.ENGINES[engine]})
    torch.set_default_dtype(torch.float32)
    argv = [*FIT, "--output", "draws.nc", "--num-samples", "50", "--dtype", "float64", "--no-diagnose"]
    assert main([*argv, "--quiet", "--num-steps", "20", "--guide", "planar"]) == 0
    assert torch.get_default_dtype() == torch.float32
    out, err = capsys.readouterr()
    assert "good" not in out
    assert err == ""
    with xarray.open_dataset("draws.nc", group="posterior", engine=engine) as posterior:
        assert posterior["mu"].shape == (1, 50)
        assert posterior["mu"].dtype == np.float64
    with xarray.open_dataset("draws.nc", group="log_likelihood", engine=engine) as likelihood:
        assert likelihood["file"].dims == ("chain", "draw", "rows")


@pytest.mark.parametrize(
    ("missing", "needed"), [("arviz", "ArviZ"), ("h5py", "h5netcdf and h5py, or netCDF4,")]
)
def test_netcdf_without_what_it_needs(folder, monkeypatch, capsys, missing, needed):
    there = importlib.util.find_spec
    gone = (missing, "netCDF4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else there(name))
    assert main([*FIT, "--output", "draws.nc"]) == 2
    told = f"error: --output: expected {needed} for 'draws.nc', got none: pip install 'pyro-flowvi[arviz]'\n"
    assert capsys.readouterr().err == told


def test_an_output_that_exists(folder, capsys):
    argv = [*FIT, "--num-steps", "10", "--no-diagnose", "--output", "draws.npz"]
    Path("draws.npz").write_text("of another run")
    assert main(argv) == 2
    message = "--output: expected a new file, or --overwrite with it, got 'draws.npz', which exists"
    assert message in capsys.readouterr().err
    assert Path("draws.npz").read_text() == "of another run"
    assert main([*argv, "--overwrite"]) == 0
    assert zipfile.is_zipfile("draws.npz")
    assert main([*argv, "--overwrite", "--checkpoint", "run.ckpt"]) == 0
    assert main([*argv, "--checkpoint", "run.ckpt"]) == 0  # the same run, which goes on


def test_a_posterior_for_other_processes(folder, capsys):
    assert main([*FIT, "--num-steps", "10", "--no-diagnose", "--output", "posterior.pt"]) == 0
    assert "saved: posterior.pt" in capsys.readouterr().err
    draws = load_posterior("posterior.pt").sample_posterior(5)
    assert draws["mu"].shape == (5,)
    assert not list(Path().glob("*.partial"))


def test_draws_that_cannot_be_written(folder, monkeypatch, capsys):
    """What was there stays, and nothing is left behind."""

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_draws_file, "_write_arrays", full)
    Path("draws.npz").write_text("of another run")
    argv = [*FIT, "--quiet", "--num-steps", "10", "--output", "draws.npz", "--overwrite"]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert "mu" in out
    assert err == "error: OSError: [Errno 28] No space left on device\n"
    assert Path("draws.npz").read_text() == "of another run"
    assert not list(Path().glob("*.partial"))


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
    more = "with --checkpoint FILE the same command can go on"
    more = "run.ckpt is not written yet, which is every half minute" if checkpoint else more
    assert f"interrupted: this is the best state so far; draws.npz is saved; {more}" in err
    with np.load("draws.npz") as draws:
        assert draws["mu"].mean() == pytest.approx(MEAN, abs=0.1)


@pytest.mark.skipif(sys.platform == "win32", reason="nothing sends SIGTERM there")
def test_sigterm_is_as_ctrl_c(folder, monkeypatch, capsys):
    step = TrainingLoop.step

    def ended(loop):
        if loop.progress.step >= 30:
            signal.raise_signal(signal.SIGTERM)
        return step(loop)

    monkeypatch.setattr(TrainingLoop, "step", ended)
    argv = [*FIT, "--output", "draws.npz", "--tolerance", "1e-9", "--num-steps", "1000"]
    assert main(argv) == 143
    assert "interrupted: this is the best state so far" in capsys.readouterr().err
    assert zipfile.is_zipfile("draws.npz")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


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
        (["--columns", "y=city"], "--data: expected numbers in column 'city', got 'Bern' in line 2"),
        (["--columns", "y=age"], "got 'age'"),
        (["--float", "city"], "--float: expected one of y, got 'city'"),
        (
            ["--output", "draws.txt"],
            "--output: expected a file that ends in .npz, .nc or .pt, got 'draws.txt'",
        ),
        (
            ["--output", "a.pt", "--resample"],
            "--output: expected .npz or .nc for resampled draws, got 'a.pt'",
        ),
        (["--output", "no/draws.nc"], "--output: expected a file in a folder that exists"),
        (["--output", "new.npz/"], "--output: expected a file in a folder that exists, got 'new.npz/'"),
        (["--checkpoint", "no/run"], "--checkpoint: expected a file in a folder that exists, got 'no/run'"),
        (["--resample"], "--resample: expected --output with it, got none"),
        (["--overwrite"], "--overwrite: expected --output with it, got none"),
        (["--num"], "unrecognized arguments: --num; see pyro-flowvi --help"),
        (["--fail-if-poor", "--no-diagnose"], "--fail-if-poor: expected a verdict, got --no-diagnose"),
        (["--data", "mine.py"], "--data: expected a file that ends in .json, .npz, .csv, .tsv, .parquet"),
        (["--data", "-"], "--data: expected a file, whose ending says what it holds, got '-'"),
        (["--model", "C:\\mine.py"], r"--model: expected path.py:name, got 'C:\\mine.py'"),
        (["--model", "mine.py:modle"], "in mine.py, got 'modle'; did you mean model?"),
        (["--model", "mine.py:x"], "in mine.py, got 'x'; it has Prior, model, broken"),
        (["--model", "mine.py:SCALE"], "--model: expected a function 'SCALE' in mine.py, got 10.0"),
        (["--model", "mine.py:Prior"], "--model: expected a function or an instance, got the class 'Prior'"),
    ],
)
def test_bad_usage(folder, capsys, argv, message):
    assert main([*FIT, *argv]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("error: ")
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("y = x / 0", "ZeroDivisionError: division by zero (mine.py, line 2)"),
        ("raise SystemExit(0)", "SystemExit: 0 (mine.py, line 2)"),
        ("import nosuch", "ModuleNotFoundError: No module named 'nosuch' (mine.py, line 2)"),
    ],
)
def test_a_file_that_raises(folder, capsys, line, message):
    Path("mine.py").write_text(f"x = 1\n{line}\n")
    assert main(FIT) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_raises(folder, capsys):
    argv = ["fit", "--model", "mine.py:broken", "--data", "data.csv", "--quiet"]
    assert main(argv) == 1
    assert capsys.readouterr().err == "error: RuntimeError: no luck (mine.py, line 21)\n"
    assert main([*argv, "--traceback"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "error: RuntimeError: no luck (mine.py, line 21)"


def test_integers_where_floats_are_needed(folder, capsys):
    text = MODEL.replace("dist.Normal(mu, 1.0)", "dist.Bernoulli(logits=mu)")
    Path("mine.py").write_text(text)
    Path("data.csv").write_text("y\n1\n0\n1\n")
    argv = [*FIT, "--quiet", "--num-steps", "10", "--no-diagnose"]
    assert main(argv) == 1
    assert "see --float" in capsys.readouterr().err
    assert main([*argv, "--float", "y"]) == 0


@pytest.mark.parametrize(("text", "got"), [(None, "no value"), ("Y,city\n1,a\n", "'Y', 'city'")])
def test_a_missing_argument(folder, capsys, text, got):
    Path("data.csv").write_text(text or "")
    assert main(FIT if text else FIT[:3]) == 2
    message = f"error: --data: expected a value of the model's argument 'y', got {got}\n"
    assert capsys.readouterr().err == message


def test_positional_only_arguments():
    def model(y, /):
        pass

    with pytest.raises(
        ValueError, match="--model: expected arguments with names, got the positional-only 'y'"
    ):
        arguments_of(model, {}, {})


@pytest.mark.parametrize(
    ("text", "distribution", "message"),
    [
        ("y\n1.5\nNA\n", "Normal(mu, 1.0)", "site 'file': expected observed data without NaN, got 1 NaN"),
        ("y\n1\n-1\n", "Poisson(mu.exp())", "site 'file': Expected value argument"),
        ("y\n1\n2\n", "Normal(mu + torch.zeros(3), 1.0)", "site file dim -1, 2 vs 3 (mine.py, line 18)"),
    ],
)
def test_data_that_do_not_fit_the_model(folder, capsys, text, distribution, message):
    """One line, before any step."""
    Path("mine.py").write_text("import torch\n" + MODEL.replace("Normal(mu, 1.0)", distribution))
    Path("data.csv").write_text(text)
    assert main([*FIT, "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_paths_with_spaces(folder, capsys):
    Path("a folder").mkdir()
    for name in ("mine.py", "beside.py", "data.csv"):
        Path(name).rename(Path("a folder", name))
    argv = [
        "fit",
        "--model",
        "./a folder/../a folder/mine.py:model",
        "--data",
        str(folder / "a folder/data.csv"),
    ]
    assert main([*argv, "--num-steps", "10", "--no-diagnose", "--output", "a folder/my draws.npz"]) == 0
    assert Path("a folder", "my draws.npz").is_file()
    assert list(Path("a folder").glob("*.partial")) == []


def test_single_values_override_data(folder):
    model = load_model("mine.py:model")
    data = arguments_of(model, {"y": torch.zeros(2)}, {"n": 3, "y": [1.5, None]})
    assert data["n"] == 3
    assert data["y"].isnan().tolist() == [False, True]


def test_values_as_python_writes_them():
    texts = ["tails=True", "structure=None", "other=false", "name=Falsehood"]
    values = {"tails": True, "structure": None, "other": False, "name": "Falsehood"}
    assert single_values("--guide-arg", texts) == values


FIGURES = _verdict.Figures(0.1, 0.7, 3990.0, 0.001, 4000, 0, 2, 0.01, 0.01, "x", 0.0, None, None)
TO_PYTHON = re.compile(r"\(\.\.\.|num_steps|guide\.|torch\.|init_loc_fn|=True")


@pytest.mark.parametrize(
    ("said", "here"),
    [
        (_verdict._resample(FIGURES), "use resampled draws: --resample"),
        (_verdict.LONGER, "train longer, with a larger --num-steps"),
        (_verdict._richer(replace(FIGURES, guide="AutoRealNVP")), "or take --guide AutoNeuralSpline"),
        (_verdict._richer(replace(FIGURES, guide="AutoFlowMixture")), "(--guide-arg num_components=N), or"),
        (_verdict._modes(replace(FIGURES, guide="AutoIAF"), None), "take --guide AutoFlowMixture, which"),
        (str(FitDiverged(0, "x", torch.zeros(0), float32=True)), "take --dtype float64"),
        (str(FitDiverged(0, "x", torch.zeros(0))), "a smaller init_scale (--guide-arg init_scale=0.01)"),
        ("checkpoint: expected one of this run", "--checkpoint: expected one of this run"),
        ("num_particles: expected", "--num-particles: expected"),
        ("AutoIAF(..., tails=True) for tails", "--guide AutoIAF --guide-arg tails=true for tails"),
    ],
)
def test_words_for_callers_from_python(said, here):
    told = in_options(said)
    assert here in told
    assert not TO_PYTHON.search(told)


@pytest.mark.parametrize(
    ("checkpoint", "more"), [(None, ""), ("run.ckpt", ", and another file than run.ckpt")]
)
def test_what_to_do_after_too_few_steps(checkpoint, more):
    result = FitResult(None, torch.tensor([2.0, 1.0]), 1.0, {}, "completed", 0.5)
    advice = f"not converged, the ELBO may still rise: take a larger --num-steps{more}"
    assert fit_words(result, checkpoint).splitlines()[1].strip() == advice
    assert "\n" not in fit_words(replace(result, converged=True), checkpoint)


def test_help_has_the_defaults(capsys):
    for name in ("fit", "demo"):
        assert main([name, "--help"]) == 0
        told = capsys.readouterr().out
        assert "default: 0" in told
        assert "exit codes:" in told
    assert main(["--help"]) == 0
    assert "pyro-flowvi fit --model schools.py:model" in capsys.readouterr().out
