"""Compiled steps of a rank: what the functions make, and a collective for each block."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.ops import PRIMITIVES
from qnext.lowering.calls import CALLS
from qnext.lowering.stages import Lowered
from tests.parallel.models import Mixed, joined, whole_params
from tests.parallel.ranks import Ranks
from tests.samples import FUSED, relative_rms
from tests.sequences import used, words


def lowered(params: qn.Params, state: qn.State, target: str, seq: int) -> Lowered:
    function, tokens = (qn.decode, words(1)[:, 0]) if seq == 1 else (qn.verify, words(seq))
    return qn.jit(function).trace(params, state, tokens).lower(target, strict=target == "cpu")


def collectives(step: Lowered) -> dict[str, Counter[str]]:
    """Of each part of the model the collectives that its sites are."""
    found: dict[str, Counter[str]] = {}
    known = PRIMITIVES | CALLS
    for site in step.cost_analysis()["by_site"]:
        if site["site"] in known and known[site["site"]].collective:
            found.setdefault(site["part"], Counter())[site["site"]] += 1
    return found


def compared(mixed: Mixed, target: str, seq: int) -> list[tuple[Tensor, Tensor]]:
    """Logits of two steps of a rank, compiled and not."""
    part = qn.shard(whole_params(mixed), joined(*mixed[:4]))
    state = used(part, draft=seq)
    compiled, ours, pairs = lowered(part, state, target, seq).compile(), state, []
    with torch.no_grad():
        for seed in (1, 2):
            tokens = words(seq, seed=seed)
            tokens = tokens[:, 0] if seq == 1 else tokens
            function = qn.decode if seq == 1 else qn.verify
            want, state = function(part, state, tokens)
            got, ours = compiled(part, ours, tokens)
            if seq > 1:
                state, ours = (qn.commit(s, torch.full((5,), 2)) for s in (state, ours))
            pairs.append((got, want))
    return pairs


SHARED = {"tp4": Mixed(tp=4), "dp4": Mixed(dp=4), "tp2 dp2": Mixed(tp=2, dp=2)}
STEPS = list(product(SHARED, (False, True), ("reference", "cpu"), (1, 3)))
QUICK = {("tp2 dp2", True, "cpu", 1)}


@pytest.mark.parametrize(
    ("mesh", "int8", "target", "seq"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in STEPS],
)
def test_steps_of_ranks(ranks: Ranks, mesh: str, int8: bool, target: str, seq: int) -> None:
    limit = 5e-3 if int8 else 1e-5  # a number that is rounded to int8 may turn over
    for pairs in ranks.run(compared, SHARED[mesh]._replace(int8=int8), target, seq):
        for got, want in pairs:
            assert relative_rms(got, want) < limit


LOWERED = list(product((False, True), ("reference", "cpu", "npu:910b"), (1, 3)))
FEW = {(False, "npu:910b", 1)}


@pytest.mark.parametrize(
    ("int8", "target", "seq"),
    [case if case in FEW else pytest.param(*case, marks=pytest.mark.slow) for case in LOWERED],
)
def test_one_collective_a_block(int8: bool, target: str, seq: int) -> None:
    """Two where tokens travel to their experts."""
    mixed = Mixed(int8=int8, dtype=torch.bfloat16, changes=(("mlp_only_layers", (1,)),))
    whole = whole_params(mixed)
    layers = {f".layers[{i}]": Counter({"all_gather": 1, "all_reduce": 1}) for i in range(4)}
    layers[".layers[1]"] = Counter({"all_gather": 2})  # a dense layer gathers its inner vector
    npu = target.startswith("npu")  # fewer ranks than the fused calls want, see the next test
    there = {"all_gather": 1, "reduce_scatter": 1} if npu else {"dispatch": 1, "combine": 1}
    travel = {f".layers[{i}]": Counter(there) for i in (0, 2, 3)}
    both = {part: Counter(all_gather=1) + travel.get(part, Counter()) for part in layers}
    both[".layers[1]"] = Counter(all_gather=2)
    head = {".head[0]": Counter({"all_gather": 1})}
    for mesh, want in (
        (qn.Mesh(tp=4, rank=1), layers | head),
        (qn.Mesh(tp=4, ep=1), {p: c - Counter(all_reduce=1) for p, c in layers.items()} | head),
        (qn.Mesh(dp=4), travel),
        (qn.Mesh(tp=2, dp=2), both | head),
        (qn.Mesh(), {}),
    ):
        part = qn.shard(whole, mesh)
        step = lowered(part, used(part, draft=seq), target, seq)
        assert collectives(step) == want


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("target", "dp"), [("npu:a3", 2), ("npu:910b", 16)])
def test_fused_calls_take_the_place_of_collectives(target: str, dp: int, int8: bool) -> None:
    """Two a block, and nothing on its reference. A long prompt is shared out among the ranks of a
    group, and gathered; a call takes runs of it."""
    sizes = {"hidden_size": 1024, "num_experts": 96, "vocab_size": 212, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 2, "linear_num_key_heads": 4, "linear_num_value_heads": 8}
    config = qn.Config.from_hf(FUSED | sizes)
    config = config.with_precision(compute=torch.bfloat16, state=torch.bfloat16)
    config = replace(config, mesh=qn.Mesh(tp=2, dp=dp, rank=1))
    for function, seq, runs in ((qn.decode, None, 1), (qn.verify, 3, 1), (qn.prefill, 600, 0)):
        params, *rest = qn.specs(config, 3, 640, seq=seq, draft=3)
        params = qn.quantize(params) if int8 else params
        step = qn.jit(function, donate="state").trace(params, *rest).lower(target)
        many = not runs
        runs = runs or -(-3 * 600 // 2 // (512 if target == "npu:a3" else 256))
        found = {part: dict(counts) for part, counts in collectives(step).items()}
        block = {"all_gather": 1 + many, "npu_dispatch_quant" if int8 else "npu_dispatch": runs}
        assert found.pop(".head[0]") == {"all_gather": 1}
        assert found == {f".layers[{i}]": block | {"npu_combine": runs} for i in range(4)}
        left = {v.site for v in step.verdicts.values() if v.rule is None} & PRIMITIVES.keys()
        assert not left
