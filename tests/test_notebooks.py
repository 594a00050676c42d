"""The notebooks run from the first cell to the last, in a small size, and what they show is kept in them."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
#: What makes them small, and spares a process that imports everything anew: text of their cells, and what stands there
#: for a test.
SMALLER = {
    '"--steps", "60", "--base-steps", "200"': '"--steps", "2", "--base-steps", "3"',
    "steps=60": "steps=20",
    '["step"] == 40': '["step"] == 20',
    "subprocess.run(command, check=True, capture_output=True)": (
        "sys.path.insert(0, str(command[1].parent)); sys.argv = [str(word) for word in command[1:]]\n"
        'import runpy; _ = runpy.run_path(sys.argv[0], run_name="__main__")'
    ),
}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def kernel():
    """One kernel for all notebooks, which starts with the first one."""
    manager = AsyncKernelManager(kernel_name="python3")
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@each_notebook
def test_it_runs(path, kernel):
    """In a kernel that has forgotten the names of the one before."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for text, small in SMALLER.items():
            cell.source = cell.source.replace(text, small)
    notebook.cells.insert(0, new_code_cell("%reset -f"))
    client = NotebookClient(notebook, km=kernel, timeout=300, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    client.kc.stop_channels()


@each_notebook
def test_its_outputs_are_kept_and_name_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert not re.search(r"/(home|root|tmp|Users)/", path.read_text())
