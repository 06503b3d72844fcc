"""All cases, and the table that docs/compatibility.md has of them.

python -m tests.users_models.registry            # writes the table between its markers
python -m tests.users_models.registry --check    # exit status 1 where the page has another one
"""

import sys
from pathlib import Path

from . import deep, hierarchies, mixtures, regressions, sequences
from .case import Case

__all__ = ["CASES", "PAGE", "page"]

CASES: dict[str, Case] = {
    case.key: case
    for family in (regressions, hierarchies, mixtures, sequences, deep)
    for case in family.CASES
}
PAGE = Path(__file__).parents[2] / "docs/compatibility.md"
MARKS = ("<!-- table: begin -->", "<!-- table: end -->")


def row(case: Case) -> str:
    """One line of the table."""
    ways = ["behind" if case.behind else "yes", case.compiled, "unsteady" if case.unsteady else "yes"]
    if case.refusal:
        ways = ["refused", *["refused" if case.refusal.error is ValueError else "infinite"] * 2]
    return f"| {' | '.join([case.name, case.guide_name, *ways, case.remark])} |"


def page(text: str) -> str:
    """The page with the table of the registry."""
    (before, rest), end = text.split(MARKS[0]), MARKS[1]
    head = ["| model | guide | `fit` | `CompiledSVI` | `SVI` | remark |", "|---|---|---|---|---|---|"]
    table = "\n".join([*head, *map(row, CASES.values())])
    return f"{before}{MARKS[0]}\n\n{table}\n\n{end}{rest.split(end)[1]}"


def main() -> int:
    old = PAGE.read_text()
    new = page(old)
    if "--check" not in sys.argv:
        PAGE.write_text(new)
    return int("--check" in sys.argv and new != old)


if __name__ == "__main__":
    sys.exit(main())
