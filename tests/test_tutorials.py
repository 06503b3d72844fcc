"""The notebooks run, show nothing of their tests, and are committed with the outputs of a full run."""

import importlib.util
import re
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

TUTORIALS = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
MOST_KIB = 700  # of a notebook with its outputs

spec = importlib.util.spec_from_file_location("run_tutorials", TUTORIALS / "run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # those of nbclient, zmq and asyncio; a cell's errors are not warnings
def test_runs_with_quick_parameters(path):
    notebook = run.with_quick_parameters(nbformat.read(path, as_version=4))
    run.execute(notebook, timeout=300)  # raises CellExecutionError at the first error
    assert not list(_outputs(notebook, "error"))


def test_quick_parameters_are_those_of_the_cell(path):
    """One cell at most assigns parameters, plainly, and the quick ones have the same names and types."""
    tagged = [cell for cell in _code(path) if "parameters" in cell.metadata.get("tags", ())]
    assert len(tagged) <= 1
    for cell in tagged:
        values = {}
        exec(cell.source, {"__builtins__": {}}, values)  # literals alone: no name is known there
        quick = cell.metadata["quick"]
        assert quick.keys() <= values.keys()
        assert all(type(value) is type(values[name]) for name, value in quick.items())
    assert all(set(cell.metadata) <= {"tags", "quick"} for cell in _code(path))


def test_shows_no_scaffolding(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    assert not re.search(r"SHORT|filterwarnings\(\"ignore\"|/tmp/|PYRO_FLOWVI_", text)


def test_committed_with_outputs(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    cells = _code(path)
    assert cells
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        shows = re.search(r"^(print|plt\.show)\(", cell.source, re.MULTILINE)  # not inside a function
        assert cell.outputs or not shows, cell.source
    notebook = nbformat.read(path, as_version=4)
    assert not list(_outputs(notebook, "error"))
    assert not [output for output in _outputs(notebook, "stream") if output.name == "stderr"]
    assert path.stat().st_size < 1024 * MOST_KIB


def _code(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def _outputs(notebook, kind):
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == kind:
                yield output
