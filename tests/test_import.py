"""What ``import pyro_flowvi`` may not load: it is to add little to torch and Pyro."""

import re
import subprocess
import sys

SCRIPT = "import torch, pyro; import pyro_flowvi"
HEAVY = {
    *("arviz", "arviz_stats", "xarray", "pandas", "numba", "matplotlib", "sklearn", "jax", "numpyro"),
    *("scipy.stats", "scipy.optimize", "scipy.signal", "scipy.special", "scipy.cluster"),
    *("torch._dynamo", "torch._inductor"),
}


def loaded():
    """Modules that the import of the package loads, beyond those of torch and Pyro, in order."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-X", "importtime", "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
    )
    names = re.findall(r"^import time: .*\| +(\S+)$", run.stderr, re.MULTILINE)
    return names[names.index("pyro") + 1 : names.index("pyro_flowvi") + 1]


def test_importing_the_package_loads_nothing_heavy():
    names = loaded()
    assert "pyro_flowvi.infer" in names
    parents = {".".join(name.split(".")[:depth]) for name in names for depth in (1, 2)}
    assert not parents & HEAVY
