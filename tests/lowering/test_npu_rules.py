"""Lowering to the NPU targets on shapes alone: no torch_npu, no device, nothing computed."""

from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import qnext as qn
from qnext.functional.quantize import quantize
from qnext.lowering.stages import Lowered
from qnext.lowering.target import resolve
from tests.samples import FUSED

BF16 = torch.bfloat16
SMALL = FUSED


_LOWERED: dict[str, Lowered] = {}  # nobody changes one, and tests ask for the same


def lowered(**how: Any) -> Lowered:
    """A step of the small model, see `lower`."""
    key = repr(sorted(how.items(), key=lambda item: item[0]))
    if key not in _LOWERED:
        _LOWERED[key] = lower(**how)
    return _LOWERED[key]


def lower(
    function: Any = qn.decode,
    seq: int | None = None,
    batch: int = 3,
    target: Any = "npu:910b",
    donate: str | tuple[str, ...] = "state",
    precision: dict[str, torch.dtype] | None = None,
    draft: int = 0,
    int8: list[str] | None = None,
    mesh: qn.Mesh | None = None,
    **changes: Any,
) -> Lowered:
    """`int8` quantises all but what it lists; of a mesh it is the step of one rank."""
    config = replace(qn.Config.from_hf(SMALL | changes), mesh=mesh or qn.Mesh())
    config = config.with_precision(**({"compute": BF16, "state": BF16} | (precision or {})))
    step = qn.jit(function, donate=donate)
    params, *rest = qn.specs(config, batch, 300, seq=seq, draft=draft)
    params = params if int8 is None else quantize(params, ignore=int8)
    return step.trace(params, *rest).lower(target)


def calls(step: Lowered, part: str) -> list[str]:
    lines = step.as_text().splitlines()
    owner = [site["part"] for site in step.cost_analysis()["by_site"]]
    body = [line for line in lines if not line.startswith("#")]
    return [line for line, belongs in zip(body, owner, strict=True) if belongs == part]


def test_every_primitive_of_a_decode_step_has_a_rule() -> None:
    step = lowered()
    assert "reference" not in step.report()
    fired = {line.split(": ")[1].split()[0] for line in step.report().splitlines()}
    assert fired == set(
        "add_norm attention conv delta_step gated_norm gates joined kv_write l2_pair mixture norm "
        "rotary".split()
    )


def test_launches_of_a_layer() -> None:
    """Past the first layers, which also carry what a step computes once."""
    step = lowered(num_hidden_layers=8)
    assert len(calls(step, ".layers[5]")) == 17 + 11
    assert len(calls(step, ".layers[7]")) == 10 + 11


@pytest.mark.parametrize(
    ("package", "saved", "rows"),
    [
        ("sgl", 4, ["contiguous", "causal_conv1d; in place: donated, last use"]),
        ("vllm", 5, ["npu_causal_conv1d_custom; in place: donated, last use"]),
    ],
)
def test_a_package_s_convolution_is_one_launch(package: str, saved: int, rows: list[str]) -> None:
    """And sgl's takes no columns of a joined projection: these are copied first."""
    step = lowered(num_hidden_layers=8, target=resolve("npu:910b", custom_conv=package))
    before = calls(lowered(num_hidden_layers=8), ".layers[5]")
    layer = calls(step, ".layers[5]")
    assert len(layer) == len(before) - saved
    convolution = [line for line in layer if "short_conv" in line]
    assert [line.split(f"conv_{package}")[1].strip() for line in convolution] == rows
    assert f"short_conv: conv_{package}" in step.report()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"function": qn.prefill, "seq": 70}, "a window may move by other than one input"),
        ({"draft": 2}, "windows of 5: with 1 tokens a row the call writes 3"),
        ({"linear_conv_kernel_dim": 3}, "3 taps, the call takes 4"),
        ({"linear_value_head_dim": 44}, "456 channels, the call takes multiples of 16"),
        ({"precision": {"compute": torch.float32}}, "x is float32, the call wants bfloat16"),
        ({"target": "npu:910b"}, "the target's custom_conv is None"),
    ],
)
def test_a_package_s_convolution_declines(changes: dict[str, Any], reason: str) -> None:
    step = lowered(**({"target": resolve("npu:910b", custom_conv="sgl")} | changes))
    told = [v.reasons for v in step.verdicts.values() if v.site == "short_conv"]
    assert told and all(f"conv_sgl: {reason}" in " ".join(reasons) for reasons in told)


@pytest.mark.slow
def test_launches_of_the_80b_step() -> None:
    config = qn.Config.from_hf({"model_type": "qwen3_next"})
    config = config.with_precision(compute=BF16, state=BF16)
    step = qn.jit(qn.decode, donate="state").trace(*qn.specs(config, 24, 8192)).lower("npu:910b")
    launches = step.cost_analysis()["launches"]
    # embedding, last norm, head; positions, pages, mask, window index, lengths: once a step
    assert launches == 36 * 17 + 12 * 10 + 48 * 11 + 3 + 12
    assert step.cost_analysis()["seconds_of_launches"] == pytest.approx(launches * 2e-6)
    kinds = step.cost_analysis()["by_kind"]
    delta, attention = (
        next(kind for name, kind in kinds.items() if word in name)
        for word in ("npu_recurrent_gated_delta_rule", "npu_fused_attention")
    )
    assert (delta["parts"], attention["parts"]) == (36, 12)
    assert delta["launches"] >= 36 * (17 + 11) and attention["launches"] >= 12 * (10 + 11)


def test_no_pool_is_copied_when_donated_and_each_is_when_not() -> None:
    lengths = 1  # carried into the donated state at the end
    assert Counter(write.verdict for write in lowered().writes) == {"in place": 3 * 2 + 2 + lengths}
    kept = lowered(donate=())
    assert Counter(write.verdict for write in kept.writes) == {"copied": 3 * 2 + 2}
    assert "copied: state.layers[1].recurrent is not donated" in kept.as_text()
    assert kept.cost_analysis()["launches"] == lowered().cost_analysis()["launches"] + 8 - lengths


def test_prefill_takes_the_chunk_call_only_where_strong_decay_is_known_to_be_right() -> None:
    step = lowered(function=qn.prefill, seq=70, target=resolve("npu:910b", chunk_strong_decay=True))
    assert "delta_rule: delta_chunks" in step.report()
    assert "delta_step: 70 tokens a row, the call takes 8" in _reasons(step, "delta_chunks")
    for facts, reason in (
        ({}, "this CANN's chunk call is not known to be right for g < -1"),
        ({"chunk_delta_rule": False}, "this CANN has no npu_chunk_gated_delta_rule"),
    ):
        step = lowered(function=qn.prefill, seq=70, target=resolve("npu:910b", **facts))
        assert "delta_rule: delta_theorem" in step.report()
        assert f"delta_chunks: {reason}" in _reasons(step, "delta_theorem")


def test_what_is_required_and_left_is_an_error_with_the_reasons() -> None:
    config = qn.Config.from_hf(SMALL).with_precision(compute=torch.float32, state=BF16)
    traced = qn.jit(qn.prefill).trace(*qn.specs(config, 3, 300, seq=70))
    with pytest.raises(qn.LoweringError, match="delta_theorem: value is float32, the call wants"):
        traced.lower("npu:a3", require={"delta_rule"})


def test_the_chunk_call_has_a_float32_state_of_its_own() -> None:
    facts = {"chunk_strong_decay": True, "state_float32": True}
    given = {"function": qn.prefill, "seq": 70, "precision": {"state": torch.float32}}
    step = lowered(**given, target=resolve("npu:910b", **facts))
    assert "delta_chunks: state is float32" in _reasons(step, "delta_theorem")
    step = lowered(**given, target=resolve("npu:910b", **facts, chunk_state_float32=True))
    assert "delta_rule: delta_chunks" in step.report()


def test_a_short_prefill_takes_the_recurrent_call() -> None:
    """The states before the last go to scratch; pools must have a slot for each token."""
    step = lowered(function=qn.prefill, seq=5, draft=4)
    assert "delta_rule: delta_step" in step.report()
    report = lowered(function=qn.prefill, seq=5).report()
    assert "delta_rule: delta_scan (delta_step: a pool of 4 slots, the call wants one" in report


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
        (
            {"shared_expert_intermediate_size": 56},
            "mixture: the shared expert's width is 56, the others' 64",
        ),
    ],
)
def test_a_rule_that_declines_says_why(changes: dict[str, Any], reason: str) -> None:
    assert reason in lowered(**changes).report()


def test_sites_that_go_with_a_declined_pattern_carry_its_reason() -> None:
    report = lowered(precision={"compute": torch.float32}).report()
    told = "reference (mixture: x is float32, the call wants bfloat16; mixture_apart: x is"
    assert f"experts: {told}" in report and f"route: {told}" in report


def test_a_target_with_float32_state_takes_it() -> None:
    step = lowered(precision={"state": torch.float32}, target="npu:950")
    assert "delta_rule: delta_step" in step.report()


def test_weights_are_packed_once() -> None:
    step = lowered()
    assert step.prepare is not None
    targets = Counter(str(node.target) for node in step.graph.graph.nodes)
    assert "aten.exp.default" not in targets  # of A_log
    prepared = Counter(str(node.target) for node in step.prepare.graph.nodes)
    # in-projections; router, gate_up and down; cosines and sines
    assert prepared["aten.cat.default"] == 3 + 4 * 3 + 1
    assert prepared["aten.constant_pad_nd.default"] == 3  # dt_bias, as the projections' bias


@pytest.mark.skipif(find_spec("torch_npu") is not None, reason="needs torch_npu to be absent")
def test_compiling_without_torch_npu_names_the_extra() -> None:
    with pytest.raises(qn.TargetError, match=r"qnext\[npu\]"):
        lowered().compile()


@pytest.mark.parametrize(
    ("call", "site"),
    [
        ("npu_add_rms_norm", "rms_norm"),
        ("npu_recurrent_gated_delta_rule", "delta_rule"),
        ("npu_moe_finalize_routing", "experts"),
        ("npu_mrope", "rotary"),
        ("npu_scatter_pa_kv_cache", "kv_write"),
        ("npu_fused_infer_attention_score_v2", "attention"),
    ],
)
def test_a_call_that_is_missing_is_a_reason(call: str, site: str) -> None:
    report = lowered(target=resolve("npu:910b", missing=(call,))).report()
    told = [
        line for line in report.splitlines() if f"the installed torch_npu has no {call}" in line
    ]
    assert site in {line.split()[1].rstrip(":") for line in told}


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(qn.TargetError, match="'npu:910b', 'npu:a3', 'npu:950'"):
        lowered(target="npu:910c")


SHARED_KEPT = [r"re:.*\.mlp\.(gate|shared_expert_gate)$", r"re:.*in_proj_ba$", "lm_head"]


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize(("rank", "batch"), [(0, 3), (0, 1), (1, 3), (3, 1)])
def test_launches_of_a_rank(rank: int, batch: int, int8: bool) -> None:
    """Those of one device, a table a mixture, and the collectives; less without shared experts.

    What is gathered of several rows has ranks one after another, and is copied side by side.
    """
    sizes: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2}
    sizes |= {"linear_num_key_heads": 4, "linear_num_value_heads": 12, "num_hidden_layers": 8}
    sizes |= {"vocab_size": 212, "int8": SHARED_KEPT if int8 else None}
    sizes |= {"batch": batch}
    one, step = lowered(**sizes), lowered(mesh=qn.Mesh(tp=4, rank=rank), **sizes)
    copied = batch > 1
    found = Counter(
        site["part"]
        for site in step.cost_analysis()["by_site"]
        if site["site"] in ("all_gather", "all_reduce")
    )
    assert "reference" not in step.report()
    # a block's: heads are gathered, experts added up; where the shared expert is another rank's its
    # gate, its weight and its choice are not there. With int8 the gated norm and its tokens were
    # one launch less: tokens are made of what was gathered
    for layer in range(8):
        part, delta = f".layers[{layer}]", layer % 4 < 3
        more = (3 if rank == 0 else 0) + (int8 and delta) + copied
        alone, mine = calls(one, part), calls(step, part)
        assert len(mine) == len(alone) + more, (part, "\n".join(mine), "\n".join(alone))
        assert found[part] == 2
    assert len(calls(step, ".head[0]")) == len(calls(one, ".head[0]")) + 1 + copied
