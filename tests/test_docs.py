"""README and the pages of docs/ run and print what they show; tests/pages.py says at its head how.

Pages are marked long but for those of ``SHORT``, of less than 10 s.  A new page needs no line here.
"""

import re

import pytest

from tests.pages import ROOT, blocks_of, differences, run

DOCS = ROOT / "docs"
OWN_TESTS = {"several-processes", "gpu"}  # in test_how_to.py
SHORT = {"README"}
PAGES = [
    path
    for path in [ROOT / "README.md", *sorted([*DOCS.glob("*.md"), *(DOCS / "how-to").glob("*.md")])]
    if path.stem not in OWN_TESTS and blocks_of(path.read_text())
]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in SHORT else pytest.mark.long)
        for path in PAGES
    ],
)
def test_page_prints_what_it_shows(path, tmp_path):
    page = path.read_text()
    printed, errors = run(path, tmp_path)
    for block, output in zip(blocks_of(page), printed, strict=True):
        place = f"{path.name}, the block of line {block.start}"
        assert (block.shown is not None) or not output, f"{place}: no text block shows {output}"
        if block.shown:
            shown = "\n".join(page.splitlines()[slice(*block.shown)])
            assert differences(shown, output) is None, f"{place}: {differences(shown, output)}"
    for warning in re.findall(r"\b(\w*Warning): ", errors):
        assert warning in page, errors


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("good, ELBO -31.32 ± 0.00", "good, ELBO -31.4 ± 0.02", True),
        ("good, ELBO -31.32 ± 0.00", "poor, ELBO -31.4 ± 0.02", False),
        ("k-hat 0.2", "k-hat 0.9", False),
        ("torch.Size([1000, 8])", "torch.Size([1000, 8])", True),
        ("torch.Size([1000, 8])", "torch.Size([999, 8])", False),
        ("[0.5, 1.5]", "[0.6, 1.4]", True),
        ("(0.5, 9)", "(0.5, 2)", False),
        ("600 steps in 4.1 s", "900 steps in 21.0 s", True),
        ("2,048 draws, 99 %", "2,048 draws, 97 %", True),
        ("first\n...\nlast 1", "first\nsecond 7\nthird\nlast 1", True),
        ("first\n...\nlast 1", "first\nsecond 7\nthird", False),
        ("tau  0.5\nmu  -1", "tau 0.5\nmu -1", True),
        ("nan", "0.1", False),
    ],
)
def test_outputs_are_compared(shown, printed, same):
    assert (differences(shown, printed) is None) == same


def test_an_output_belongs_to_the_block_above_it():
    page = "```python\nprint(1)\n```\n\nprose\n\n```text\n1\n```\n\n```sh\nls\n```\n\n```text\na\n```\n"
    (block,) = blocks_of(page)
    assert page.splitlines()[slice(*block.shown)] == ["1"]


def test_a_failing_block_is_named_by_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# T\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError, match=r"line 8"):
        run(page, tmp_path)
