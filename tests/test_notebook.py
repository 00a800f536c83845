"""The notebook runs from top to bottom on the CPU, with small sizes in place of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(repository / "docs" / "examples" / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "the notebook is kept without outputs"
    (sizes,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", ())]
    sizes.source = "CLASSES, CLIPS, SIZE, STEPS, EPISODES = 20, 4, 32, 4, 20"
    for name, value in {
        "PYTHONPATH": str(repository),
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }.items():
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    table = next(output.data["text/plain"] for output in code[-2].outputs if output.output_type == "execute_result")
    assert "ami" in table and "uniform" in table
    assert (tmp_path / "evaluation" / "report.html").is_file()
    assert not any("pip" in str(cell.outputs) for cell in code), "nothing is installed where the package is there"
