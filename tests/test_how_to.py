"""The scripts of docs/how-to, each in a file of its own, as a reader would start them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flowvi

ROOT = Path(__file__).parents[1]
HOW_TO = ROOT / "docs" / "how-to"
PAGE = (HOW_TO / "several-processes.md").read_text()
SCRIPTS = {
    title: block
    for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    for block in re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
}
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}
WEIGHTS = [1.0, -0.5, 0.2]


def run(title, launcher, folder):
    """Numbers of the last line that a script prints, which one process alone does."""
    script = folder / "script.py"
    script.write_text(SCRIPTS[title])
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*LAUNCHERS[launcher], str(script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.strip().splitlines()
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    assert len([line for line in lines if re.match(rf"\[?{number}[, ]", line)]) == 1, done.stdout
    return [float(found) for found in re.findall(number, lines[-1])], lines


def test_all_scripts_are_run():
    assert list(SCRIPTS) == ["What is divided", "Latents of rows", "A loop of your own", "Lightning"]


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_fit(launcher, tmp_path):
    numbers, lines = run("What is divided", launcher, tmp_path)
    assert numbers == pytest.approx(WEIGHTS, abs=0.1)
    assert len([line for line in lines if line.startswith("FitResult(")]) == 1
    assert (tmp_path / "run.ckpt").exists()


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_rows(launcher, tmp_path):
    (mu, *theta), _ = run("Latents of rows", launcher, tmp_path)
    assert mu == pytest.approx(0.5, abs=0.1)
    assert len(theta) == 10
    assert max(theta) - min(theta) > 0.5  # each group has its own


@pytest.mark.long
def test_own_loop(tmp_path):
    numbers, _ = run("A loop of your own", "torchrun", tmp_path)
    assert numbers == pytest.approx(WEIGHTS, abs=0.15)


@pytest.mark.long
def test_lightning(tmp_path):
    pytest.importorskip("lightning")
    numbers, _ = run("Lightning", "python", tmp_path)
    assert numbers == pytest.approx(WEIGHTS, abs=0.15)


@pytest.mark.filterwarnings("ignore:.*eager.*")
def test_gpu_on_the_cpu():
    (block,) = re.findall(
        r"^```python\n(.*?)^```$", (HOW_TO / "gpu.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert '"cuda"' in block
    x = torch.randn(30, 2)
    names = {"pyro": pyro, "dist": dist, "pyro_flowvi": pyro_flowvi, "x": x, "y": (x[:, 0] > 0).to(x)}
    exec(block.replace('"cuda"', '"cpu"'), names)
    w = names["guide"].sample_posterior(500)["w"].mean(0)
    assert w[0] > abs(w[1])
