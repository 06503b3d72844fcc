"""Where and with what something was measured."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = {"torch": "torch", "pyro-ppl": "Pyro", "jax": "JAX", "numpyro": "NumPyro"}
ROOT = Path(__file__).parents[2]


def setting() -> dict[str, Any]:
    """Machine, versions, commit and date of a measurement."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "machine": f"{cpu or platform.processor()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def versions() -> str:
    """Of Python and of what is installed of the packages."""
    found = [f"Python {platform.python_version()}"]
    for package, name in PACKAGES.items():
        try:
            found.append(f"{name} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def commit() -> str:
    """The last commit that changed the package, "-dirty" where its files differ from it.

    Later ones, which change pages, tests or benchmarks, measure the same code.
    """
    git = ["git", "-C", str(ROOT)]
    try:
        told = [*git, "log", "-1", "--format=%h", "--", "pyro_flowvi"]
        last = subprocess.run(told, capture_output=True, text=True, check=True)
        differs = [*git, "diff", "--quiet", "HEAD", "--", "pyro_flowvi"]
        dirty = subprocess.run(differs, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return ""
    return last.stdout.strip() + ("-dirty" if dirty else "")
