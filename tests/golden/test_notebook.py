"""examples/notebook.ipynb runs, with fewer steps, and its committed outputs come from one run of all cells."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
FEWER_STEPS = ("--train-iters 100", "--train-iters 100 --exit-interval 10")


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def pictures(notebook):
    """The PNGs of each cell that has some, in base64."""
    return [output["data"]["image/png"] for cell in code_cells(notebook) for output in cell["outputs"]
            if "image/png" in output.get("data", {})]


def test_what_is_committed_is_one_whole_run_that_github_shows():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert len(pictures(notebook)) == 3
    assert NOTEBOOK.stat().st_size < 200_000
    assert str(ROOT) not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.table
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("megatron", "protein_tools", "tools", "pretrain_tape.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "proteins").symlink_to(ROOT / "examples" / "proteins")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert sum(cell.source.count(FEWER_STEPS[0]) for cell in notebook.cells) == 1
    for cell in code_cells(notebook):
        cell.source, cell.outputs = cell.source.replace(*FEWER_STEPS), []
    place = {"metadata": {"path": str(tmp_path / "examples")}}
    nbclient.NotebookClient(notebook, timeout=250, resources=place).execute()
    assert len(pictures(notebook)) == 3
    assert (tmp_path / "runs" / "notebook" / "run" / "iter_0000010").is_dir()
