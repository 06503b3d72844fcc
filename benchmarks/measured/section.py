"""A section of the page of measured results: what is asked, the tables, and where the figures come from."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.pictures import digest, drawn_from
from benchmarks.common.results import Row, read

ADDED = {
    "calibration": "50a7c46",
    "hierarchical": "bb54006",
    "minibatches": "78b5b62",
    "refits": "374cc22",
    "structured": "88be31d",
}
"""The commits that added results of the time before lines said their own."""


@dataclass(frozen=True)
class Section:
    """Results of one script.

    :param title: the question, in a few words.
    :param script: the module that measures.
    :param says: what is measured, and how to read the tables.
    :param tables: from the lines of the results to Markdown; an empty text leaves the section out.
    :param results: the name of its file; that of the script if empty.
    :param options: of the script, for all that the table has.
    :param picture: a file of ``docs/``, drawn from the same results, and what it shows.
    """

    title: str
    script: str
    says: str
    tables: Callable[[list[Row]], str]
    results: str = ""
    options: str = ""
    picture: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        return self.results or self.script.rsplit(".", 1)[-1]

    @property
    def command(self) -> str:
        return f"python -m {self.script} {self.options}".strip()

    def index(self, folder: Path) -> list[str]:
        """Question, command, CPU minutes of all lines and name of the file, for the index of benchmarks."""
        rows = [row for row in read(folder / f"{self.name}.jsonl") if self.owns(row)]
        seconds = sum(map(spent, rows))
        minutes = f"{seconds / 60:.0f}" if seconds >= 60 else "under 1"
        least = "" if all("task_cpu_seconds" in row for row in rows) else "at least "
        told = least + minutes if rows else "no results"
        return [self.title, f"`{self.command}`", told, f"`{self.name}.jsonl`"]

    def owns(self, row: Row) -> bool:
        """Whether a line is of this script, where two share a file."""
        return row.get("benchmark") in (None, self.script.rsplit(".", 1)[-1])

    def text(self, folder: Path, docs: Path) -> str:
        """The section, or nothing where there are no results.

        :param folder: of the files of results.
        :param docs: of the page and its pictures.
        """
        rows = read(folder / f"{self.name}.jsonl")
        tables = self.tables(rows) if rows else ""
        if not tables:
            return ""
        parts = [f"### {self.title}", self.says, tables, source(self, rows)]
        if self.picture is not None:
            path = docs / self.picture[0]
            if path.exists() and drawn_from(path) == digest(folder / f"{self.name}.jsonl"):
                parts.append(f"![{self.picture[1]}]({self.picture[0]})")
            else:
                print(f"{path}: not drawn from these results, and left out", file=sys.stderr)
        return "\n\n".join(parts)


def spent(row: Row) -> float:
    """Seconds that a line took, of the CPU where it says so; before lines said it, those of its parts."""
    if "task_cpu_seconds" in row:
        return float(row["task_cpu_seconds"])
    parts = [name for name in row if "cpu_seconds" in name] or ["seconds"]
    if "seconds" not in row:
        parts = [name for name in row if name.endswith("_seconds")]
    return float(sum(row.get(name) or 0.0 for name in parts))


def listed(rows: list[Row], name: str) -> str:
    """The different values that lines have, in their order."""
    return ", ".join(dict.fromkeys(str(row[name]) for row in rows if row.get(name)))


def source(section: Section, rows: list[Row]) -> str:
    """Machine, versions, commits, dates and script."""
    machine = listed(rows, "machine")
    versions = "; ".join(dict.fromkeys(row["versions"] for row in rows if row.get("versions")))
    told = [f"`python -m {section.script}`"]
    told += [text for text in (machine, versions, listed(rows, "setting")) if text]
    if commits := listed(rows, "commit"):
        told.append(f"commit {commits}")
    if any(not row.get("commit") for row in rows):
        added = ADDED.get(section.name)
        told.append(f"lines without a commit of their own: added by {added}" if added else "commit unknown")
    if dates := listed(rows, "date"):
        told.append(dates)
    return f"*Source: `benchmarks/results/{section.name}.jsonl`; {'; '.join(told)}.*"
