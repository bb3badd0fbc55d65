from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parallel.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    made = Ranks(Path(tmp_path_factory.mktemp("ranks")) / "store")
    yield made
    made.close()
