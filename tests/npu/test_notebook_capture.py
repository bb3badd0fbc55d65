"""The cell of notebook 4 that needs torch_npu: a captured graph has the launches predicted."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "4_reading_as_text.ipynb"


def test_the_captured_graph(capsys: pytest.CaptureFixture[str]) -> None:
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"]]
    (cell,) = [cell for cell in cells if "CAPTURE = " in cell]
    exec("from importlib.util import find_spec\n" + cell, {})
    told = re.search(r"(\d+) tasks, (\d+) launches predicted", capsys.readouterr().out)
    assert told is not None and told[1] == told[2]
