"""Plans on paper: from steps lowered on shapes, checked against whole lowerings and by hand."""

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

import qnext as qn
from qnext.errors import InputError
from qnext.functional.config import Config
from qnext.functional.mesh import Mesh
from qnext.planner.assumed import MACHINES, MEASURED_SECONDS, Load
from qnext.planner.costs import Move, fullest, kinds_of, small, step_cost
from qnext.planner.plan import Plan, buffer_bytes, params_of, plan, size, with_prefill
from qnext.planner.search import meshes, ranked
from tests.samples import FUSED

BF16 = torch.bfloat16
A3, A2 = MACHINES["a3"], MACHINES["910b"]
SIZES: dict[str, Any] = FUSED | {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_experts": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "vocab_size": 212,
    "mtp_num_hidden_layers": 1,
}
LOAD = Load(requests=10, prompt=300, output=100)


def config_of(mesh: Mesh | None = None, **changes: Any) -> Config:
    config = qn.Config.from_hf(SIZES | changes).with_precision(compute=BF16, state=BF16)
    return replace(config, mesh=mesh or Mesh())


def published() -> Config:
    config = qn.Config.from_hf({"model_type": "qwen3_next"})
    return config.with_precision(compute=BF16, state=BF16)


MESHES = {
    "one": (Mesh(), {}),
    "held": (Mesh(tp=4), {}),
    "sent": (Mesh(tp=2, dp=2), {}),
    "gathered": (Mesh(tp=2, dp=2), {"hidden_size": 512}),
    "dense layers": (Mesh(tp=2), {"mlp_only_layers": [0, 5]}),
}


QUICK = {("held", False), ("sent", True)}


@pytest.mark.parametrize(
    ("case", "int8"),
    [
        each if each in QUICK else pytest.param(*each, marks=pytest.mark.slow)
        for each in product(MESHES, (False, True))
    ],
)
def test_layers_of_each_kind_stand_for_all(case: str, int8: bool) -> None:
    mesh, changes = MESHES[case]
    config = config_of(mesh, **changes)
    costs = []
    for whole in (False, True):
        few, times = (config, [1] * 12) if whole else small(config)
        _, state, tokens = qn.specs(few, 5, 400)
        traced = qn.jit(qn.decode, donate="state").trace(params_of(few, int8), state, tokens)
        costs.append(step_cost(traced.lower(A3.target), few, times))
    ours, full = costs
    assert (ours.launches, ours.moves) == (full.launches, full.moves)
    assert ours.flops == pytest.approx(full.flops, rel=1e-12)
    assert ours.bytes == pytest.approx(full.bytes, rel=1e-12)
    assert ours.seconds == pytest.approx(full.seconds, rel=1e-9)
    assert bool(ours.moves) == (mesh.ranks > 1)


def test_a_small_config_has_two_layers_of_each_kind() -> None:
    config = config_of(mlp_only_layers=[0, 5])
    few, times = small(config)
    assert sum(times) == 12 and len(times) == 2 * 2 + 2  # dense delta nets, others, attention
    kinds = Counter[tuple[str, bool]]()
    for kind, count in zip(kinds_of(few), times, strict=True):
        kinds[kind] += count
    assert kinds == Counter(kinds_of(config))


@pytest.mark.parametrize(("tokens", "ranks"), [(24, 16), (3, 4), (200, 16), (24, 1)])
def test_the_fullest_rank(tokens: int, ranks: int) -> None:
    """Against draws; experts chosen one by one and not k at a time differ by little."""
    g = torch.Generator().manual_seed(3)
    scores = torch.rand(400, tokens, 512, generator=g)
    chosen = torch.zeros(400, 512).scatter(1, scores.topk(10).indices.flatten(1), 1)
    want = float(chosen.view(400, ranks, -1).sum(2).amax(1).mean())
    assert fullest(tokens, 10, 512, ranks) == pytest.approx(want, rel=0.03)


def test_bytes_of_a_move_and_their_links() -> None:
    machine = replace(A2, link=10e9, network=1e9, collective=5e-6)
    near, far = Move("all_gather", 8, 7e6), Move("all_gather", 16, 15e6)
    assert near.split(machine) == (7e6, 0)
    assert far.split(machine) == pytest.approx((7e6, 8e6))
    assert near.seconds(machine) == pytest.approx(5e-6 + 7e-4)
    assert far.seconds(machine) == pytest.approx(5e-6 + 8e-3)  # the network is the slower


def moves_of(mesh: Mesh, int8: bool = False, rows: int = 5, **changes: Any) -> dict[str, float]:
    few, times = small(config_of(mesh, **changes))
    _, state, tokens = qn.specs(few, rows, 400)
    traced = qn.jit(qn.decode, donate="state").trace(params_of(few, int8), state, tokens)
    cost = step_cost(traced.lower(A3.target), few, times)
    found: Counter[str] = Counter()
    for move, count in cost.moves.items():
        found[move.site] += int(move.bytes * count)
    return dict(found)


def test_what_collectives_move() -> None:
    """By hand: 9 delta nets, 3 attentions, 12 mixtures, the head; 5 tokens."""
    d, heads, attention, vocab = 1024, 8 * 48, 8 * 128, 212  # widths
    assert (SIZES["linear_value_head_dim"], SIZES["head_dim"]) == (48, 128)
    gathered = 5 * 2 * (9 * heads + 3 * attention + vocab) // 2  # the half that others hold
    got = moves_of(Mesh(tp=2))
    assert got == {"all_gather": gathered, "all_reduce": 12 * 5 * 2 * d}
    topk = SIZES["num_experts_per_tok"]
    there = 12 * 5 * topk * 3 / 4  # rows, of which a quarter stays
    got = moves_of(Mesh(dp=4))
    assert got == {"npu_dispatch": there * 2 * d, "npu_combine": there * 2 * d}
    got = moves_of(Mesh(dp=4), int8=True)
    assert got == {"npu_dispatch_quant": there * (d + 4), "npu_combine": there * 2 * d}


@pytest.mark.parametrize("int8", [False, True])
def test_memory_is_that_of_the_whole_trees(int8: bool) -> None:
    mesh = Mesh(tp=2, dp=2)
    load = replace(LOAD, draft=1)
    found = plan(config_of(), int8, mesh, load, A3).memory
    config = config_of(mesh)
    assert found.weights == size(params_of(config, int8))
    states = [size(qn.specs(config, rows, 400, draft=1)[1][6:]) for rows in (5, 6)]
    pages = -(-400 // 128)
    per_row = states[1] - states[0] - 4 - 0  # without the row's length for the module
    assert found.a_request + pages * found.a_page == per_row


def test_room_for_requests() -> None:
    """As many as fit do, and one more a group does not."""
    mesh = Mesh(tp=2, dp=2)
    memory = plan(config_of(), False, mesh, LOAD, A3).memory
    each = memory.a_request + -(-LOAD.length // 128) * memory.a_page
    free = memory.usable - memory.weights - memory.workspace - memory.buffers
    assert memory.requests % 2 == 0
    assert memory.requests // 2 * each <= free < (memory.requests // 2 + 1) * each
    room = memory.tokens // 2 // 128 * memory.a_page + 5 * memory.a_request  # of a group's card
    assert free - memory.a_page < room <= free


def test_what_does_not_fit_comes_last() -> None:
    little, config = replace(A3, usable=0.05), config_of(moe_intermediate_size=640)
    found = [plan(config, False, mesh, LOAD, little) for mesh in (Mesh(), Mesh(tp=4))]
    assert [each.fits for each in found] == [False, True]
    assert [each.mesh for each in ranked(found)] == [Mesh(tp=4), Mesh()]
    assert ranked(found)[1].memory.requests == 0


def test_the_references_point() -> None:
    """16 cards, SGLang's TP16 and DP4, 24 requests: far from what was measured, as docs tell."""
    asked = plan(published(), False, Mesh(tp=4, dp=4), Load(), A3)
    assert (asked.rows, asked.fits) == (6, True)
    assert asked.step.collectives == 3 * 48 + 1  # mixers, there and back, the head
    assert 8e-3 < asked.token < MEASURED_SECONDS / 3
    assert asked.step.network_bytes == 0
    assert asked.memory.weights == pytest.approx(12.2e9, rel=0.01)
    assert asked.step.total == pytest.approx(sum(asked.step.parts.values()))
    first = with_prefill(asked, published(), False, Load(), A3)
    assert first.first is not None and first.prefill is not None
    assert first.first == pytest.approx(3.5 * first.prefill.total)
    assert 0.3 < first.first < 6.363


def test_guesses_make_steps_longer_and_tokens_cheaper() -> None:
    plain = plan(config_of(), False, Mesh(tp=2), LOAD, A3)
    drafted = plan(config_of(), False, Mesh(tp=2), replace(LOAD, draft=1, accepted=0.9), A3)
    assert drafted.tokens_a_step == pytest.approx(1.9)
    assert drafted.step.total > plain.step.total
    assert drafted.token < plain.token


def test_hccl_buffers_by_the_page_s_formula() -> None:
    config, load = replace(published(), mesh=Mesh(tp=4, dp=4)), Load()
    tokens, local = 512, 32  # of a prompt, what one call takes
    row = -(-(4096 + 64) // 512) * 512
    want = 2 * (local * tokens * 16 * row + 11 * tokens * 4096)
    assert buffer_bytes(config, load, A3) == want
    assert buffer_bytes(replace(published(), mesh=Mesh(tp=16)), load, A3) == 0
    want = 512 * 256 * (4096 + 4 * 16 * 4) + 104 * 2**20
    assert buffer_bytes(replace(published(), mesh=Mesh(tp=2, dp=8)), load, A2) == want


def test_meshes_that_heads_allow() -> None:
    found = meshes(published(), False, 48, Load(), A3)
    assert {mesh.tp for mesh in found} == {1, 2, 4, 8, 16}
    assert all(mesh.tp * mesh.dp == 48 for mesh in found)
    assert len(found) == len(set(found))
    assert all(mesh.ep % mesh.tp == 0 for mesh in found)
    assert max(Counter(mesh.tp for mesh in found).values()) == 3


def test_loads_are_checked() -> None:
    with pytest.raises(InputError, match="requests must be an integer >= 1, got 0"):
        Load(requests=0)
    with pytest.raises(InputError, match=r"accepted must lie in 0..1, got 2"):
        Load(accepted=2)


@pytest.mark.slow
def test_plans_of_many_cards_are_reckoned() -> None:
    """The best of a thousand cards, without a lowering for every way of sharing."""
    many = replace(LOAD, requests=4096)
    found = [
        plan(config_of(), True, mesh, many, A3)
        for mesh in meshes(config_of(), True, 1024, many, A3)
    ]
    best: Plan = ranked(found)[0]
    assert best.mesh.ranks == 1024 and best.fits
    assert len(found) <= 3 * 4
