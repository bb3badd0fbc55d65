"""Every rule of the table fires on its sample and declines its counter-sample, with its reason."""

from typing import Any, NamedTuple

import pytest
import torch

import qnext as qn
from qnext.lowering.npu.table import RULES
from qnext.lowering.stages import Lowered
from qnext.lowering.target import resolve
from tests.lowering.test_npu_rules import BF16, SMALL, lowered

FLOAT32 = {"precision": {"compute": torch.float32}}
PREFILL = {"function": qn.prefill, "seq": 70}
ODD_HEADS = {"head_dim": 40}
SHARED = {"shared_expert_intermediate_size": 56}
DENSE = {"num_experts": 0}
RANK = {"mesh": qn.Mesh(tp=2, whole=("delta_heads", "vocab"))}
# groups of other sequences, to whose ranks tokens travel
GROUPS = {"mesh": qn.Mesh(dp=4), "num_experts": 8, "hidden_size": 1024}
WIDE_GROUPS = GROUPS | {"mesh": qn.Mesh(dp=16), "num_experts": 32}
A3, UNEVEN = {"target": "npu:a3"}, {"num_experts": 10}
WIDE_STATE = {"precision": {"state": torch.float32}}
STRONG = {"target": resolve("npu:910b", chunk_strong_decay=True)}


class Row(NamedTuple):
    """Arguments of `lowered` for the sample and the counter-sample, and the reason's beginning."""

    fires: dict[str, Any]
    declines: dict[str, Any]
    reason: str


KEEP = [r"re:.*\.mlp\.(gate|shared_expert_gate)$", r"re:.*in_proj_ba$", "lm_head"]
INT8 = {"int8": KEEP}
ALONE = INT8 | SHARED  # a shared expert of another width lowers by itself
WIDE = ALONE | {"shared_expert_intermediate_size": 10_300 // 2}
NO_NORM_ALONE = {"int8": [*KEEP, r"re:.*\.linear_attn\."]}
NARROW = "{} is float32, the call wants bfloat16"
TABLE: dict[str, Row] = {
    "mixture": Row({}, SHARED, "the shared expert's width is 56, the others' 64"),
    "mixture_apart": Row(SHARED, SHARED | FLOAT32, NARROW.format("x")),
    "mixture_held": Row(RANK, RANK | SHARED, "the shared expert's width is 56, the others' 64"),
    "experts_held": Row(RANK | SHARED, RANK | SHARED | FLOAT32, NARROW.format("x")),
    "experts_direct": Row(GROUPS | A3, GROUPS, "the target's dispatch is relayed"),
    "experts_relayed": Row(WIDE_GROUPS, GROUPS, "4 ranks, the call takes 16, 32 or 64"),
    "experts_gathered": Row(GROUPS, GROUPS | FLOAT32, NARROW.format("x")),
    "joined": Row({}, FLOAT32, NARROW.format("x")),
    "add_norm": Row({}, FLOAT32, NARROW.format("x")),
    "norm": Row({}, FLOAT32, NARROW.format("x")),
    "l2_pair": Row({}, FLOAT32, NARROW.format("x")),
    "gated_norm": Row({}, FLOAT32, NARROW.format("x")),
    "conv_sgl": Row(
        {"target": resolve("npu:910b", custom_conv="sgl")}, {}, "the target's custom_conv is None"
    ),
    "conv_vllm": Row(
        {"target": resolve("npu:910b", custom_conv="vllm")}, {}, "the target's custom_conv is None"
    ),
    "conv": Row({}, FLOAT32, NARROW.format("x")),
    "gates": Row({}, FLOAT32, NARROW.format("a")),
    "delta_step": Row({}, {"linear_key_head_dim": 300}, "heads of 300, the call takes 256"),
    "delta_chunks": Row(PREFILL | STRONG, PREFILL, "this CANN's chunk call is not known to be"),
    "delta_scan": Row(WIDE_STATE, PREFILL, "70 tokens a row, one by one up to 8"),
    "delta_theorem": Row(PREFILL, PREFILL | FLOAT32, NARROW.format("value")),
    "rotary": Row({}, ODD_HEADS, "10 of 40 channels turn, both must be multiples of 32"),
    "rotary_composed": Row(ODD_HEADS, FLOAT32, NARROW.format("query")),
    "kv_write": Row({}, FLOAT32, NARROW.format("key")),
    "attention_lengths": Row({"host_lengths": True}, {}, "lengths stay on the device"),
    "attention": Row({}, ODD_HEADS, "heads of 40: must be a multiple of 16 up to 512"),
    "attention_composed": Row(ODD_HEADS, FLOAT32, NARROW.format("query")),
    "int8_mixture": Row(INT8, ALONE, "the shared expert's width is 56, the others' 64"),
    "int8_mixture_held": Row(
        RANK | INT8, RANK | ALONE, "the shared expert's width is 56, the others' 64"
    ),
    "int8_experts_held": Row(RANK | ALONE, RANK | ALONE | FLOAT32, NARROW.format("x")),
    "int8_experts_direct": Row(
        GROUPS | INT8 | A3, GROUPS | INT8 | A3 | UNEVEN, "10 experts on 4 ranks, the call wants"
    ),
    "int8_experts_relayed": Row(WIDE_GROUPS | INT8, WIDE_GROUPS, "experts are no int8"),
    "int8_experts_gathered": Row(GROUPS | INT8, GROUPS, "experts are no int8"),
    "int8_experts": Row(ALONE, ALONE | FLOAT32, NARROW.format("x")),
    "add_norm_tokens": Row(INT8, NO_NORM_ALONE | FLOAT32, NARROW.format("x")),
    "gated_norm_tokens": Row(INT8, INT8 | FLOAT32, NARROW.format("x")),
    "tokens": Row(INT8, INT8 | FLOAT32, NARROW.format("x")),
    "gated_product": Row(ALONE, WIDE, "10300 columns, the call takes 10240"),
    "gated_product_wide": Row(WIDE, INT8, "another pattern"),
    "products": Row(INT8, INT8 | FLOAT32, "another pattern"),
    "swiglu": Row(DENSE, DENSE | FLOAT32, NARROW.format("x")),
}
ALWAYS = {"reduced": RANK | SHARED, "gathered": RANK}  # nothing that they would decline
BY_THEMSELVES = {"gumbel_composed", "rows_put"}  # of functions other than the model's, below


def step_of(host_lengths: bool = False, **how: Any) -> Lowered:
    """What `lowered` gives, or the same with lengths from the host."""
    if not host_lengths:
        return lowered(**how)
    config = qn.Config.from_hf(SMALL).with_precision(compute=BF16, state=BF16)
    traced = qn.jit(qn.decode).trace(*qn.specs(config, 3, 300))
    return traced.lower("npu:910b", host_lengths=True)


def fired(step: Lowered, rule: str) -> bool:
    return any(verdict.rule == rule for verdict in step.verdicts.values())


def told(step: Lowered, rule: str) -> list[str]:
    """Why a rule declined, wherever it did."""
    given = {reason for verdict in step.verdicts.values() for reason in verdict.reasons}
    return [r.removeprefix(f"{rule}: ") for r in given if r.startswith(f"{rule}: ")]


def test_the_table_is_whole() -> None:
    known = TABLE.keys() | ALWAYS.keys() | BY_THEMSELVES
    assert [rule.name for rule in RULES if rule.name not in known] == []
    assert len({rule.name for rule in RULES}) == len(RULES) == len(known)


@pytest.mark.parametrize("rule", TABLE)
def test_it_fires_on_its_sample(rule: str) -> None:
    assert fired(step_of(**TABLE[rule].fires), rule)


@pytest.mark.parametrize("rule", ALWAYS)
def test_collectives_are_calls(rule: str) -> None:
    assert fired(step_of(**ALWAYS[rule]), rule)


@pytest.mark.parametrize("rule", TABLE)
def test_it_declines_its_counter_sample(rule: str) -> None:
    step, reason = step_of(**TABLE[rule].declines), TABLE[rule].reason
    assert any(given.startswith(reason) for given in told(step, rule)), told(step, rule)


def test_noise_is_always_composed() -> None:
    def noise(seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return qn.functional.ops.gumbel(seed=seed, position=position, vocab=211)

    two = torch.zeros(2, dtype=torch.int64)
    assert fired(qn.jit(noise).trace(two, two).lower("npu:a3"), "gumbel_composed")
    lacking = resolve("npu:a3", missing=("npu_mrope",))  # it makes no call that could be missing
    assert fired(qn.jit(noise).trace(two, two).lower(lacking), "gumbel_composed")


def test_rows_are_written_by_one_index_of_int64() -> None:
    def write(pool: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return pool.index_put((index,), pool.new_zeros(()))

    pool = torch.zeros(7, 3, 5)
    step = qn.jit(write, donate="pool").trace(pool, torch.tensor([2, 4])).lower("npu:910b")
    assert fired(step, "rows_put") and [w.verdict for w in step.writes] == ["in place"]
    step = qn.jit(write).trace(pool, torch.tensor([[2, 4]])).lower("npu:910b")
    assert told(step, "rows_put") == ["the index is torch.int64 of 2 axes, must be int64 of one"]
