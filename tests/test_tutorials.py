"""The tutorials run, and are committed with the outputs of a full run."""

import os
import re
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # those of nbclient, zmq and asyncio; a cell's errors are not warnings
def test_runs_in_short_mode(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_FLOWVI_SHORT", "1")
    # The kernel is another process: it must find the package in a checkout that is not installed.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])]))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises CellExecutionError at the first error
    assert not list(_outputs(notebook, "error"))


def test_committed_with_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        shows = re.search(r"^(print|plt\.show)\(", cell.source, re.MULTILINE)  # not inside a function
        assert cell.outputs or not shows, cell.source
    assert not list(_outputs(notebook, "error"))
    assert not [output for output in _outputs(notebook, "stream") if output.name == "stderr"]


def _outputs(notebook, kind):
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == kind:
                yield output
