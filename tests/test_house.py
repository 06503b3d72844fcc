"""The layering of the package and its public names."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_flowvi

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyro_flowvi"

# A row imports from its own row and from those above it.
ROWS = [
    {
        "_bar",
        "_checks",
        "_html",
        "_launch",
        "_noise",
        "_paths",
        "_ranks",
        "_shapes",
        "_text",
        "_types",
        "numerics",
        "psis",
    },
    {"nn"},
    {"_program"},
    {"init"},
    {"transforms"},
    {"flows"},
    {"distributions"},
    {"objectives"},
    {"_compile"},
    {"autoguide"},
    {"infer"},
    {"diagnostics"},
    {"models"},
    {"plotting", "datasets", "testing"},
    {"_command_words", "_data_files", "_draws_file", "_files", "_fit_command", "demo", "__main__"},
]
RANK = {name: i for i, row in enumerate(ROWS) for name in row}
ONLY_TORCH = {
    "numerics",
    "nn",
    "transforms.splines",
    "transforms.univariate",
    "_checks",
    "_shapes",
    "_text",
    "_types",
}
EXTRAS = {
    "jax",
    "numpyro",
    "matplotlib",
    "arviz",
    "pandas",
    "pyarrow",
    "sklearn",
    "joblib",
    "normflows",
    "nflows",
    "zuko",
    "nbformat",
    "nbclient",
}

MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imports(path, module):
    """Absolute names of what a module imports at its top level and anywhere: (name, at top)."""
    tree = ast.parse(path.read_text())
    package = ["pyro_flowvi", *module.split(".")[:-1]]
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])]), top


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_layering(module):
    own = module.split(".")[0]
    for name, top in imports(MODULES[module], module):
        root, *rest = name.split(".")
        if root == "pyro_flowvi" and rest:
            drawing = rest[0] == "plotting" and not top  # what draws imports it when it is called
            assert RANK[rest[0]] <= RANK[own] or drawing, f"{module} imports {name}"
        if top:
            assert root not in EXTRAS, f"{module} imports the extra {root} at its top"
        if module in ONLY_TORCH:
            assert root not in ("pyro", "numpy", "scipy"), f"{module} imports {name}"


def test_each_module_imports_alone():
    """No module needs another to be imported before it: each in turn, without the package's own imports."""
    names = [
        "pyro_flowvi." + m.removesuffix(".__init__") for m in MODULES if m not in ("__init__", "__main__")
    ]
    script = f"""
import importlib, random, sys, types
import pyro
for name in random.sample({sorted(names)}, {len(names)}):
    for loaded in [m for m in sys.modules if m.startswith("pyro_flowvi")]:
        del sys.modules[loaded]
    sys.modules["pyro_flowvi"] = bare = types.ModuleType("pyro_flowvi")
    bare.__path__ = [{str(PACKAGE)!r}]
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, cwd=ROOT)


def public_objects():
    for info in pkgutil.walk_packages(pyro_flowvi.__path__, "pyro_flowvi."):
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == info.name:
                yield pytest.param(value, id=f"{info.name}.{name}")


def is_public(module):
    """Whether nothing on the way to a module has a name that begins with an underscore."""
    return not any(part.startswith("_") for part in module.split("."))


@pytest.mark.parametrize("value", list(public_objects()))
def test_public_names_are_documented(value):
    assert value.__doc__, "no docstring"
    if is_public(value.__module__):
        assert doctest.DocTestParser().get_examples(value.__doc__), "no runnable example"


def test_exports():
    for name in pyro_flowvi.__all__:
        assert hasattr(pyro_flowvi, name)


def test_no_file_is_long():
    long = {path.name: n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 400}
    assert not long
