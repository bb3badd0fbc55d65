"""Tests on a device of torch_npu: `make test-npu` runs them on the software Ascend."""

import importlib.util
import warnings

import pytest


def _importable() -> bool:
    if importlib.util.find_spec("torch_npu") is None:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own
        try:
            import torch_npu  # noqa: F401
        except (ImportError, OSError):  # the wheel without CANN
            return False
    return True


collect_ignore_glob = [] if _importable() else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    """The wheel's own warning, at the first tensor whose private format it does not keep."""
    text = "ignore:Cannot create tensor with internal format:UserWarning"
    config.addinivalue_line("filterwarnings", text)


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """Device memory is poisoned by the runtime; torch.empty stays as it is here."""
