"""Code of the README and of docs/ runs, block after block of a page: Python in one namespace.

Every block says what it is: `bash` runs in test_shell.py, Python with a title elsewhere, in
several processes (tests/parallel/test_parallel_page.py) or on the software Ascend
(tests/npu/test_lowering_page.py).
"""

from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import LINK, PAGES, ROOT, blocks

TITLED = {'python title="in each of four processes"', 'python title="on an NPU"'}
KINDS = {"python", "bash", "text", *TITLED}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page: Path) -> None:
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_say_what_they_are(page: Path) -> None:
    fences = [line[3:] for line in page.read_text().splitlines() if line.startswith("```")]
    assert {*fences[::2]} <= KINDS and not any(fences[1::2])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = [to for to in LINK.findall(page.read_text()) if not (page.parent / to).exists()]
    assert broken == []
