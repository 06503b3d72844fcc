"""Execute the notebooks in place: ``python tutorials/run.py [01 04 ...]``; without numbers, all of them.

Each runs in a kernel of its own on one thread, with an empty cache of compiled code.  What is written back
has outputs, execution counts from 1, and no metadata of the run.  ``--quick`` runs with the quick
parameters, checks that nothing fails, and writes nothing.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
KEPT_OF_CELLS = {"tags", "quick"}


def with_quick_parameters(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Behind the cell tagged "parameters", one that assigns what stands in its metadata under "quick"."""
    for place, cell in enumerate(notebook.cells):
        if "parameters" in cell.metadata.get("tags", ()):
            values = cell.metadata["quick"].items()
            source = "\n".join(f"{name} = {value!r}" for name, value in values)
            notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
            break
    return notebook


def execute(notebook: nbformat.NotebookNode, timeout: int | None = None) -> None:
    """Runs all cells in a new kernel, in an empty folder; raises at the first error."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            # The kernel is another process: it must find the package in a checkout that is not installed.
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.getenv("PYTHONPATH")])]),
            "MATPLOTLIBRC": str(HERE / "matplotlibrc"),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "compiled"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # in the kernel, so that its seconds can be counted
            # Of tqdm, which Pyro imports, where ipywidgets is not installed.
            "PYTHONWARNINGS": "ignore:IProgress not found",
        }
        work = Path(folder) / "work"
        work.mkdir()
        client = NotebookClient(
            notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(work)}}
        )
        client.execute(env=env)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leaves nothing that differs between two runs of the same code but the outputs."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in KEPT_OF_CELLS})
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """One output of what a cell printed in one go, at however many moments it came."""
    whole: list[nbformat.NotebookNode] = []
    for output in outputs:
        if whole and "name" in output and output.get("name") == whole[-1].get("name"):
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def cpu_seconds() -> float:
    """Of the kernels that have ended, and of the compilers that they called."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("numbers", nargs="*", help="first characters of the files' names; by default all")
    parser.add_argument("--quick", action="store_true", help="quick parameters; nothing is written")
    chosen = parser.parse_args()
    for path in sorted(HERE.glob("*.ipynb")):
        if chosen.numbers and not path.name.startswith(tuple(chosen.numbers)):
            continue
        notebook = nbformat.read(path, as_version=4)
        if chosen.quick:
            with_quick_parameters(notebook)
        start, cpu = time.perf_counter(), cpu_seconds()
        execute(notebook)
        took = f"{time.perf_counter() - start:.0f} s, {cpu_seconds() - cpu:.0f} s of CPU time"
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        noise = [output.text for output in outputs if output.get("name") == "stderr"]
        if not chosen.quick:
            clean(notebook)
            nbformat.write(notebook, path)
            took += f", {path.stat().st_size / 1024:.0f} KiB"
        print(f"{path.name}: {took}", flush=True)
        if noise:
            sys.exit(f"{path.name} wrote to stderr:\n" + "\n".join(noise))


if __name__ == "__main__":
    main()
