"""Lowering to the NPU targets on shapes alone: no torch_npu, no device, nothing computed."""

from collections import Counter
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import qnext as qn
from qnext.lowering.stages import Lowered
from qnext.lowering.target import resolve

BF16 = torch.bfloat16
SMALL = {
    "vocab_size": 211,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 48,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "intermediate_size": 80,
}


def lowered(
    function: Any = qn.decode,
    seq: int | None = None,
    batch: int = 3,
    target: Any = "npu:910b",
    donate: str | tuple[str, ...] = "state",
    precision: dict[str, torch.dtype] | None = None,
    draft: int = 0,
    **changes: Any,
) -> Lowered:
    config = qn.Config.from_hf(SMALL | changes)
    config = config.with_precision(**({"compute": BF16, "state": BF16} | (precision or {})))
    step = qn.jit(function, donate=donate)
    return step.trace(*qn.specs(config, batch, 300, seq=seq, draft=draft)).lower(target)


def calls(step: Lowered, part: str) -> list[str]:
    lines = step.as_text().splitlines()
    owner = [site["part"] for site in step.cost_analysis()["by_site"]]
    body = [line for line in lines if not line.startswith("#")]
    return [line for line, belongs in zip(body, owner, strict=True) if belongs == part]


def test_every_primitive_of_a_decode_step_has_a_rule() -> None:
    step = lowered()
    assert "reference" not in step.report()
    fired = {line.split(": ")[1] for line in step.report().splitlines()}
    assert fired == set(
        "add_norm attention conv delta_step gated_norm gates joined kv_write l2_pair mixture norm "
        "rotary".split()
    )


def test_launches_of_a_layer() -> None:
    """Past the first layers, which also carry what a step computes once."""
    step = lowered(num_hidden_layers=8)
    assert len(calls(step, ".layers[5]")) == 18 + 11
    assert len(calls(step, ".layers[7]")) <= 10 + 11


def test_launches_of_the_80b_step() -> None:
    config = qn.Config.from_hf({"model_type": "qwen3_next"})
    config = config.with_precision(compute=BF16, state=BF16)
    step = qn.jit(qn.decode, donate="state").trace(*qn.specs(config, 24, 8192)).lower("npu:910b")
    launches = step.cost_analysis()["launches"]
    once = 27  # positions, pages, rotary tables, mask, window and slot indices: once a step
    assert launches <= 36 * 18 + 12 * 10 + 48 * 11 + 3 + once
    assert step.cost_analysis()["seconds_of_launches"] == pytest.approx(launches * 2e-6)


def test_no_pool_is_copied_when_donated_and_each_is_when_not() -> None:
    assert Counter(write.verdict for write in lowered().writes) == {"in place": 3 * 2 + 2}
    kept = lowered(donate=())
    assert Counter(write.verdict for write in kept.writes) == {"copied": 3 * 2 + 2}
    assert "copied: state.layers[1].recurrent is not donated" in kept.as_text()
    assert kept.cost_analysis()["launches"] == lowered().cost_analysis()["launches"] + 8


def test_prefill_takes_the_chunk_call_and_its_absence_is_told() -> None:
    step = lowered(qn.prefill, seq=70)
    assert "delta_rule: delta_chunks" in step.report()
    assert "delta_step: 70 tokens a row, the call takes 8" in _reasons(step, "delta_chunks")
    step = lowered(qn.prefill, seq=70, target=resolve("npu:910b", chunk_delta_rule=False))
    assert "delta_chunks: this CANN has no npu_chunk_gated_delta_rule" in step.report()
    with pytest.raises(qn.LoweringError, match="this CANN has no npu_chunk_gated_delta_rule"):
        config = qn.Config.from_hf(SMALL).with_precision(compute=BF16, state=BF16)
        traced = qn.jit(qn.prefill).trace(*qn.specs(config, 3, 300, seq=70))
        traced.lower(resolve("npu:a3", chunk_delta_rule=False), require={"delta_rule"})


def _reasons(step: Lowered, rule: str) -> str:
    return " ".join(r for v in step.verdicts.values() if v.rule == rule for r in v.reasons)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"precision": {"state": torch.float32}}, "delta_step: state is float32, the call wants"),
        ({"precision": {"compute": torch.float32}}, "conv: x is float32, the call wants bfloat16"),
        ({"head_dim": 40}, "rotary: 10 of 40 channels turn, both must be multiples of 32"),
        ({"head_dim": 40}, "attention: heads of 40: must be a multiple of 16 up to 512"),
        ({"linear_key_head_dim": 300}, "delta_step: heads of 300, the call takes 256"),
        ({"shared_expert_intermediate_size": 56}, None),
    ],
)
def test_a_rule_that_declines_says_why(changes: dict[str, Any], reason: str | None) -> None:
    step = lowered(**changes)
    if reason is not None:
        assert reason in step.report()
    else:  # a shared expert of another width stays beside the routed ones
        told = "reference (mixture: the shared expert's width is 56, the others' 64)"
        assert f"experts: {told}" in step.report() and f"route: {told}" in step.report()


def test_a_target_with_float32_state_takes_it() -> None:
    step = lowered(precision={"state": torch.float32}, target="npu:950")
    assert "delta_rule: delta_step" in step.report()


def test_weights_are_packed_once() -> None:
    step = lowered()
    assert step.prepare is not None
    targets = Counter(str(node.target) for node in step.graph.graph.nodes)
    assert "aten.exp.default" not in targets  # of A_log
    prepared = Counter(str(node.target) for node in step.prepare.graph.nodes)
    assert prepared["aten.cat.default"] == 3 + 4 * 3  # in-projections; router, gate_up and down


@pytest.mark.skipif(find_spec("torch_npu") is not None, reason="needs torch_npu to be absent")
def test_compiling_without_torch_npu_names_the_extra() -> None:
    with pytest.raises(qn.TargetError, match=r"qnext\[npu\]"):
        lowered().compile()


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(qn.TargetError, match="'npu:910b', 'npu:a3', 'npu:950'"):
        lowered(target="npu:910c")
