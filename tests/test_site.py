"""The site: it builds without a warning, has a page for each public name, and its links lead somewhere."""

import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import pyro_flowvi

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BUILT = [DOCS / part for part in ("_build", "tutorials", "api/generated")]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
    ROOT / "benchmarks/README.md",
    *(page for page in sorted(DOCS.rglob("*.md")) if not any(page.is_relative_to(part) for part in BUILT)),
]
ENTRY = re.compile(r"^   ~([\w.]+)$", re.MULTILINE)
LINK = re.compile(r"""\]\(([^)\s]+)(?: "[^"]*")?\)|\bsrc="([^"]+)"|^```\{include\} (\S+)$""", re.MULTILINE)
CITED = re.compile(r"\*[A-Z][^*]{8,}\*|[A-Z]\w+,?\s+(?:et\s+al\.\s+)?\(?(?:19|20)\d\d\b")


def public_names():
    """Every name of an ``__all__`` on whose way no name begins with an underscore, with its value."""
    modules = [
        "pyro_flowvi",
        *(i.name for i in pkgutil.walk_packages(pyro_flowvi.__path__, "pyro_flowvi.")),
    ]
    for module in modules:
        if not any(part.startswith("_") for part in module.split(".")):
            loaded = importlib.import_module(module)
            yield from (
                (f"{module}.{name}", getattr(loaded, name)) for name in getattr(loaded, "__all__", ())
            )


def value_of(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def key_of(name, value):
    """The same for all places that a name is exported from."""
    return name.rpartition(".")[2], id(value)


def test_each_public_name_has_one_page():
    texts = [page.read_text() for page in (DOCS / "api").glob("*.md")]
    entries = [f"pyro_flowvi.{name}" for text in texts for name in ENTRY.findall(text)]
    pages = Counter(key_of(name, value_of(name)) for name in entries)
    assert [name for name in entries if pages[key_of(name, value_of(name))] > 1] == []
    assert [name for name, value in public_names() if key_of(name, value) not in pages] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links(page):
    text = re.sub(r"^(```+|:::+)(?!\{include\}).*?^\1$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    for found in LINK.findall(text):
        target = "".join(found).partition("#")[0]
        if not target or re.match(r"\w+:", target):
            continue
        place = Path(os.path.normpath(page.parent / target))
        copied = ROOT / place.relative_to(DOCS) if place.is_relative_to(DOCS / "tutorials") else place
        assert copied.exists(), f"{page.relative_to(ROOT)} links to {target}"


def docstrings(name, value):
    """The docstring of a public class or function, and of the members of a class."""
    yield name, inspect.getdoc(value) or ""
    for member, inner in vars(value).items() if inspect.isclass(value) else ():
        if isinstance(inner.__doc__, str) and inspect.isroutine(inner):
            yield f"{name}.{member}", inner.__doc__


def test_citations_are_in_the_references():
    """Of docstrings of public names: the site makes links of them by this table."""
    spec = importlib.util.spec_from_file_location("citations", DOCS / "_extensions" / "citations.py")
    citations = importlib.util.module_from_spec(spec)
    sys.modules["citations"] = citations
    spec.loader.exec_module(citations)
    del sys.modules["citations"]
    assert len(citations.PAPERS) > 30
    linked = Counter()
    for name, value in public_names():
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        for place, doc in docstrings(name, value):
            text = citations.linked(doc)
            linked[place] += text.count(">`__")
            rest = CITED.findall(re.sub(r"`[^`]*?<https?:[^>]*>`__", "", text))
            assert set(rest) <= {"Repository, 1998"}, place  # the title before it is the link
    assert linked["pyro_flowvi.AutoPlanar"] == 1
    assert linked["pyro_flowvi.FlowVAE"] == 3


@pytest.mark.long
def test_site_builds_without_a_warning(tmp_path):
    for module in ("sphinx", "myst_nb", "furo", "sphinx_copybutton"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}, of the extra docs")
    options = ["--fail-on-warning", "--keep-going", "--nitpicky", "--quiet", "-d", tmp_path / "doctrees"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, DOCS, tmp_path / "html"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    page = (tmp_path / "html/api/generated/pyro_flowvi.AutoPlanar.html").read_text()
    assert 'href="https://arxiv.org/abs/1505.05770"' in page
