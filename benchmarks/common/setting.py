"""Where and with what something was measured."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pyro
import torch


def setting() -> dict[str, Any]:
    """Machine, versions and commit of a measurement."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    try:
        root = Path(__file__).parents[2]
        told = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        commit = subprocess.run(told, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    return {
        "machine": f"{cpu or platform.processor()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, Pyro {pyro.__version__}",
        "commit": commit,
    }
