"""Fixtures shared by all tests: seeds, poisoned memory, the odd models."""

import tests.typed  # noqa: F401  # before what it hooks is imported

# isort: split
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qnext as qn
from tests.samples import oracle

torch.set_num_threads(1)  # tiny models: threads cost more than they give


def pytest_collection_finish() -> None:
    """Collections of garbage leave out what the imports made: 0.2 s for each of all objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # training sets it for the whole process


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody wrote holds NaN: reading it shows."""
    fresh = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = fresh(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() and not made.is_meta else made

    monkeypatch.setattr(torch, "empty", empty)
    yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """checkpoints(name) -> (transformers' model, its directory, our params), made once a name."""
    made: dict[str, tuple[Any, Path, qn.Params]] = {}

    def checkpoint(name: str) -> tuple[Any, Path, qn.Params]:
        if name not in made:
            model = oracle(name)
            path = tmp_path_factory.mktemp(name)
            model.save_pretrained(path)
            made[name] = (model, path, qn.load(path))
        return made[name]

    return checkpoint
