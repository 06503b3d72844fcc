"""Citations of docstrings as links, to where references.md says that the papers are.

A docstring has plain text, as ``help()`` shows it: "Rezende and Mohamed 2015, equation 20", "Durkan et al.
2019", or authors, *title* and year, of which the title may end before its colon.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENTRY = re.compile(r"^- (.+?), \*(.+?)\*, (\d{4})\. \[.*?\]\((.*?)\)$", re.MULTILINE)
EMPHASISED = re.compile(r"(?<![*\w])\*(?=[A-Z])([^*]+)\*")


@dataclass(frozen=True)
class Paper:
    """A line of references.md."""

    authors: str
    title: str
    year: str
    url: str

    @property
    def by_authors(self) -> re.Pattern[str]:
        """Names and year, across the end of a line."""
        first = re.split(r", | and ", self.authors)[0]
        names = "|".join(map(re.escape, (self.authors, f"{first} et al.")))
        return re.compile(rf"(?:{names})\ (?:{self.year}|\({self.year}\))".replace(r"\ ", r"\s+"))

    def has_title(self, text: str) -> bool:
        """Whether this is the title, its beginning, or what follows its colon, in whatever case."""
        title, text = self.title.lower(), text.lower()
        return title.startswith(text) or title.endswith(f": {text}")


PAPERS = [
    Paper(*found)
    for found in ENTRY.findall((Path(__file__).resolve().parents[1] / "references.md").read_text())
]


def linked(text: str) -> str:
    """The text of a docstring with its citations as links of reStructuredText."""

    def with_link(match: re.Match[str]) -> str:
        title = " ".join(match[1].split())
        url = next((paper.url for paper in PAPERS if paper.has_title(title)), None)
        return match[0] if url is None else f"`{match[1]} <{url}>`__"

    text = EMPHASISED.sub(with_link, text)
    for paper in PAPERS:
        text = paper.by_authors.sub(rf"`\g<0> <{paper.url}>`__", text)
    return text


def process_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx' event: a docstring is about to be shown."""
    lines[:] = linked("\n".join(lines)).split("\n")


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process_docstring, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
