"""Ranks with a device each: steps of a shared model, captured, with HCCL's collectives in them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.lowering.npu import dispatch_calls as travel
from qnext.lowering.softnpu import bridge
from qnext.runtime.engine import Engine
from qnext.runtime.ranks import Channel, SharedSteps, follow
from tests.npu.models import BF16, here, params
from tests.npu.test_npu_engine import OPTIONS, requests, serve
from tests.parallel.ranks import Ranks
from tests.samples import relative_rms

WORLD = 4
BATCH, CAPACITY = 3, 300
# widths that the fused calls of both chips take, experts that four ranks can share evenly
SHARED: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_experts": 8,
    "num_experts_per_tok": 8,  # all: no choice turns over by a rounding
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 212,
}
BUDGET = 2e-2  # roundings of bfloat16, in another order where products have another shape


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    made = Ranks(tmp_path_factory.mktemp("ranks") / "store", WORLD, "hccl")
    yield made
    made.close()


@cache
def whole(int8: bool) -> qn.Params:
    made = params("fused", BF16, **SHARED)
    return qn.quantize(made) if int8 else made


@cache
def joined(tp: int, dp: int) -> qn.Mesh:
    return qn.join(tp, dp, backend="hccl")


def steps(given: qn.Params, captured: bool, seed: int) -> tuple[list[Tensor], Counter[str], int]:
    """Logits of two decode steps on this process's device, the tasks of one, and its launches."""
    state = qn.init_state(given.config, BATCH, CAPACITY)
    tokens = torch.randint(200, (2, BATCH), generator=torch.Generator().manual_seed(seed))
    traced = qn.jit(qn.decode, donate="state").trace(given, state, tokens[0])
    ready = traced.lower(here(), strict=True).compile()
    launches = ready.lowered.cost_analysis()["launches"]
    mine = qn.place((given, state, tokens[0]), "npu")
    graph = ready.capture(*mine) if captured else ready
    tasks = Counter(graph.launches()) if captured else Counter()
    found, state = [], mine[1]
    for step in tokens:
        logits, state = graph(mine[0], state, step.npu())
        found.append(logits.cpu())
    return found, tasks, launches


def on_ranks(tp: int, dp: int, int8: bool) -> tuple[Any, ...]:
    """A rank's steps, each group with tokens of its own, beside those of the whole model."""
    mesh = joined(tp, dp)
    seed = 1 + mesh.index("dp")
    found, tasks, launches = steps(qn.shard(whole(int8), mesh), True, seed)
    want, _, _ = steps(whole(int8), False, seed)
    return found, want, tasks, launches


FUSED = {"MoeDistributeDispatchV4", "MoeDistributeCombineV4"}


def moves(tasks: Counter[str]) -> dict[str, int]:
    """The collectives among the tasks of a captured step."""
    kept = {name.removeprefix("aclnn"): count for name, count in tasks.items()}
    return {n: count for n, count in kept.items() if n.startswith("Hccl") or n in FUSED}


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("tp", "dp"), [(4, 1), (2, 2), (1, 4)])
def test_a_shared_step(ranks: Ranks, tp: int, dp: int, int8: bool) -> None:
    """A collective a block, and the head's: what one device computes, on four."""
    fused = here().facts.dispatch == "direct"  # the other chip's call wants sixteen ranks
    blocks = {"HcclAllGather": 3} if tp > 1 else {}
    if dp == 1:
        want = blocks | {"HcclAllReduce": 2}
    elif fused:
        want = blocks | dict.fromkeys(FUSED, 2)
    else:
        want = {"HcclAllGather": blocks.get("HcclAllGather", 0) + 2, "HcclReduceScatter": 2}
    for found, expected, tasks, launches in ranks.run(on_ranks, tp, dp, int8):
        assert moves(tasks) == want
        assert tasks.total() == launches
        for got, right in zip(found, expected, strict=True):
            assert relative_rms(got, right) < BUDGET


TOKENS, WIDTH, EXPERTS, CHOSEN = 5, 1024, 8, 3


def drawn(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's tokens, the experts that each chooses, and their weights."""
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, WIDTH, generator=g).to(BF16)
    expert = torch.rand(TOKENS, EXPERTS, generator=g).argsort(-1)[:, :CHOSEN]
    return x, expert.int(), torch.rand(TOKENS, CHOSEN, generator=g)


def travelled(int8: bool) -> tuple[Tensor, Tensor, int]:
    """(the sum that comes back, what it should be, rows that came): experts multiply by 1 to 8."""
    bridge.CAPABILITIES["few_relays"] = True
    mesh = joined(1, WORLD)
    given = drawn(mesh.rank)
    where = {"group": mesh.group("ep"), "size": WORLD, "rank": mesh.rank, "experts": EXPERTS}
    where |= {"relayed": here().facts.dispatch == "relayed"}
    x, expert, weight = qn.place(given, "npu")
    names = {"x": x, "expert": expert, "weight": weight, **where}
    if int8:
        q, scale, counts, *notes = travel.npu_dispatch_quant(**names)
        rows = q.cpu().float() * scale.cpu()[:, None]
    else:
        rows, counts, *notes = travel.npu_dispatch(**names)
        rows = rows.cpu().float()
    own = torch.arange(EXPERTS // WORLD) + mesh.rank * (EXPERTS // WORLD) + 1
    factor = own.repeat_interleave(counts.cpu())
    made = torch.full_like(rows, torch.nan)  # what did not come is not to be read
    made[: len(factor)] = rows[: len(factor)] * factor[:, None]
    info, received, scales = notes
    total = travel.npu_combine(
        rows=made.to(BF16).npu(),
        expert=expert,
        weight=weight,
        info=info,
        received=received,
        scales=scales,
        **where,
    )
    x, expert, weight = given
    want = x.float() * (weight * (expert + 1)).sum(1, keepdim=True)
    return total.cpu(), want, len(factor)


@pytest.mark.parametrize("int8", [False, True])
def test_tokens_travel_to_chosen_experts_and_back(ranks: Ranks, int8: bool) -> None:
    found = ranks.run(travelled, int8)
    came = [rows for _, _, rows in found]
    assert sum(came) == WORLD * TOKENS * CHOSEN and len(set(came)) > 1
    for got, want, _ in found:
        assert relative_rms(got, want) < (1e-2 if int8 else 4e-3)  # a rounding to int8, to bfloat16


WHOLE = ("delta_heads",)  # of the demo, which has three


def answers() -> Any:
    """What two ranks answer, and what one device does; None at the rank that follows."""
    mesh = qn.join(2, 1, 1, whole=WHOLE, backend="hccl")
    channel, weights = Channel(mesh), params("demo")
    options = replace(OPTIONS, target=here(), draft=1)
    part = qn.shard(weights, mesh)
    if mesh.rank:
        follow(channel, part, options)
        return None
    told = []
    shared = SharedSteps(channel, part, options.target, options.strict, **options.buckets)
    for steps, given in ((shared, part), (None, weights)):
        served = Engine(given, qn.tokenizer(), options, steps)
        outputs = serve(served, requests(5)) + serve(served, requests(2))  # these are cached
        told.append([(output.tokens, output.finish, output.error) for output in outputs])
        told.append((served.fallbacks, served.options.overlaps))
        assert served.stats.preempted or served.stats.cache_hits  # values went out and came in
        served.close()
    return told


def test_an_engine_of_two_ranks(ranks: Ranks) -> None:
    """Captured steps on both devices, with guesses; values leave and enter the pools by HCCL."""
    for found in ranks.run(answers):
        if found is not None:
            ours, figures, alone, _ = found
            assert ours == alone and all(error is None for *_, error in ours)
            assert figures == (0, True)
