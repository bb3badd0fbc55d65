"""Lowered steps on the device: every site beside its definition, eager beside captured, counted."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.tree import leaves, leaves_with_paths
from qnext.lowering.compiled import Compiled
from qnext.lowering.softnpu import bridge, packages
from qnext.lowering.target import Target
from tests.npu.models import MODELS, Case, case, copied, here, params, there
from tests.npu.sites import Found, examine

KINDS = ("decode", "verify", "short", "prefill")
TARGET = here()
each_kind = pytest.mark.parametrize("kind", KINDS)
each_model = pytest.mark.parametrize("name", MODELS)


def compiled(given: Case, target: Target = TARGET) -> Compiled:
    step = qn.jit(given.function, donate="state")
    return step.trace(*given.arguments).lower(target, strict=True).compile()


def real_rows(tree: Any) -> list[tuple[str, Tensor]]:
    """The leaves of a state on the host, without scratch."""
    found = [(path, leaf.cpu()) for path, leaf in leaves_with_paths(tree)]
    return [(path, leaf[1:] if "[" in path else leaf) for path, leaf in found]


def near_tie(found: Found) -> bool:
    """Whether some token's experts are told apart by less than what bf16 holds of a logit.

    The router's product is rounded to bf16, in another order of summation here and there: where two
    logits at the edge of the top k round to the same value or swap, other experts are as right.
    """
    given = {k: v for k, v in found.match.inputs.items() if k in ("x", "router", "topk")}
    logits = found.values[given["x"]].double() @ found.values[given["router"]].double().T
    ordered = logits.sort(-1, descending=True).values
    k = given["topk"]
    gap = (ordered[:, k - 1] - ordered[:, k]) / ordered.abs().amax(-1)
    return bool((gap < 2**-7).any())


@each_kind
@each_model
def test_every_site_is_within_its_primitives_tolerance(name: str, kind: str) -> None:
    given = case(kind, params(name), sequences=15)
    found = examine(given.function, given.arguments, TARGET)
    far = [f for f in found if not f.error <= f.tolerance]
    ties = [f for f in far if f.rule.startswith("mixture") and near_tie(f)]
    assert [(f.rule, f.error, f.tolerance) for f in far if f not in ties] == []
    assert len(ties) <= 1  # none or a single one in a step of a few dozen tokens
    assert {"attention", "delta_rule", "short_conv"} <= {f.site for f in found}


@each_kind
@each_model
def test_captured_equals_eager_bit_by_bit(name: str, kind: str) -> None:
    given = case(kind, params(name), sequences=15)
    step = compiled(given)
    mine = there(given.arguments)
    captured = step.capture(*mine)
    before = [leaf.cpu() for leaf in leaves(mine[1])]
    logits, state = captured(*mine)
    want, want_state = step(*there(given.arguments))
    assert torch.equal(logits.cpu(), want.cpu())
    pairs = zip(real_rows(state), real_rows(want_state), strict=True)
    for (path, got), (_, expected) in pairs:
        assert torch.equal(got, expected), path
    assert any(not torch.equal(a, b.cpu()) for a, b in zip(before, leaves(state), strict=True))


@each_kind
@each_model
def test_cost_analysis_predicts_the_captured_nodes(name: str, kind: str) -> None:
    given = case(kind, params(name), sequences=15)
    step = compiled(given)
    tasks = step.capture(*there(given.arguments)).launches()
    assert len(tasks) == step.lowered.cost_analysis()["launches"]
    assert not [task for task in tasks if task.startswith("memcpy")]


@pytest.mark.parametrize("draft", [1, 4, 7])
def test_verify_of_two_to_eight_tokens(draft: int) -> None:
    check(case("verify", params("fused"), draft=draft), "delta_step", TARGET)


def test_prefill_by_the_chunk_call() -> None:
    """Where a probe has found that it is right for strong decay."""
    target = TARGET.with_facts(chunk_strong_decay=True)
    check(case("prefill", params("fused")), "delta_chunks", target)


def check(given: Case, rule: str, target: Target) -> None:
    """Sites within tolerance, captured equal to eager, launches as predicted."""
    found = examine(given.function, given.arguments, target)
    far = [f for f in found if not f.error <= f.tolerance]
    assert [f for f in far if not (f.rule == "mixture" and near_tie(f))] == [] and len(far) <= 1
    assert rule in {f.rule for f in found}
    step = compiled(given, target)
    mine = there(given.arguments)
    captured = step.capture(*mine)
    assert len(captured.launches()) == step.lowered.cost_analysis()["launches"]
    got, _ = captured(*mine)
    want, _ = step(*there(given.arguments))
    assert torch.equal(got.cpu(), want.cpu())


@each_kind
def test_a_step_copies_no_pool_and_reads_nothing_back(kind: str) -> None:
    """Pools of many sequences, a step of 3: a copy of any would stand out of what a step needs."""
    given = case(kind, params("fused"), sequences=1500 if kind == "prefill" else 90)
    step = compiled(given)
    weights, *rest = there(given.arguments)
    step(weights, *copied(rest))  # packs the weights
    pools = [leaf for path, leaf in leaves_with_paths(rest[0]) if "layers" in path]
    torch.npu.reset_peak_memory_stats()
    before, held = bridge.counters(), torch.npu.memory_allocated()
    _, state = step(weights, *rest)
    after, peak = bridge.counters(), torch.npu.max_memory_allocated() - held
    assert after.d2h == before.d2h and after.synchronizations == before.synchronizations
    kept = [leaf for path, leaf in leaves_with_paths(state) if "layers" in path]
    assert [leaf.data_ptr() for leaf in kept] == [leaf.data_ptr() for leaf in pools]
    assert [w for w in step.lowered.writes if w.verdict != "in place"] == []
    assert peak < min(pool.nbytes for pool in pools)


def test_launches_of_the_published_depth() -> None:
    """48 layers of tiny width: 36 delta nets of 17, 12 attentions of 10, 48 mixtures of 11."""
    weights = params("fused", num_hidden_layers=48)
    blocks = 36 * 17 + 12 * 10 + 48 * 11
    for kind, once in (("decode", 15), ("verify", 19)):
        given = case(kind, weights)
        step = compiled(given)
        tasks = step.capture(*there(given.arguments)).launches()
        assert len(tasks) == step.lowered.cost_analysis()["launches"] == blocks + once <= 1299
        count = Counter(tasks)
        assert count["aclnnRecurrentGatedDeltaRule"] == 36
        assert count["aclnnFusedInferAttentionScoreV4"] == 12
        assert count["aclnnGroupedMatmulV5"] == 96


@pytest.mark.parametrize(("package", "delta_net", "once"), [("vllm", 12, 14), ("sgl", 13, 15)])
def test_launches_with_a_package_s_convolution(package: str, delta_net: int, once: int) -> None:
    """One launch for six, where sgl-kernel-npu's wants its input copied before."""
    given = case("decode", params("fused", num_hidden_layers=48))
    target = here().with_facts(custom_conv=package)
    packages.install(package)
    try:
        step = qn.jit(given.function, donate="state").trace(*given.arguments).lower(target)
        captured = step.compile().capture(*there(given.arguments))
        tasks = captured.launches()
    finally:
        packages.remove(package)
    blocks = 36 * delta_net + 12 * 10 + 48 * 11
    assert len(tasks) == step.cost_analysis()["launches"] == blocks + once
    assert package == "sgl" or len(tasks) <= 1119
