"""mypy and pyright on right and wrong user code: every wrong line is found, and no right one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

CODE = Path(__file__).with_name("user_code.py")
ROOT = Path(__file__).parents[2]
WRONG = {i for i, line in enumerate(CODE.read_text().splitlines(), 1) if line.endswith("# error")}


def mypy(path):
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert not run.stderr, run.stderr
    return {int(line) for line in re.findall(rf"{path.name}:(\d+): error", run.stdout)}


def pyright(path):
    run = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    found = json.loads(run.stdout[run.stdout.index("{") :])["generalDiagnostics"]
    return {each["range"]["start"]["line"] + 1 for each in found if each["severity"] == "error"}


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_type_checker_finds_the_wrong_lines_and_no_others(checker):
    found = checker(CODE)
    assert not WRONG - found, "missed"
    assert not found - WRONG, "false alarms"
