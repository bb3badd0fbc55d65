"""as_text, report, cost and memory: what is said of a step without running it."""

import math
from typing import Any

import torch

import qnext as qn
from qnext.functional.quantize import quantize
from tests.samples import spec


def whole(batch: int = 24, seq: int | None = None, layers: int = 48) -> Any:
    """The published 80B architecture."""
    config = qn.Config.from_hf({"model_type": "qwen3_next", "num_hidden_layers": layers})
    config = config.with_precision(compute=torch.bfloat16)
    function = qn.decode if seq is None else qn.prefill
    step = qn.jit(function, donate="state")
    return step.trace(*qn.specs(config, batch, 8192, seq=seq)).lower("reference")


def test_the_80b_decode_step_costs_what_a_hand_count_says() -> None:
    cost = whole().cost_analysis()
    d, experts, ffn, topk, batch = 2048, 512, 512, 10, 24
    moe = 2 * batch * (topk + 1) * 3 * d * ffn + 2 * batch * d * (experts + 1)
    delta = 2 * batch * d * (12288 + 64 + 4096) + 8 * batch * 32 * 128 * 128
    attention = 2 * batch * d * (9216 + 4096)
    head = 2 * batch * d * 151_936
    seen = 4 * 16 * 256 * 8192 * batch
    want = 48 * moe + 36 * delta + 12 * (attention + seen) + head
    assert math.isclose(cost["flops"], want, rel_tol=0.01)  # the rest is element by element
    assert cost["flops"] == sum(site["flops"] for site in cost["by_site"])
    kinds = {name: kind["parts"] for name, kind in cost["by_kind"].items()}
    assert {n for name, n in kinds.items() if "delta_rule" in name} == {36}
    assert {n for name, n in kinds.items() if "attention" in name} == {12}


def test_memory_counts_leaves_and_the_peak_between() -> None:
    lowered = whole(batch=3, layers=4)
    memory = lowered.memory_analysis()
    config = qn.Config.from_hf({"model_type": "qwen3_next", "num_hidden_layers": 4})
    params, state, tokens = qn.specs(config.with_precision(compute=torch.bfloat16), 3, 8192)
    sizes = [sum(t.nbytes for t in qn.functional.tree.leaves(x)) for x in (params, state, tokens)]
    assert memory["arguments"] == dict(zip(("params", "state", "tokens"), sizes, strict=True))
    assert memory["donated"] == sizes[1]
    assert 0 < memory["temporaries"] < 2**20


def test_text_has_a_line_a_site_under_its_part() -> None:
    lowered = qn.jit(qn.decode).trace(*qn.specs(qn.Config.from_hf(spec("base")), 3, 150)).lower()
    lines = lowered.as_text().splitlines()
    headings = [line for line in lines if line.startswith("#")]
    assert headings == [
        "# the whole step",
        *(f"# .layers[{i}]" for i in range(4)),
        "# the whole step",
        "# .head[0]",
    ]
    rules = [line.split() for line in lines if "delta_rule" in line]
    assert [line[1:4] for line in rules] == [["delta_rule", "[3,1,6,14]f32", "reference"]] * 3
    assert len(lines) - len(headings) == lowered.cost_analysis()["launches"]
    assert "    3  delta_rule: reference (reference has no rules)" in lowered.report()


def test_products_of_int8_run_at_their_own_rate() -> None:
    """A prefill of 80B's widths, long enough for its products to wait for arithmetic."""
    config = qn.Config.from_hf({"num_hidden_layers": 1}).with_precision(compute=torch.bfloat16)
    params, *rest = qn.specs(config, 8, 4096, seq=4096)
    step = qn.jit(qn.prefill).trace(quantize(params), *rest).lower("npu:910b")
    chip = step.target.chip
    assert chip is not None and chip.int8_ops > chip.bf16_flops
    sites = {site["node"]: site for site in step.cost_analysis()["by_site"]}
    products = sites["npu_quant_matmul"]
    assert products["seconds_at_roofline"] == products["flops"] / chip.int8_ops
    assert products["flops"] == 2 * 8 * 4096 * 2048 * (2 * 2048 + 2 * 4096)  # q, k, v and z
