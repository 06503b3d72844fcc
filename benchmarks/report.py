"""The page of measured results, README's small table and the index, from the lines in ``benchmarks/results``.

    python -m benchmarks.report            # docs/measured.md, and between their markers README's table and
                                           # the index in benchmarks/README.md
    python -m benchmarks.report --check    # exit status 1 where they are not what would be written

Pictures are drawn by the scripts that measure, with ``--figure``; the page shows those of the same results.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.common.results import RESULTS, read
from benchmarks.common.tables import markdown
from benchmarks.measured import costs, hierarchies, images, mixtures, posteriors

ROOT = Path(__file__).parents[1]
PARTS = {
    "Posteriors that are known": posteriors.SECTIONS,
    "Hierarchical models, many rows, refits": hierarchies.SECTIONS,
    "Several modes, mixtures of flows": mixtures.SECTIONS,
    "Images": images.SECTIONS,
    "Costs": costs.SECTIONS,
}
HEAD = """\
# Measured

<!-- Written by `python -m benchmarks.report` from benchmarks/results: change it there. -->

Every figure on this page comes from a line of JSON in `benchmarks/results`, which the named script wrote,
with the machine, the versions and the last commit that had changed the package.
`benchmarks/README.md` says how to run each.

Seconds are CPU seconds on one core, compilation included, unless it says otherwise: the machine had other
work, which wall seconds would have in them too. It shares caches, so the times are upper bounds; ratios of
steps and of layers are of rounds in turn."""


def page(results: Path, docs: Path) -> str:
    """``docs/measured.md``."""
    parts = [HEAD]
    for title, sections in PARTS.items():
        texts = [text for section in sections if (text := section.text(results, docs))]
        if texts:
            parts += [f"## {title}", *texts]
    return "\n\n".join(parts) + "\n"


def index(results: Path) -> str:
    """The table in ``benchmarks/README.md``: what each script measures, how and for how long."""
    lines = [section.index(results) for sections in PARTS.values() for section in sections]
    return markdown(["question", "command", "CPU minutes", "`results/`"], lines)


def small_table(results: Path) -> str:
    """README's: the time to a right posterior."""
    rows = read(results / "time_to_right.jsonl")
    table = posteriors.times(rows, posteriors.FEW)
    if not table:
        return ""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return (
        f"{table}\n\nCPU seconds of one core, medians (ranges) of all runs, tracing and compilation "
        "included; NUTS is NumPyro's, 4 chains of 1,000 + 1,000. Right: every mean within .1 standard "
        f"deviations of the reference, every standard deviation within 10 %. Commit {commits}."
    )


def between(text: str, name: str, table: str) -> str | None:
    """The text with the table between the markers of that name; None without them."""
    begin, end = (f"<!-- {name}: {which} -->" for which in ("begin", "end"))
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        return None
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 where files differ"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    options = parser.parse_args(arguments)
    wanted = {options.root / "docs" / "measured.md": page(options.results, options.root / "docs")}
    inserted = {
        options.root / "README.md": ("measured", small_table(options.results)),
        options.root / "benchmarks" / "README.md": ("index", index(options.results)),
    }
    for path, (name, table) in inserted.items():
        replaced = between(path.read_text() if path.exists() else "", name, table)
        if replaced is None:
            print(
                f"{path}: no markers <!-- {name}: begin --> and end; its table is left out", file=sys.stderr
            )
        else:
            wanted[path] = replaced
    differing = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path in differing:
        if options.check:
            print(f"{path}: expected what `python -m benchmarks.report` writes", file=sys.stderr)
        else:
            path.write_text(text := wanted[path])
            print(f"{path}: {len(text.splitlines())} lines")
    return int(options.check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
