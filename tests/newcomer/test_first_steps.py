"""docs/first_steps.md, pasted block by block into one shell, as whoever comes new does it."""

import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks
from tests.ports import free_port

PAGE = ROOT / "docs" / "first_steps.md"
SECONDS = 1500
DONE = "-- block {} ended with $? after $SECONDS s --"

pytestmark = pytest.mark.slow


def test_each_block_does_what_the_page_says(tmp_path: Path) -> None:
    port = free_port()
    script = ["set -m"]  # a terminal's job control: `kill %1`
    for number, block in enumerate(blocks(PAGE, "bash")):
        pasted = block.replace("REPOSITORY", str(ROOT)).replace("8000", str(port))
        script += [pasted, f'echo "{DONE.format(number)}"']
    begun = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    ended = re.findall(r"-- block (\d) ended with (\d+) after (\d+) s --", done.stdout)
    assert [number for number, _, _ in ended] == ["0", "1", "2", "3", "4"], told
    assert all(status == "0" for _, status, _ in ended[:4]), told
    answers = re.findall(r"<<12\+7=19>>19", done.stdout)
    assert len(answers) == 2, told  # of `make run`, and of the client
    notebook = (tmp_path / "qnext" / "notebooks" / "2_state_as_a_value.ipynb").read_text()
    assert notebook.count('"image/png"') == 3
    assert "draining" in told
    print(f"{time.monotonic() - begun:.0f} s in all; after each block: {ended}")
