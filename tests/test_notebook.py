"""The notebook runs from top to bottom, twice in one kernel, as a reader would run it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "recycled_attention.ipynb"
PICTURES = 7
LIVE = "import gc, jax; gc.collect(); print(sum(array.nbytes for array in jax.live_arrays()))"


@pytest.fixture
def client(tmp_path, monkeypatch) -> Iterator[NotebookClient]:
    """The notebook and a kernel for it: this interpreter, on the CPU, as users run it."""
    folder = tmp_path / "kernels" / "own"
    folder.mkdir(parents=True)
    arguments = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(NOTEBOOK.parents[1])}
    spec = {"argv": arguments, "display_name": "own", "language": "python", "env": environment}
    (folder / "kernel.json").write_text(json.dumps(spec))
    for name in ("XLA_FLAGS", "MPLBACKEND"):  # the tests' own
        monkeypatch.delenv(name, raising=False)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    kernels = KernelSpecManager(kernel_dirs=[str(folder.parent)])
    manager = KernelManager(kernel_name="own", kernel_spec_manager=kernels)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": NOTEBOOK.parent}}
    client = NotebookClient(notebook, km=manager, timeout=300, startup_timeout=180, resources=where)
    with client.setup_kernel(cleanup_kc=True):  # not its default for a manager of ours
        yield client


def run(client: NotebookClient) -> tuple[int, int]:
    """All cells; the number of pictures, and the bytes of live device arrays afterwards. A cell that fails raises."""
    client.reset_execution_trackers()
    cells = client.nb.cells
    for index, cell in enumerate(cells):
        client.execute_cell(cell, index)
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    asked = nbformat.v4.new_code_cell(LIVE)
    cells.append(asked)
    try:
        client.execute_cell(asked, len(cells) - 1)
    finally:
        cells.remove(asked)
    return pictures, int(asked.outputs[0].text)


def test_runs_from_top_to_bottom_twice(client):
    pictures, live = zip(run(client), run(client), strict=True)
    assert pictures == (PICTURES, PICTURES)
    assert 0 < live[1] <= live[0]  # what the first pass held has been freed


def test_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    expected = json.dumps(json.loads(NOTEBOOK.read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"
    assert NOTEBOOK.read_text(encoding="utf-8") == expected
