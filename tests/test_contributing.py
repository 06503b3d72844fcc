"""The recipe of CONTRIBUTING.md for a new flow, applied to a copy of the package."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_flowvi

ROOT = Path(__file__).parents[1]
MOST_FILES = 6

RECIPE = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## A new flow\n")[2].partition("\n## ")[0]
STEPS = re.findall(r"^\d\. \*\*`(.*?)`\*\*(?:(?!```).)*?```\w+\n(.*?)```$", RECIPE, re.DOTALL | re.MULTILINE)

# What a new flow has to be, in a process that imports the copy.
CHECKS = f"""
import doctest, importlib, math
from pathlib import Path
import pyro, pyro.distributions as dist, torch
import pyro_flowvi
from pyro_flowvi.flows import DEFAULTS, FLOWS
from pyro_flowvi.testing import check_transform

assert Path(pyro_flowvi.__file__).is_relative_to(Path.cwd()), pyro_flowvi.__file__
(key,) = FLOWS.keys() - {set(pyro_flowvi.FLOWS)}
(guide,) = set(pyro_flowvi.__all__) - {set(pyro_flowvi.__all__)}
(layer,) = set(pyro_flowvi.transforms.__all__) - {set(pyro_flowvi.transforms.__all__)}
guide, layer = getattr(pyro_flowvi, guide), getattr(pyro_flowvi.transforms, layer)
assert all(key in row.flows for row in DEFAULTS)

pyro.set_rng_seed(0)
torch.set_default_dtype(torch.float64)
check_transform(layer(3), torch.randn(4, 3))
for dim, context in ((1, None), (3, None), (2, torch.randn(4, 5))):
    flow = FLOWS[key](dim, num_layers=3, context_dim=None if context is None else 5)
    with torch.no_grad():
        for param in flow.parameters():
            param.add_(0.3 * torch.randn_like(param))
    check_transform(flow, torch.randn(4, dim), context=context)

def model(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.exp(), 0.5).to_event(1), obs=y)

result = pyro_flowvi.fit(model, guide(model), torch.tensor([0.5, 2.0]), num_steps=20, seed=0, progress=False)
assert len(result.losses) == 20 and all(map(math.isfinite, result.losses))

scope = dict(torch=torch, pyro=pyro, dist=dist)
torch.set_default_dtype(torch.float32)
for value in (layer, guide):
    assert doctest.testmod(importlib.import_module(value.__module__), extraglobs=scope).failed == 0, value
"""


def apply(path, block):
    """A new file as it is; else imports to the imports, names to ``__all__``, the rest to the end."""
    if path.suffix == ".md":
        path.write_text(path.read_text().replace("### Added\n\n", f"### Added\n\n{block}", 1))
        return
    if not path.exists():
        path.write_text(block)
        return
    text, lines = path.read_text(), block.splitlines()
    imports, names, rest = [], [], []
    for node in ast.parse(block).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        source = "\n".join(lines[first - 1 : node.end_lineno])
        if isinstance(node, ast.ImportFrom):
            imports.append(source)
        elif isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            names += ast.literal_eval(node.value)
        else:
            rest.append(source)
    last = max(node.end_lineno for node in ast.parse(text).body if isinstance(node, ast.ImportFrom))
    lines = text.splitlines()
    text = "\n".join([*lines[:last], *imports, *lines[last:], *(f"\n\n{source}" for source in rest)]) + "\n"
    for name in names:
        assert "\n__all__ = [\n" in text, path
        text = text.replace("\n__all__ = [\n", f'\n__all__ = [\n    "{name}",\n', 1)
    path.write_text(text)


def test_files_of_a_new_flow():
    assert len({file for file, _ in STEPS}) == len(STEPS) == len(re.findall(r"^```\w", RECIPE, re.MULTILINE))
    assert 0 < len(STEPS) <= MOST_FILES


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pyro_flowvi", folder / "pyro_flowvi", ignore=skip)
    shutil.copy(ROOT / "CHANGELOG.md", folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for file, block in STEPS:
        apply(folder / file, block)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return folder, {path for path in after if after[path] != before.get(path)}


def test_recipe_touches_what_it_says(copy):
    folder, touched = copy
    assert {str(path.relative_to(folder)) for path in touched} == {file for file, _ in STEPS}


def test_recipe_makes_a_flow_and_its_guide(copy):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECKS], cwd=copy[0], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
