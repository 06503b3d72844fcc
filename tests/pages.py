"""Pages of the documentation as programs: their blocks, a run in a process of its own, what it has to print.

- All ```` ```python ```` blocks of a page are one script, run from the top: one namespace, seed 0, float32,
  an empty folder.  A block that cannot run here is marked ```` ```{code-block} python ````.
- What a block prints stands below it in a ```` ```text ```` block, with prose alone between the two.  A block
  that prints has one.
- Words have to be as shown.  So have whole numbers inside of brackets, such as shapes; other numbers may be
  off by ``TOLERANCE``; seconds and numbers of steps by anything.  ``...`` stands for anything, also for
  several lines.
- A warning has to be named on the page.

``python -m tests.pages docs/how-to/big-data.md`` runs a page and writes its outputs into its text blocks, or
adds them; where a block has ``...`` and still agrees, it stays.  ``--check`` writes nothing and says what
differs.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

__all__ = ["ROOT", "Block", "blocks_of", "differences", "run", "with_outputs"]

ROOT = Path(__file__).parents[1]
TOLERANCE = (0.15, 0.3)  # absolute, and relative to the shown number
MARK = "\x1eblock "
NUMBER = r"(?<![\w.])[-+]?(?:\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?"


@dataclasses.dataclass
class Block:
    """A Python block: its lines on the page, and the text block below it, without the fences.

    Lines count from 0; ``end`` is the line of the closing fence, ``shown`` None where no output is shown.
    """

    start: int
    end: int
    shown: tuple[int, int] | None = None


def blocks_of(page: str) -> list[Block]:
    """The Python blocks of a page, each with its output."""
    assert not re.search(r"^[ \t>]+```python", page, re.MULTILINE), "an indented block would not run"
    lines, blocks, last = page.splitlines(), [], None
    fences = iter([i for i, line in enumerate(lines) if line.startswith("```")])
    for start in fences:
        end = next(fences)
        kind = lines[start].strip("` ")
        if kind == "python":
            last = Block(start + 1, end)
            blocks.append(last)
        else:
            if kind == "text" and last is not None:
                last.shown = (start + 1, end)
            last = None
    return blocks


def script(page: str) -> str:
    """The blocks of a page as a script in which each line has the number that it has on the page."""
    lines = page.splitlines()
    code = [""] * len(lines)
    seed = "import pyro; pyro.set_rng_seed(0); "
    for i, block in enumerate(blocks_of(page)):
        code[block.start - 1] = f"{'' if i else seed}print('\\n{MARK}{i}', flush=True)"
        code[block.start : block.end] = lines[block.start : block.end]
    return "\n".join(code) + "\n"


def run(path: Path, folder: Path, timeout: float = 400.0) -> tuple[list[str], str]:
    """What each block of a page prints, and what all of it says on stderr."""
    page = path.read_text()
    program = folder / f"{path.stem}.py"
    program.write_text(script(page))
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{path.name}: the line numbers are the page's\n{done.stderr[-4000:]}"
    # The first line of each part is the block's number, the last newline is that before the next mark.
    parts = [part.partition("\n")[2].rstrip() for part in done.stdout.split(f"\n{MARK}")[1:]]
    return parts, done.stderr


def differences(shown: str, printed: str) -> str | None:
    """What a text block has otherwise than a run; None if they agree as the head of this file says."""
    pattern, expected, last = [], [], 0
    for match in re.finditer(rf"\.\.\.|{NUMBER}|\s+", shown):
        token = match[0]
        pattern.append(re.escape(shown[last : match.start()]))
        if token == "...":
            pattern.append("(?s:.*?)")
        elif token.isspace():
            pattern.append(r"\s+")
        else:
            pattern.append(f"({NUMBER})")
            expected.append((token, _inside_of_brackets(shown, match.start()), shown[match.end() :]))
        last = match.end()
    pattern.append(re.escape(shown[last:]))
    found = re.fullmatch("".join(pattern), printed)
    if found is None:
        return f"other words:\n{printed}"
    for (token, exact, after), number in zip(expected, found.groups(), strict=True):
        if re.match(r" ?(s|ms|seconds|minutes|steps)\b", after):
            continue
        a, b = (float(value.replace(",", "")) for value in (token, number))
        whole = exact and re.fullmatch(r"\d+", token)
        if abs(a - b) > (0 if whole else TOLERANCE[0] + TOLERANCE[1] * abs(a)):
            return f"{number}, not {token}:\n{printed}"
    return None


def _inside_of_brackets(text: str, place: int) -> bool:
    """Whether only whole numbers are between the bracket before a place and the one after it."""
    before = re.search(r"[(\[][\d, ]*$", text[:place])
    return before is not None and re.match(r"[\d, ]*[)\]]", text[place:]) is not None


def with_outputs(page: str, printed: list[str]) -> str:
    """The page with what its blocks print in its text blocks."""
    lines = page.splitlines()
    for block, output in reversed(list(zip(blocks_of(page), printed, strict=True))):
        new = output.splitlines()
        if block.shown is None:
            if output:
                lines[block.end + 1 : block.end + 1] = ["", "```text", *new, "```"]
            continue
        old = "\n".join(lines[slice(*block.shown)])
        if "..." not in old or differences(old, output) is not None:
            lines[slice(*block.shown)] = new
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run pages; write their outputs into them, or say what differs."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    for path in options.pages:
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            printed, errors = run(path, Path(folder))
            print(f"{path}: {time.monotonic() - start:.1f} s", errors, sep="\n")
        page = path.read_text()
        if not options.check:
            path.write_text(with_outputs(page, printed))
            continue
        for block, output in zip(blocks_of(page), printed, strict=True):
            shown = "\n".join(page.splitlines()[slice(*block.shown)]) if block.shown else ""
            if found := differences(shown, output):
                print(f"block of line {block.start}: {found}")


if __name__ == "__main__":
    main()
