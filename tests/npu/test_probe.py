"""The probes against the real torch_npu on the software Ascend, or on an NPU."""

import importlib.util
import json
import re
from typing import Any

import pytest
import torch

import qnext as qn
from qnext import doctor
from qnext.cli import main
from qnext.errors import TargetError
from qnext.lowering.npu import probe
from qnext.lowering.target import TARGETS, Facts, of_device, resolve

if importlib.util.find_spec("torch_npu") is None:
    pytest.skip("needs torch_npu: make test-npu", allow_module_level=True)

from qnext.lowering.softnpu import bridge
from tests.npu.models import case, here, params


def rows() -> dict[str, probe.Row]:
    return {row.fact: row for row in probe.device_facts().rows}


def test_every_fact_has_a_one_line_reason() -> None:
    found = probe.device_facts()
    assert {row.fact for row in found.rows} == {*doctor.PROBED, "calls"}
    for row in found.rows:
        assert row.reason and "\n" not in row.reason and "Traceback" not in row.reason
        if row.fact != "calls":
            assert bool(getattr(found.facts, row.fact)) == row.holds
    # what the package promises on every chip, so a "no" is a fault of the probe
    assert rows()["chunk_delta_rule"].holds, rows()["chunk_delta_rule"]
    assert found.facts.missing == ()


def test_findings_make_a_target() -> None:
    target = of_device(probe.device_name())
    assert target is not None
    decided = resolve(target.name, **probe.device_facts().facts._asdict())
    assert decided.chip == target.chip
    undecided = set(Facts._fields) - {*doctor.PROBED, "missing"}
    assert all(getattr(decided.facts, name) == getattr(target.facts, name) for name in undecided)


def test_chip() -> None:
    device = probe.device_name()
    right = of_device(device)
    assert right is not None
    for target in TARGETS.values():
        if target == right or target.chip is None:
            probe.check_chip(target)
        else:
            with pytest.raises(TargetError, match=f"this device is {device}: use '{right.name}'"):
                probe.check_chip(target)


def test_a_refused_call_is_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("call aclnnX failed, error code is 561002\nmore\nTraceback")

    monkeypatch.setattr(probe.require_torch_npu(), "npu_chunk_gated_delta_rule", refuse)
    reason = "npu_chunk_gated_delta_rule refuses: call aclnnX failed, error code is 561002"
    assert rows()["chunk_delta_rule"] == ("chunk_delta_rule", False, reason)


@pytest.mark.parametrize(
    "call, fact",
    [
        ("npu_fused_infer_attention_score_v2", "attention_tnd_256"),
        ("npu_chunk_gated_delta_rule", "chunk_delta_rule"),
    ],
)
def test_a_wrong_result_is_a_no(call: str, fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that runs and computes something else must not be lowered to."""
    if not rows()[fact].holds:
        pytest.skip(f"{fact} does not hold here")
    package = probe.require_torch_npu()
    right = getattr(package, call)

    def wrong(*args: Any, **named: Any) -> Any:
        return tuple(torch.full_like(out, torch.nan) for out in right(*args, **named))

    monkeypatch.setattr(package, call, wrong)
    row = rows()[fact]
    assert not row.holds and row.reason.startswith("wrong result: off by nan")


def test_a_chunk_call_that_divides_is_not_right_for_strong_decay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefill takes the call where the probe says so, and the theorem where it does not."""
    traced = qn.jit(qn.prefill).trace(*case("prefill", params("fused")).arguments)

    def rule() -> str:
        facts = probe.device_facts().facts._asdict()
        report = traced.lower(resolve(here().name, **facts)).report()
        return next(line for line in report.splitlines() if "delta_rule: " in line)

    assert rows()["chunk_strong_decay"].holds, rows()["chunk_strong_decay"]
    assert "delta_rule: delta_chunks" in rule()
    monkeypatch.setitem(bridge.CAPABILITIES, "chunk_divides", True)
    assert rows()["chunk_delta_rule"].holds  # without decay it is right
    told = "wrong result: off by nan, allowed 0.0156"
    assert rows()["chunk_strong_decay"] == ("chunk_strong_decay", False, told)
    assert "delta_rule: delta_theorem" in rule()
    assert "this CANN's chunk call is not known to be right for g < -1" in rule()


def test_a_chunk_call_that_clamps_decay_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    package = probe.require_torch_npu()
    right = package.npu_chunk_gated_delta_rule

    def clamped(*args: Any, g: torch.Tensor, **named: Any) -> Any:
        return right(*args, g=g.clamp(min=-1), **named)

    monkeypatch.setattr(package, "npu_chunk_gated_delta_rule", clamped)
    assert rows()["chunk_delta_rule"].holds
    row = rows()["chunk_strong_decay"]
    off = re.fullmatch(r"wrong result: off by (\S+), allowed 0.0156", row.reason)
    assert not row.holds and off and float(off[1]) > 0.2


def test_a_missing_call_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    package = probe.require_torch_npu()
    assert all(probe.require_call(name) is None for name in probe.CALLS)
    monkeypatch.delattr(package, "npu_mrope")
    assert probe.require_call("npu_mrope") == f"torch_npu {package.__version__} has no npu_mrope"
    found = probe.device_facts()
    assert found.facts.missing == ("npu_mrope",)
    assert found.rows[-1] == ("calls", False, "absent: npu_mrope")


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] is None and found["device"] == probe.device_name()
    assert len(found["facts"]) == len(doctor.PROBED) + 1
    assert main(["doctor"]) == 0
    assert f"{'device':<20} {probe.device_name()}" in capsys.readouterr().out
