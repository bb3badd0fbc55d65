"""The notebooks: without outputs in git, and every cell runs and draws what it says."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted(Path(__file__).parents[2].glob("notebooks/*.ipynb"))
FIGURES = {
    "1_a_layer_by_hand": 2,
    "2_state_as_a_value": 3,
    "3_speculation": 2,
    "4_reading_as_text": 1,
    "5_int8_and_training": 2,
}


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def test_all_are_known() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(FIGURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    for cell in cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of jupyter's own packages
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    made = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in made if "image/png" in output.get("data", {})]
    assert len(pictures) == FIGURES[path.stem]
    assert not [output for output in made if output.output_type == "error"]
    assert not [output for output in made if "Warning" in output.get("text", "")]
