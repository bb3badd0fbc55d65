"""Targets: names, facts, and the sentences for what a machine lacks."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qnext.errors import QnextError, TargetError
from qnext.functional.ops import short_conv
from qnext.lowering.npu import custom, probe
from qnext.lowering.target import NPUS, TARGETS, CpuFacts, Facts, of_device, resolve


def test_names() -> None:
    assert tuple(TARGETS) == ("reference", "cpu", "npu:910b", "npu:a3", "npu:950")
    for name, target in TARGETS.items():
        assert resolve(name) is target or resolve(name) == target
        assert target.name == name and (target.kind == "npu") == (target.chip is not None)
    assert hash(resolve("npu:a3")) == hash(resolve("npu:a3"))  # targets are keys of caches


def test_unknown_target_lists_the_known() -> None:
    with pytest.raises(
        TargetError, match=r"unknown target 'npu:910c': known are 'reference', 'cpu', 'npu:"
    ):
        resolve("npu:910c")
    assert issubclass(TargetError, QnextError)


def test_chip_figures_are_of_their_order() -> None:
    """Nominal figures: a wrong power of ten, the likely slip, is seen."""
    for name in NPUS:
        chip = TARGETS[name].chip
        assert chip is not None
        assert 1e14 < chip.bf16_flops < 1e15 and chip.int8_ops == 2 * chip.bf16_flops
        assert 1e12 <= chip.bytes_per_second < 1e13 and 1e-7 < chip.launch_seconds < 1e-4
        assert chip.memory_bytes % 2**30 == 0 and 32 <= chip.memory_bytes >> 30 <= 288


@pytest.mark.parametrize(
    "device, name",
    [
        ("Ascend910B3", "npu:910b"),
        ("Ascend910B4-1", "npu:910b"),
        ("Ascend910_9391", "npu:a3"),
        ("Ascend950PR_9599", "npu:950"),
        ("Ascend910_9589", "npu:950"),
        ("Ascend310P3", None),
        ("Ascend910", None),  # the first 910 has none of these calls
    ],
)
def test_target_of_a_device(device: str, name: str | None) -> None:
    target = of_device(device)
    assert (target and target.name) == name


def test_facts_differ_by_chip_and_can_be_decided() -> None:
    assert resolve("npu:910b").facts == Facts(dispatch="relayed")
    assert resolve("npu:a3").facts == Facts(dispatch="direct")
    assert resolve("npu:950").facts.state_float32
    target = resolve("npu:a3", custom_conv="sgl", attention_tnd_256=True)
    assert target.facts == Facts(dispatch="direct", custom_conv="sgl", attention_tnd_256=True)
    assert target.with_facts(custom_conv=None, attention_tnd_256=False) == resolve("npu:a3")
    assert resolve("npu:a3", missing=("npu_mrope",)).lacks("npu_mrope") == (
        "the installed torch_npu has no npu_mrope"
    )
    assert resolve("npu:a3").lacks("npu_mrope") is None


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"tnd": True}, r"unknown fact 'tnd': known are 'attention_tnd_256', "),
        ({"attention_tnd_256": 1}, "fact attention_tnd_256 is 1, must be True or False"),
        ({"custom_conv": "triton"}, r"fact custom_conv is 'triton', must be one of \(None, 'sgl'"),
        ({"max_verify_tokens": 0}, "fact max_verify_tokens is 0, must be a positive integer"),
        ({"max_verify_tokens": True}, "fact max_verify_tokens is True, must be a positive integer"),
        ({"missing": "npu_mrope"}, "fact missing is 'npu_mrope', must be a tuple of names"),
    ],
)
def test_wrong_facts_are_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        resolve("npu:910b", **facts)


@pytest.mark.parametrize("isa", ["native", "avx2", "portable"])
def test_the_cpu_has_one_fact(isa: Any) -> None:
    target = resolve("cpu", isa=isa)
    assert (target.name, target.kind, target.chip) == ("cpu", "cpu", None)
    assert target.facts == CpuFacts(isa) and (target == resolve("cpu")) == (isa == "native")
    assert target.lacks("npu_mrope") is None  # it has none of these calls, and needs none


@pytest.mark.parametrize(
    "name, facts, message",
    [
        ("cpu", {"simd": "avx2"}, r"^unknown fact 'simd': known are 'isa'$"),
        ("cpu", {"isa": "avx512"}, r"^fact isa is 'avx512', must be one of \('native', 'avx2', "),
        ("cpu", {"isa": None}, r"^fact isa is None, must be one of \('native', 'avx2', 'portable'"),
        ("cpu", {"custom_conv": "sgl"}, r"^unknown fact 'custom_conv': known are 'isa'$"),
        ("npu:a3", {"isa": "native"}, r"^unknown fact 'isa': known are 'attention_tnd_256', "),
        (
            "reference",
            {"isa": "native"},
            r"has no facts to set, got isa: give them to one of 'cpu'",
        ),
    ],
)
def test_facts_of_another_kind_are_refused(name: str, facts: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        resolve(name, **facts)


def test_the_reference_has_no_facts() -> None:
    with pytest.raises(TargetError, match=r"'reference' has no facts to set, got custom_conv: gi"):
        resolve("reference", custom_conv="sgl")


# ---- what a machine lacks


def fake(monkeypatch: pytest.MonkeyPatch, device: str, *calls: str) -> ModuleType:
    """A torch_npu whose device has a name and whose calls raise as the package does."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            "op:../third_party/op/X.cpp:47 NPU function error: call aclnnX failed, error code is "
            "561002\n[ERROR] 2026 (PID:1)\nTraceback (most recent call last):"
        )

    class Npu:
        is_available = staticmethod(lambda: device != "")
        device_count = staticmethod(lambda: 1)
        get_device_name = staticmethod(lambda: device)
        synchronize = staticmethod(lambda: None)

    package = ModuleType("torch_npu")
    for call in calls:
        setattr(package, call, refuse)
    package.npu, package.__version__ = Npu, "2.13.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_npu", package)
    return package


def broken(monkeypatch: pytest.MonkeyPatch, folder: Path, statement: str) -> None:
    """A torch_npu whose import runs a statement that raises."""
    (folder / "torch_npu.py").write_text(statement)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    monkeypatch.syspath_prepend(str(folder))


def one_line(text: str) -> bool:
    return bool(text) and "\n" not in text and "Traceback" not in text


def test_torch_npu_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    message = r"^torch_npu is not installed: pip install 'qnext\[npu\]'$"
    with pytest.raises(TargetError, match=message):
        probe.require_torch_npu()
    with pytest.raises(TargetError, match=message):
        probe.check_chip(resolve("npu:a3"))
    assert probe.require_call("npu_mrope") == probe.NEEDS_EXTRA
    for name in ("reference", "cpu"):
        probe.check_chip(resolve(name))  # has no chip to check


@pytest.mark.parametrize("kind", ["ImportError", "OSError"])
@pytest.mark.parametrize("library", ["libhccl.so", "libascendcl.so"])
def test_cann_absent(
    kind: str, library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = f"{library}: cannot open shared object file: No such file or directory"
    broken(monkeypatch, tmp_path, f"raise {kind}({text!r})")
    with pytest.raises(TargetError) as caught:
        probe.require_torch_npu()
    said = str(caught.value)
    assert said.startswith(f"CANN is absent, torch_npu does not find {library}: ") and one_line(
        said
    )
    assert "set_env.sh" in said


@pytest.mark.parametrize(
    "statement, message",
    [
        ("import nosuch", "torch_npu needs nosuch: pip install nosuch"),
        (
            "raise ImportError('libtorch_npu.so: undefined symbol: aclrtX\\nmore')",
            r"does not import, libtorch_npu.so: undefined symbol: aclrtX: install releases of tor",
        ),
    ],
)
def test_torch_npu_that_does_not_fit(
    statement: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken(monkeypatch, tmp_path, statement)
    with pytest.raises(TargetError, match=message) as caught:
        probe.require_torch_npu()
    assert one_line(str(caught.value))


def test_wrong_chip_names_both_and_the_right_target(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "Ascend910B3")
    probe.check_chip(resolve("npu:910b"))
    message = r"'npu:a3' is for Ascend 910C, one die \(A3\), this device is Ascend910B3: use 'npu:9"
    with pytest.raises(TargetError, match=message):
        probe.check_chip(resolve("npu:a3"))
    fake(monkeypatch, "Ascend310P3")
    with pytest.raises(TargetError, match=r"this device is Ascend310P3: no target knows this chip"):
        probe.check_chip(resolve("npu:a3"))


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "")
    with pytest.raises(TargetError, match="no NPU here, torch_npu sees no device: `npu-smi info`"):
        probe.check_chip(resolve("npu:910b"))
    package = fake(monkeypatch, "Ascend910B3")

    def driver() -> None:
        raise RuntimeError("aclInit failed, error code is 507008\nmore")

    monkeypatch.setattr(package.npu, "get_device_name", driver)
    with pytest.raises(TargetError, match=r"no NPU here, aclInit failed, error code is 507008: `"):
        probe.device_name()


def test_a_call_that_is_absent_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "Ascend910B3", "npu_mrope")
    assert probe.require_call("npu_mrope") is None
    assert probe.require_call("npu_swiglu") == "torch_npu 2.13.0 has no npu_swiglu"


def test_facts_where_calls_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every probe fails (here at the latest when it reaches for the device): a reason for each."""
    fake(monkeypatch, "Ascend910_9391", "npu_chunk_gated_delta_rule", "npu_mrope")
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)
    found = probe.device_facts()
    reasons = {row.fact: row.reason for row in found.rows}
    assert not any(row.holds for row in found.rows) and all(map(one_line, reasons.values()))
    assert reasons["chunk_delta_rule"] == (
        "npu_chunk_gated_delta_rule refuses: call aclnnX failed, error code is 561002"
    )
    assert reasons["state_float32"] == "torch_npu 2.13.0 has no npu_recurrent_gated_delta_rule"
    assert set(found.facts.missing) == set(probe.CALLS) - {
        "npu_chunk_gated_delta_rule",
        "npu_mrope",
    }
    resolve("npu:a3", **found.facts._asdict())  # findings are facts a target takes


@pytest.mark.parametrize("kind", ["sgl", "vllm"])
def test_a_convolution_is_taken_when_it_is_right(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, "Ascend910B3")
    absent = "sgl_kernel_npu is not installed; vllm_ascend is not installed"
    assert probe._find_conv() == (None, ("custom_conv", False, absent))
    to = torch.Tensor.to

    def here(tensor: torch.Tensor, *place: Any) -> torch.Tensor:
        return tensor if place == ("npu",) else to(tensor, *place)

    def registered(asked: str) -> None:
        if asked != kind:
            raise TargetError(f"{asked} is not installed")

    def right(*, moves_by_one: bool, **given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return short_conv(**given)

    def wrong(*, offset: torch.Tensor, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return right(offset=0 * offset, **given)  # as if nothing had been accepted

    monkeypatch.setattr(torch.Tensor, "to", here)
    monkeypatch.setattr(custom, "operator", registered)
    name = custom.PACKAGES[kind].name
    monkeypatch.setitem(custom.EMITS, kind, right)
    assert probe._find_conv() == (
        kind,
        ("custom_conv", True, f"{name} ran and gave the right result"),
    )
    monkeypatch.setitem(custom.EMITS, kind, wrong)
    conv, row = probe._find_conv()
    assert conv is None and f"{name}: wrong result: off by" in row.reason
