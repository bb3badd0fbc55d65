"""The block of docs/parallel.md that is for several processes."""

import os
from pathlib import Path
from typing import Any

import torch

import qnext as qn
from tests.docs.pages import ROOT, blocks


def run_block(beside: Path, prompt: torch.Tensor) -> tuple[str, torch.Tensor]:
    """(a rank's name, the tokens that it generates), with the page's checkpoint in a directory."""
    (block,) = blocks(ROOT / "docs" / "parallel.md", 'python title="in each of four processes"')
    names: dict[str, Any] = {"qn": qn, "prompt": prompt}
    before = Path.cwd()
    os.chdir(beside)
    try:
        with torch.no_grad():
            exec(compile(block, "docs/parallel.md", "exec"), names)
    finally:
        os.chdir(before)
    return str(names["mesh"]), names["tokens"]
