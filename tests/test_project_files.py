"""Files around the package: they parse, and agree with each other on versions."""

import ast
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_flowvi

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
FILES = [
    ROOT / "CITATION.cff",
    ROOT / ".pre-commit-config.yaml",
    *sorted(path for path in (ROOT / ".github").rglob("*") if path.suffix in (".yml", ".yaml")),
]
WORKFLOWS = [path for path in FILES if path.parent.name == "workflows"]


def loaded(path):
    # The base loader leaves all as text: "on" is no truth value, and 3.10 is not 3.1.
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def pins(name):
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))


def settings():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def sessions():
    """The versions of Python and of torch of noxfile.py's session `torch`."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    (session,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "torch")
    decorators = {ast.unparse(call.func): call for call in session.decorator_list}
    python = next(k.value for k in decorators["nox.session"].keywords if k.arg == "python")
    return ast.literal_eval(python), ast.literal_eval(decorators["nox.parametrize"].args[1])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml(path):
    assert isinstance(loaded(path), dict)


def test_python_versions():
    classifiers = settings()["metadata"]["classifiers"]
    python, _ = sessions()
    assert re.findall(r":: (3\.\d+)$", classifiers, re.MULTILINE) == python
    assert settings()["options"]["python_requires"] == f">={python[0]}"


def test_matrix():
    python, torch = sessions()
    matrix = loaded(ROOT / ".github/workflows/tests.yml")["jobs"]["versions"]["strategy"]["matrix"]
    assert matrix["python"] == python
    # The oldest, the one that the whole suite runs with, and the newest.
    assert matrix["torch"] == [torch[0], pins("constraints.txt")["torch"], torch[-1]]
    assert matrix["torch"][0] == pins("constraints-lowest.txt")["torch"]
    assert all(one["python"] in python and one["torch"] in torch for one in matrix["include"])


def test_lower_bounds():
    options = settings()
    required = options["options"]["install_requires"] + "".join(options["options.extras_require"].values())
    bounds = dict(re.findall(r"^([\w.-]+) >= (\S+)$", required, re.MULTILINE))
    for name, pin in pins("constraints-lowest.txt").items():
        # numpy >= 2.0 is numpy==2.0.0
        assert re.fullmatch(rf"{re.escape(bounds[name])}(\.0)*", pin), name


def test_pre_commit_versions():
    local, ruff = {}, None
    for repo in loaded(ROOT / ".pre-commit-config.yaml")["repos"]:
        if repo["repo"] == "local":
            local = {hook["id"]: hook for hook in repo["hooks"]}
        elif repo["repo"].endswith("/ruff-pre-commit"):
            ruff = repo["rev"]
    assert ruff == f"v{pins('constraints.txt')['ruff']}"
    # Of the environment that is installed by constraints.txt, with the settings of setup.cfg.
    assert local["mypy"]["entry"] == ".venv/bin/mypy"
    assert "mypy" in pins("constraints.txt")


def test_version():
    assert loaded(ROOT / "CITATION.cff")["version"] == pyro_flowvi.__version__
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+) \(", log, re.MULTILINE)[1] == pyro_flowvi.__version__


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_little(path):
    """All only read; a job that may write says what, and runs no code of the repository."""
    workflow = loaded(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        steps = job.get("steps", [])
        if "permissions" in job:
            assert not any("run" in step or "checkout" in step["uses"] for step in steps), name
        for step in steps:
            if "uses" in step:
                assert re.search(r"@(v\d+|release/v\d+)$", step["uses"]), step["uses"]


@pytest.mark.skipif(sys.platform == "win32", reason="sed and bash, of the machine that releases")
def test_links_of_the_readme_on_the_package_index(tmp_path):
    """The step of the release leaves no relative link, and each leads to a file of the repository."""
    steps = loaded(ROOT / ".github/workflows/release.yml")["jobs"]["build"]["steps"]
    (step,) = (step for step in steps if "README.md" in step.get("run", ""))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    env = {**os.environ, "FILES": "https://files", "PAGES": "https://pages"}
    subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=env, check=True)
    found = (tmp_path / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", found)
    assert len(links) == len(re.findall(r"\]\(", text))
    assert all(link.startswith("https://") for _, link in links)
    for image, link in links:
        base, _, path = link.removeprefix("https://").partition("/")
        if base in ("files", "pages"):
            assert base == ("files" if image else "pages")
            assert (ROOT / path).is_file(), link
