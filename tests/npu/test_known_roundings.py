"""Bugs that serving stacks for this model had, of dtypes and decay, in steps on the device.

Numbers are those of the inventory of serving stacks (section 8).
"""

import re

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.tree import leaves_with_paths, map_leaves, rebuild
from qnext.lowering.compiled import Compiled
from qnext.lowering.softnpu import bridge
from tests.npu.models import BF16, here, there
from tests.npu.runs import BUDGET, DRAFT, F32, RULE, compiled, exact, recurrent, run, weights
from tests.samples import relative_rms
from tests.sequences import BATCH, used, words

# --- dtypes ------------------------------------------------------------------------------------


def states_of(step: Compiled) -> set[tuple[str, torch.dtype]]:
    """The calls of a step that take a recurrent state, each with its dtype."""
    return {
        (str(node.target).split(".")[1], node.kwargs["state"].meta["val"].dtype)
        for node in step.graph.graph.nodes
        if node.op == "call_function" and "state" in node.kwargs
    }


@pytest.mark.parametrize("kind", ["decode", "verify"])
def test_5_a_float32_state_stays_float32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug 5: a pool of float32 states under a kernel for bfloat16, and text that repeats itself.

    Where the call takes bfloat16 alone it is not asked, and the report says so; where it takes
    float32 it gets float32. Either way the state keeps what bfloat16 cannot hold.
    """
    given, function = weights(F32), {"decode": qn.decode, "verify": qn.verify}[kind]
    tokens = words(1)[:, 0] if kind == "decode" else words(DRAFT + 1)
    arguments = (given, used(given, DRAFT), tokens)
    truth = exact(given)
    want, kept = function(truth, used(truth, DRAFT), tokens)
    monkeypatch.setitem(bridge.CAPABILITIES, "state_float32", True)
    for takes in (False, True):
        step = compiled(function, arguments, here().with_facts(state_float32=takes))
        told = "delta_step: state is float32, the call wants bfloat16"
        assert (told in step.lowered.report()) != takes
        fused = ("npu_recurrent_gated_delta_rule", F32)
        assert states_of(step) == ({fused} if takes else set())
        bridge.CAPABILITIES["state_float32"] = takes
        logits, after = qn.place(step(*there(arguments)), "cpu")
        assert relative_rms(logits, want) < BUDGET
        assert recurrent(after).dtype == F32
        assert not torch.equal(recurrent(after), recurrent(after).to(BF16).float())
        assert relative_rms(recurrent(after), recurrent(kept)) < RULE
        after = after._replace(accepted=torch.zeros_like(after.accepted))  # nothing is taken
        blunt = map_leaves(lambda leaf: leaf.to(BF16).to(leaf.dtype), after.layers)
        sharp, dull = (
            recurrent(step(*there((given, after._replace(layers=layers), tokens)))[1])
            for layers in (after.layers, blunt)
        )
        assert not torch.equal(sharp.cpu(), dull.cpu())  # and reads it


def test_5_the_narrow_call_refuses_a_wide_state() -> None:
    """Were it asked all the same, it would fail and not read float32 as bfloat16."""
    given = weights(F32)
    arguments = (given, used(given), words(1)[:, 0])
    step = compiled(qn.decode, arguments, here().with_facts(state_float32=True))
    with pytest.raises(RuntimeError, match="161002"):
        step(*there(arguments))


@pytest.mark.parametrize("kind", ["decode", "verify", "prefill"])
def test_10_windows_of_another_dtype_than_x(kind: str) -> None:
    """Bug 10: a window, or keys and values, in a dtype that activations have not.

    The rules decline and say so; the step computes what bfloat16 pools would hold, to the bit.
    """
    given, function = weights(), getattr(qn, kind)
    tokens = {"decode": words(1)[:, 0], "verify": words(3), "prefill": words(30)}[kind]
    narrow, wide = (used(given, DRAFT, dtype) for dtype in (BF16, F32))
    with pytest.raises(qn.LoweringError, match="window is float32, the call wants bfloat16"):
        compiled(function, (given, wide, tokens))
    step = compiled(function, (given, wide, tokens), strict=False)
    assert re.search("kv_write: key.* is float32", step.lowered.report())
    logits, after = qn.place(step(*there((given, wide, tokens))), "cpu")
    want, other = function(given, narrow, tokens)
    assert relative_rms(logits, want) < BUDGET
    for (path, one), (_, two) in zip(
        leaves_with_paths(after.layers), leaves_with_paths(other.layers), strict=True
    ):
        assert one.dtype == (BF16 if "recurrent" in path else F32), path
        assert torch.equal(one, one.to(BF16).to(one.dtype)), path  # what x can hold
        assert relative_rms(one[1:], two[1:]) < RULE, path


# --- decay and rounding ------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [BF16, F32], ids=["bfloat16", "float32"])
def test_23_strong_decay(kept: torch.dtype) -> None:
    """Bug 23: the fused prefill wants -1 <= g <= 0; here g goes from 0 to -30 and beyond."""
    given = weights(kept)

    def strong(path: str, leaf: Tensor) -> Tensor:
        if path.endswith("A_log"):
            return torch.linspace(0.05, 8, leaf.shape[0]).log()
        return torch.linspace(-6, 4, leaf.shape[0]) if path.endswith("dt_bias") else leaf

    given = rebuild(given, [strong(path, leaf) for path, leaf in leaves_with_paths(given)])
    mixer = given.layers[0].mixer
    reach = -mixer.A_log.exp() * torch.nn.functional.softplus(mixer.dt_bias)
    assert reach.min() < -30 and reach.max() > -0.01
    tokens, lengths = words(70), torch.tensor([70, 5, 64, 65, 69])
    step = compiled(qn.prefill, (given, used(given), tokens, lengths))
    assert "not known to be right for g < -1" in step.lowered.report()
    logits, after = qn.place(step(*there((given, used(given), tokens, lengths))), "cpu")
    truth = exact(given)
    want, scanned = used(truth), used(truth)
    for at in range(70):
        now = (lengths > at).int()
        out, scanned = qn.forward(truth, scanned, tokens[:, at : at + 1], now)
        want = out[:, 0] if at == 0 else torch.where(now[:, None] > 0, out[:, 0], want)
    assert relative_rms(logits, want) < BUDGET
    assert relative_rms(recurrent(after), recurrent(scanned)) < RULE


@pytest.mark.parametrize("kept", [BF16, F32], ids=["bfloat16", "float32"])
def test_24_one_budget_for_decode_verify_and_prefill(kept: torch.dtype) -> None:
    """Bug 24: beta rounded to bfloat16 in prefill and verify, float32 in decode.

    The same twelve tokens three ways, against float32 with the same weights.
    """
    given, tokens = weights(kept), words(12)
    start, truth = used(given, DRAFT), exact(given)
    want, _ = qn.forward(truth, used(truth, DRAFT), tokens)
    whole, _ = run(qn.forward, given, start, tokens)
    ways = {"prefill": whole}
    state, parts = start, []
    for token in tokens.unbind(1):
        logits, state = run(qn.decode, given, state, token)
        parts.append(logits)
    ways["decode"] = torch.stack(parts, dim=1)
    state, parts = start, []
    for piece in tokens.split(DRAFT + 1, dim=1):
        logits, pending = run(qn.verify, given, state, piece)
        state = qn.commit(pending, torch.full((BATCH,), DRAFT + 1))
        parts.append(logits)
    ways["verify"] = torch.cat(parts, dim=1)
    errors = {way: relative_rms(logits, want) for way, logits in ways.items()}
    assert max(errors.values()) < min(BUDGET, 2 * min(errors.values()))
