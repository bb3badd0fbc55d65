"""Extras bring what the modules they are for import."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.rooms.test_imports import name_of

ROOT = Path(__file__).parents[2]
FILES = {name_of(path): path for path in (ROOT / "qnext").rglob("*.py")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def at_once(path: Path) -> Iterator[str]:
    """What a module imports when it is imported: neither in functions nor for type checkers."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(room: str) -> set[str]:
    """Packages of others that a room's modules need, and the modules of qnext that they need."""
    waiting = {name for name in FILES if f"{name}.".startswith(f"{room}.")}
    seen, found = set(waiting), set()
    while waiting:
        for imported in at_once(FILES[waiting.pop()]):
            if imported in FILES and imported not in seen:
                seen.add(imported)
                waiting.add(imported)
            elif imported.partition(".")[0] not in {"qnext", *sys.stdlib_module_names}:
                found.add(imported.partition(".")[0])
    return found


def brought(extra: str) -> set[str]:
    lines = PROJECT["dependencies"] + PROJECT["optional-dependencies"][extra]
    return {re.split(r"[^\w-]", line)[0].lower() for line in lines}


OF_OTHERS = {"starlette"}  # fastapi's foundation


@pytest.mark.parametrize(("room", "extra"), [("qnext.server", "serve"), ("qnext.plot", "plot")])
def test_an_extra_brings_what_its_room_needs(room: str, extra: str) -> None:
    of = packages_distributions()
    needed = {of[package][0].lower().replace("_", "-") for package in packages(room)}
    assert needed - OF_OTHERS <= brought(extra)
