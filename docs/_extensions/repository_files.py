"""Files that lie outside of docs/: notebooks are copied, and links to what the site has lead to its pages.

Links are written as they are right in the repository, where a page may also be read, from docs/how-to to
``../../tutorials/NAME.ipynb``; in a notebook also as they are right on the site, to ``../how-to/NAME.md``.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
PAGES = {
    "README.md": "/index.md",
    "CHANGELOG.md": "/changelog.md",
    "CONTRIBUTING.md": "/contributing.md",
    "benchmarks/README.md": "/benchmarks.md",
}
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def copy_tutorials(*_: Any) -> None:
    """The notebooks of tutorials/, into docs/tutorials/; what is no longer there leaves it."""
    target = DOCS / "tutorials"
    target.mkdir(exist_ok=True)
    notebooks = {path.name: path for path in (ROOT / "tutorials").glob("*.ipynb")}
    for old in target.glob("*.ipynb"):
        if old.name not in notebooks:
            old.unlink()
    for name, path in notebooks.items():
        copy = target / name
        if not copy.exists() or copy.read_bytes() != path.read_bytes():
            shutil.copyfile(path, copy)


def site_links(text: str, folder: Path) -> str:
    """A file's text with its relative links as the site has them.

    :param text: Markdown, or a notebook.
    :param folder: where the file lies, from the root of the repository.
    """

    def replaced(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(ROOT / folder / match[2]))
        if match[2].startswith("/") or not target.is_relative_to(ROOT) or not target.exists():
            return match[0]  # right where the page is on the site, or nowhere
        place = target.relative_to(ROOT).as_posix()
        if place.startswith("docs/"):
            place = place.removeprefix("docs")
        elif place.startswith("tutorials/"):
            place = f"/{place}"
        else:
            place = PAGES.get(place, f"/../{place}")
        return f"{match[1]}{place}{match[3]}"

    return LINK.sub(replaced, text)


def source_read(app: Any, docname: str, source: list[str]) -> None:
    """Sphinx' event: a page is about to be parsed."""
    in_root = docname.startswith("tutorials/")
    source[0] = site_links(source[0], Path(docname if in_root else f"docs/{docname}").parent)


def include_read(app: Any, path: Path, docname: str, source: list[str]) -> None:
    """Sphinx' event: a file is about to be included."""
    place = Path(os.path.normpath(DOCS / path)).relative_to(ROOT)
    source[0] = site_links(source[0], place.parent)


def setup(app: Any) -> dict[str, bool]:
    app.connect("config-inited", copy_tutorials)
    app.connect("source-read", source_read)
    app.connect("include-read", include_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
