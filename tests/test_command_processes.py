"""``pyro-flowvi fit`` in processes of its own: what they print, pipes that close, signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]

MODEL = """
import pyro
import pyro.distributions as dist


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
"""
# The posterior of mu is normal: precision 3 + 1/100, mean 6 over that.
MEAN, SD = 6 / 3.01, 3.01**-0.5
FIT = ["fit", "--model", "mine.py:model", "--data", "data.csv"]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
OFTEN = """
import sys
import pyro_flowvi.infer._fit
from pyro_flowvi.__main__ import main
sys.modules["pyro_flowvi.infer._fit"].CHECKPOINT_SECONDS = 0.0
sys.exit(main())
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MODEL)
    Path("data.csv").write_text("y\n1\n2\n3\n")


def process(*argv, **options):
    command = [sys.executable, "-m", "pyro_flowvi", *argv]
    options = {"env": ENV, "capture_output": True, "text": True, "timeout": 200, **options}
    return subprocess.run(command, **options)


def test_a_fit_in_a_process():
    done = process(*FIT, "--output", "draws.npz")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["mean", "sd", "5%", "50%", "95%", "ess"]
    assert float(lines[1].split()[1]) == pytest.approx(MEAN, abs=0.05)
    assert lines[3].startswith("good: ELBO")
    assert done.stderr.startswith("converged: ")
    assert "it/s" not in done.stderr  # progress bars are for terminals
    assert "judging the fit" in done.stderr
    with np.load("draws.npz") as draws:
        assert draws["mu"].shape == (4000,)
        assert draws["mu"].dtype == np.float32
        assert draws["mu"].mean() == pytest.approx(MEAN, abs=0.05)
        assert draws["mu"].std() == pytest.approx(SD, rel=0.05)


def test_an_error_in_a_process():
    done = process("fit", "--model", "mine.py:model", "--data", "data.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --data: expected an existing file, got 'data.txt'\n"


def closed_pipe(*argv, **options):
    """The process with a stdout that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    try:
        return process(*argv, capture_output=False, stdout=write, stderr=subprocess.PIPE, **options)
    finally:
        os.close(write)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
@pytest.mark.parametrize("buffered", ["", pytest.param("1", marks=pytest.mark.long)])
def test_a_pipe_that_closes(buffered):
    done = closed_pipe(
        *FIT, "--output", "draws.npz", "--num-steps", "20", env={**ENV, "PYTHONUNBUFFERED": buffered}
    )
    assert done.returncode == 141
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["completed", "saved"]
    with np.load("draws.npz") as draws:
        assert draws["mu"].shape == (4000,)


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
def test_help_in_a_pipe_that_closes():
    done = closed_pipe("fit", "--help", env={**ENV, "PYTHONUNBUFFERED": ""})
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.long
def test_an_encoding_without_some_signs():
    done = process(*FIT, "--num-steps", "20", "--quiet", env={**ENV, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert " ? 0.0" in done.stdout  # ±


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends a process there")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_and_on_from_the_checkpoint(number, code):
    """The run that goes on ends as one that no signal has interrupted."""
    argv = [*FIT, "--num-steps", "3000", "--tolerance", "1e-9", "--no-diagnose"]
    command = [sys.executable, "-c", OFTEN, *argv, "--checkpoint", "run.ckpt", "--output", "draws.npz"]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        for _ in range(6000):
            if Path("run.ckpt").exists() or run.poll() is not None:
                break
            time.sleep(0.01)
        run.send_signal(number)
        out, err = run.communicate(timeout=100)
    assert run.returncode == code, err
    assert out.splitlines()[1].startswith("mu")
    told = err.splitlines()
    assert told[0].startswith("interrupted: ")
    assert told[1:] == [
        "saved: draws.npz",
        "interrupted: this is the best state so far; draws.npz is saved; "
        "the same command goes on from run.ckpt",
    ]
    assert process(*argv, "--checkpoint", "run.ckpt", "--output", "draws.npz").returncode == 0
    assert process(*argv, "--output", "whole.npz").returncode == 0
    with np.load("draws.npz") as resumed, np.load("whole.npz") as whole:
        np.testing.assert_array_equal(resumed["mu"], whole["mu"])
