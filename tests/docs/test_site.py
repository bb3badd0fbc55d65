"""The site: every page is in its menu, every message has a page, and it builds."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = '''
class QnextError(ValueError):
    """Base of all."""

class OddError(QnextError):
    """A number that is odd."""

def halved(number):
    """Half of a number. Raises OddError."""
    if number % 2:
        raise OddError(f"{number} is odd: give it {number + 1}")
    try:
        return number // 2
    except TypeError as error:
        raise QnextError("what was given is no number") from error

def other(text):
    raise OddError(text)
'''


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "error_pages", ROOT / "website" / "error_pages.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["error_pages"] = module
    spec.loader.exec_module(module)
    return module


def test_messages_are_found_with_when_they_are_raised(made: Any, tmp_path: Path) -> None:
    package = tmp_path / "qnext"
    package.mkdir()
    (package / "halves.py").write_text(SOURCE)
    odd, no_number = made.messages(package)
    assert odd.text == "{number} is odd: give it {number + 1}"
    assert (odd.error, odd.module, odd.function) == ("OddError", "qnext.halves", "halved")
    assert odd.when == "number % 2" and odd.says.startswith("Half of a number")
    assert no_number.when == "TypeError was raised"
    page = made.page(odd, made.classes(package))
    assert "A number that is odd." in page and "number % 2" in page
    assert page.startswith("# \\{number\\} is odd")


def test_every_message_of_ours_has_a_page(made: Any) -> None:
    found, names = made.messages(), made.classes()
    assert len(found) > 200
    slugs = [message.slug for message in found]
    assert len(set(slugs)) == len(slugs)
    assert all(re.fullmatch(r"[a-z0-9-]+", slug) for slug in slugs)
    assert all(names[message.error] for message in found)  # what a class is for is told
    told = made.listed(found)
    for message in found:
        assert f"(messages/{message.slug}.md)" in told
        page = made.page(message, names)
        assert message.text in page and message.error in page


def test_a_message_that_users_meet_is_there(made: Any) -> None:
    texts = [message.text for message in made.messages()]
    assert any("is no token id: the vocabulary is 0.." in text for text in texts)
    assert any("cannot be divided over {ranks} ranks" in text for text in texts)


def test_the_menu_has_every_page() -> None:
    config = (ROOT / "website" / "mkdocs.yml").read_text()
    named = set(re.findall(r"[\w/]+\.md", config))
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert named - {"messages.md"} == there


@pytest.mark.slow
def test_it_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "-f", "website/mkdocs.yml"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    state = (tmp_path / "reference" / "state" / "index.html").read_text()
    assert "init_state" in state and "Everything a model remembers" in state
    assert (tmp_path / "messages" / "index.html").exists()
