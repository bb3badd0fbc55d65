"""Servers for public clients: one that is open to all, one that is busy soon and wants a key."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qnext.embedded import MODEL
from tests.clients.served import Served, serving

KEY = "sk-of-the-tests"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("server") / "log.txt") as served:
        yield served


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """It has one row, one place to wait, a key, and a template that knows tools."""
    room = tmp_path_factory.mktemp("guarded")
    shutil.copytree(MODEL, room / "demo")
    shutil.copy(Path(__file__).with_name("tools.jinja"), room / "demo" / "chat_template.jinja")
    options = ("--rows", "1", "--max-waiting", "1", "--api-key", KEY)
    with serving(room / "log.txt", str(room / "demo"), *options) as served:
        yield served
