"""`qnext doctor` on machines that lack something, as a user sees it."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qnext import doctor
from qnext.cli import main
from qnext.lowering.npu import probe
from qnext.lowering.target import Facts

NO_LIBRARY = "libhccl.so: cannot open shared object file: No such file or directory"


def test_without_torch_npu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"{'torch':<20} {torch.__version__}" in out
    assert "missing: torch_npu is not installed: pip install 'qnext[npu]'" in out
    assert f"{'target':<20} reference" in out
    assert f"{'chunk_delta_rule':<20} ?      not probed; lowering assumes yes\n" in out
    assert f"{'chunk_strong_decay':<20} ?      not probed; lowering assumes no\n" in out
    assert f"{'state_float32':<20} ?      not probed; lowering assumes yes on npu:950" in out


def test_the_compiler_of_target_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/opt/{name}" if name == "c++" else None)
    assert main(["doctor"]) == 0
    assert f"{'C++ compiler':<20} /opt/c++\n" in capsys.readouterr().out
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["doctor"]) == 0
    assert "none: target 'cpu' runs on the reference" in capsys.readouterr().out


def test_without_cann(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torch_npu.py").write_text(f"print('noise')\nraise ImportError({NO_LIBRARY!r})")
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(probe, "installed_version", lambda: "2.13.0")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)  # nothing but the object, whatever imports print
    assert found["torch_npu"] == "2.13.0" and found["cann"] is None and found["device"] is None
    assert found["missing"].startswith("CANN is absent, torch_npu does not find libhccl.so: ")
    assert [row["fact"] for row in found["facts"]] == list(doctor.PROBED)
    assert all(row["holds"] is None for row in found["facts"])


def test_unknown_chip(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    sys.modules["torch_npu"].__version__ = "2.13.0"  # type: ignore[attr-defined]
    monkeypatch.setattr(probe, "device_name", lambda: "Ascend310P3")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "missing: no target knows Ascend310P3: known are 'npu:910b' (Ascend 910B (A2)), " in out


def test_with_an_npu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    package = ModuleType("torch_npu")
    package.__version__ = "2.13.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_npu", package)
    monkeypatch.setattr(probe, "device_name", lambda: "Ascend910_9391")
    monkeypatch.setattr(probe, "cann_version", lambda: "8.5.0")
    rows = (probe.Row("chunk_delta_rule", True, "ran"), probe.Row("custom_conv", False, "no op"))
    monkeypatch.setattr(probe, "device_facts", lambda: probe.Findings(Facts(), rows))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "missing" not in "".join(out)
    assert f"{'CANN':<20} 8.5.0" in out and f"{'device':<20} Ascend910_9391" in out
    assert f"{'target':<20} npu:a3 (Ascend 910C, one die (A3))" in out
    assert out[-2:] == [f"{'chunk_delta_rule':<20} yes    ran", f"{'custom_conv':<20} no     no op"]
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == "npu:a3" and found["missing"] is None
    assert found["facts"][0] == {"fact": "chunk_delta_rule", "holds": True, "reason": "ran"}


def test_every_probed_fact_has_a_row_without_npu() -> None:
    assert set(doctor.PROBED) < set(Facts._fields)


def test_help_shows_how(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["doctor", "--help"])
    out = capsys.readouterr().out
    assert "qnext doctor --json" in out and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in out
