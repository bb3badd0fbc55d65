"""The block of docs/lowering.md that is for a machine with an NPU."""

from typing import Any

import torch

import qnext as qn
from tests.docs.pages import ROOT, blocks
from tests.npu.models import case, here, params, there


def test_the_block_for_a_machine_with_an_npu() -> None:
    """A call, then a replay of its graph, are two steps of plain decoding."""
    given = case("decode", params("fused"))
    weights, state, tokens = there(given.arguments)
    step = qn.jit(given.function, donate="state")
    names: dict[str, Any] = {"params": weights, "state": state, "tokens": tokens}
    names["lowered"] = step.trace(*given.arguments).lower(here(), strict=True)
    (block,) = blocks(ROOT / "docs" / "lowering.md", 'python title="on an NPU"')
    exec(compile(block, "docs/lowering.md", "exec"), names)

    again = qn.jit(given.function).trace(*given.arguments).lower(here(), strict=True).compile()
    weights, state, tokens = there(given.arguments)
    for _ in range(2):
        want, state = again(weights, state, tokens)
    assert torch.equal(names["logits"].cpu(), want.cpu())
    assert torch.equal(names["state"].lengths.cpu(), given.arguments[1].lengths + 2)
