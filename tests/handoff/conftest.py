"""Both sides of a hand-off in one process, and parts that even small values fall into."""

from collections.abc import Iterator

import pytest

from tests.handoff.sides import Sides


@pytest.fixture
def sides() -> Iterator[Sides]:
    made = Sides()
    yield made
    made.sender.close()
    made.receiver.close()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qnext.handoff.send.PART", 5000)
