"""Bugs that serving stacks for this model had, at the level of pure functions.

Each docstring names the bug by its number in the inventory of serving stacks that the project keeps
(section 8 of serving_inventory). Most hide where key and value heads are equally wide, as they are
in the published model: `square` below is the one place where two axes of a test have the same size.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional import ops
from qnext.functional.ops import PRIMITIVES
from qnext.functional.state import KV, Delta
from qnext.functional.tree import leaves, leaves_with_paths, map_leaves, rebuild
from tests.samples import relative_rms
from tests.sequences import (
    BATCH,
    HARSH,
    VOCAB,
    Result,
    check_close,
    content,
    model,
    result,
    run,
    started,
    step_by_step,
    turned,
    used,
    words,
)

BF16, F32 = torch.bfloat16, torch.float32
SQUARE = {"linear_key_head_dim": 14}  # as wide as the value heads
DENSE = {"num_experts": 0}  # no choice of experts to turn on a rounding
DRAFT = 2
close = partial(check_close, tolerance=HARSH)
drafts = pytest.mark.parametrize("draft", [0, DRAFT])


@pytest.fixture(scope="module")
def square() -> qn.Params:
    return model(**SQUARE)


# --- layouts and slots of the recurrent state --------------------------------------------------


@drafts
@pytest.mark.parametrize("cut", [1, 9, 33, 64])
def test_2_a_second_chunk_reads_what_the_first_wrote(
    square: qn.Params, cut: int, draft: int
) -> None:
    """Bug 2: states written [dv, dk] and read [dk, dv] by the next chunk of a prefill."""
    state, tokens, lengths = used(square, draft), words(70), [70, 69, 65, 70, 66]
    want = run(square, state, tokens, lengths)
    _, half = qn.forward(square, state, tokens[:, :cut])
    rest = [n - cut for n in lengths]
    got = run(square, half, tokens[:, cut:], rest)
    close(got, Result([w[cut:] for w in want.logits], want.memory))
    other = run(square, turned(half), tokens[:, cut:], rest)  # it would show
    assert relative_rms(other.logits[0], got.logits[0]) > 1e-2


@drafts
@pytest.mark.parametrize("seq", [DRAFT + 1, 16, 70], ids=["draft", "scan", "chunks"])
def test_27_the_last_state_is_that_of_decode(square: qn.Params, seq: int, draft: int) -> None:
    """Bug 27: the final state of a prefill written twice, or turned only with drafts.

    It lies in the row's first slot, the slots of drafts keep every bit, and room for drafts changes
    no bit of the rest.
    """
    state, tokens = used(square, draft), words(seq)
    logits, after = qn.forward(square, state, tokens)
    got = result(square, logits, after, [seq] * BATCH)
    close(got, step_by_step(square, state, tokens))
    spare = [0, *state.slots[:, 1:].flatten().tolist()]
    for part, old in zip(after.layers, state.layers, strict=True):
        if not isinstance(part, KV):
            assert torch.equal(part.recurrent[spare], old.recurrent[spare])
            mine = state.slots[:, 0].long()
            assert (part.recurrent[mine] != old.recurrent[mine]).flatten(1).any(1).all()


def reused(state: qn.State, rows: list[int]) -> qn.State:
    """Some rows given to new sequences: their present state and window are cleared, nothing else.

    Pages, slots of drafts and the rest of the windows' rows keep what the last owner left.
    """
    index = torch.tensor(rows)
    tables = {
        name: getattr(state, name).index_fill(0, index, 0)
        for name in ("lengths", "accepted", "mtp_lengths")
    }

    slots, windows = state.slots[index, 0].long(), state.rows[index].long()

    def cleared(p: KV | Delta) -> KV | Delta:
        if isinstance(p, KV):
            return p
        window = p.window.clone()
        window[windows, :3] = 0  # width - 1 inputs, from the front
        return Delta(p.recurrent.index_fill(0, slots, 0), window)

    return state._replace(**tables, layers=tuple(map(cleared, state.layers)))


@drafts
@pytest.mark.parametrize("poison", [False, True], ids=["left over", "NaN"])
def test_26_a_reused_place_is_as_good_as_a_fresh_one(
    square: qn.Params, draft: int, poison: bool
) -> None:
    """Bug 26: a slot, a window's row and pages come from a sequence that has ended."""
    state = started(square, draft)
    if draft:  # slots permuted, windows that begin late
        _, pending = qn.verify(square, state, words(draft + 1))
        state = qn.commit(pending, torch.tensor([1, 3, 2, 2, 3]))
    if poison:  # what the last owner left was no number
        spoilt = map_leaves(lambda pool: torch.full_like(pool, torch.nan), state.layers)
        state = state._replace(layers=spoilt)
    state = reused(state, [0, 1, 2, 3, 4] if poison else [3, 0, 4])
    fresh = qn.init_state(square.config, BATCH, 290, draft=draft)
    tokens, lengths = words(70, seed=8), [70, 0, 0, 5, 64]
    got, want = run(square, state, tokens, lengths), run(square, fresh, tokens, lengths)
    assert set(state.slots.flatten().tolist()) == set(fresh.slots.flatten().tolist())
    for row in (0, 3, 4):
        mine, other = (Result([r.logits[row]], [r.memory[row]]) for r in (got, want))
        close(mine, other)


def test_3_padded_rows_of_a_bucket_hurt_nobody(square: qn.Params) -> None:
    """Bug 3: five requests verified in a graph of eight; the other rows alias slot 0."""
    eight = qn.init_state(square.config, 8, 290, draft=DRAFT)
    example = (words(DRAFT + 1), torch.ones(BATCH, dtype=torch.int64))
    bucket = qn.Buckets(qn.verify, square, eight, [example], [8])
    state = qn.narrow(eight, BATCH)
    _, state = qn.prefill(square, state, words(30), torch.tensor([30, 2, 17, 9, 1]))
    plain = state

    def spoil(pool: Tensor) -> Tensor:
        return pool.index_fill(0, torch.tensor([0]), torch.nan)

    state = state._replace(layers=map_leaves(spoil, state.layers))
    for lengths, accepted in (
        ([3, 2, 3, 3, 1], [1, 2, 3, 2, 1]),
        ([1, 3, 0, 3, 3], [1, 3, 0, 2, 3]),
        ([3, 2, 3, 1, 2], [2, 1, 3, 1, 1]),
    ):
        tokens = words(DRAFT + 1, seed=sum(accepted))
        counts, accepted = torch.tensor(lengths), torch.tensor(accepted)
        logits, pending = bucket(state, tokens, counts)
        state = qn.commit(pending, accepted)
        want, pending = qn.verify(square, plain, tokens, counts)
        plain = qn.commit(pending, accepted)
        close(result(square, logits, state, lengths), result(square, want, plain, lengths))


# --- speculation -------------------------------------------------------------------------------


def speculated(
    params: qn.Params, state: qn.State, logits: Tensor, text: Tensor
) -> tuple[Tensor, qn.State]:
    """Greedy text by verifying guesses of which about a third are wrong, and some plain steps."""
    new, room = text.shape[1], state.slots.shape[1]
    said = [[int(token)] for token in logits.argmax(-1)]
    number = 0
    while any(len(row) < new for row in said):
        number += 1
        counts = [min(room, new - len(row)) for row in said]
        if number % 3 == 0 and all(counts):
            logits, state = qn.decode(params, state, torch.tensor([row[-1] for row in said]))
            for row, token in zip(said, logits.argmax(-1).tolist(), strict=True):
                row.append(token)
            continue
        tokens = torch.zeros(len(said), room, dtype=torch.int64)
        for i, row in enumerate(said):
            guesses = text[i, len(row) : len(row) + room - 1]
            wrong = (torch.arange(len(guesses)) + i + number) % 3 == 0
            tokens[i, 0] = row[-1]
            tokens[i, 1 : 1 + len(guesses)] = torch.where(wrong, (guesses + 1) % VOCAB, guesses)
        logits, pending = qn.verify(params, state, tokens, torch.tensor(counts))
        best, accepted = logits.argmax(-1), []
        for i, row in enumerate(said):
            right = (tokens[i, 1:] == best[i, :-1]).long().cumprod(0).sum()
            accepted.append(min(1 + int(right), counts[i]) if counts[i] else 0)
            row += best[i, : accepted[i]].tolist()
        state = qn.commit(pending, torch.tensor(accepted))
    return torch.tensor(said), state


@pytest.mark.parametrize("draft", [1, 3, 7])
def test_4_speculation_says_what_decode_says(square: qn.Params, draft: int) -> None:
    """Bug 4: windows widened for drafts begin at their front after a prefill, not at their end."""
    prompt, lengths, new = words(21), torch.tensor([21, 1, 17, 2, 4]), 30
    logits, plain = qn.prefill(square, started(square), prompt, lengths)
    text, gaps = [], []
    for _ in range(new):
        best = logits.topk(2).values
        gaps.append(best[:, 0] - best[:, 1])
        text.append(logits.argmax(-1))
        before, (logits, plain) = plain, qn.decode(square, plain, text[-1])
    assert torch.stack(gaps).min() > 1e-3  # float32 moves logits by some 1e-6: no ties decide
    want = torch.stack(text, dim=1)
    assert min(len(set(row)) for row in want.tolist()) > 8  # no row repeats itself
    logits, state = qn.prefill(square, started(square, draft), prompt, lengths)
    got, state = speculated(square, state, logits, want)
    assert torch.equal(got, want)
    for row in range(BATCH):  # the last token is said, not consumed
        mine, other = content(square, state, row), content(square, before, row)
        close(Result([], [mine]), Result([], [other]))


# --- dtypes ------------------------------------------------------------------------------------

CALLS: dict[str, Any] = {
    "decode": lambda p, s: qn.decode(p, s, words(1)[:, 0]),
    "verify": lambda p, s: qn.verify(p, s, words(DRAFT + 1)),
    "scan": lambda p, s: qn.forward(p, s, words(9), torch.tensor([9, 1, 0, 4, 7])),
    "chunks": lambda p, s: qn.forward(p, s, words(70), torch.tensor([70, 1, 0, 64, 65])),
}
calls = pytest.mark.parametrize("call", CALLS)


@calls
def test_5_a_float32_state_is_read_as_float32(call: str) -> None:
    """Bug 5: a pool of float32 states under a kernel for bfloat16, and text that repeats itself.

    From states that both dtypes can hold, both give the same bits; what is kept differs by the one
    rounding of the store, and no leaf changes its dtype.
    """
    wide, narrow = model(BF16, F32, **SQUARE), model(BF16, BF16, **SQUARE)
    states = [used(params, DRAFT) for params in (wide, narrow)]
    (want, kept), (got, rounded) = (
        CALLS[call](p, s) for p, s in zip((wide, narrow), states, strict=True)
    )
    assert torch.equal(got, want) and want.isfinite().all()
    pairs = zip(leaves_with_paths(kept), leaves_with_paths(rounded), strict=True)
    for (path, mine), (_, other) in pairs:
        recurrent = path.endswith("recurrent")
        assert (mine.dtype == F32) == (
            recurrent or "layers" not in path
        ) or not mine.is_floating_point()
        assert torch.equal(mine.to(other.dtype), other), path
        assert not recurrent or other.dtype == BF16
    kept = kept._replace(accepted=torch.zeros_like(kept.accepted))  # a verification: nothing taken
    blunt = map_leaves(lambda leaf: leaf.to(BF16).to(leaf.dtype), kept)
    sharp, same = (CALLS["decode"](wide, s)[1].layers[0].recurrent for s in (kept, blunt))
    assert not torch.equal(sharp, same)  # what bfloat16 cannot hold is read as well


@calls
def test_10_a_state_of_another_dtype_than_x(call: str) -> None:
    """Bug 10: windows, keys and values in a dtype that activations have not, at read and at write.

    float32 pools under bfloat16 activations hold what bfloat16 pools hold, to the bit.
    """
    params = model(BF16, F32)
    states = [used(params, DRAFT, dtype) for dtype in (BF16, F32)]
    (want, narrow), (got, wide) = (CALLS[call](params, state) for state in states)
    assert torch.equal(got, want)
    pairs = zip(leaves_with_paths(wide), leaves_with_paths(narrow), strict=True)
    for (path, mine), (_, other) in pairs:
        assert torch.equal(mine, other.to(mine.dtype)), path
        if "layers" in path:
            assert mine.dtype == F32 and (other.dtype == BF16) != path.endswith("recurrent")


@calls
def test_10_bfloat16_pools_under_float32(call: str) -> None:
    """Bug 10, the other way: what is kept is what float32 pools keep, rounded once."""
    params = model(F32, F32)
    (want, wide), (got, narrow) = (
        CALLS[call](params, used(params, DRAFT, dtype)) for dtype in (F32, BF16)
    )
    # this call's own keys and values are read back from the pool: a rounding each
    assert relative_rms(got, want) < PRIMITIVES["attention"].tolerance[BF16].relative_rms
    assert got.dtype == F32
    first = [narrow.layers[0].window, wide.layers[0].window]  # before any attention
    assert first[0].dtype == BF16 and torch.equal(first[0], first[1].to(BF16))
    assert all(leaf.isfinite().all() for leaf in leaves(narrow.layers))


# --- decay and rounding ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("seq", [40, 150])
def test_23_strong_decay_in_chunks(seq: int, dtype: torch.dtype) -> None:
    """Bug 23: the fused prefill wants -1 <= g <= 0; this model's g goes to -10 and far beyond."""
    hk, hv, dk, dv = 3, 6, 14, 11
    key = torch.randn(2, seq, hk, dk)
    given = {
        "query": torch.randn(2, seq, hk, dk).to(dtype),
        "key": (key / key.norm(dim=-1, keepdim=True)).to(dtype),
        "value": torch.randn(2, seq, hv, dv).to(dtype),
        "g": (-30 * torch.rand(2, seq, hv)).where(torch.rand(2, seq, hv) < 0.6, -0.01),
        "beta": torch.rand(2, seq, hv).to(dtype),
        "scale": dk**-0.5,
    }
    pool, slots = torch.randn(5, hv, dv, dk), torch.tensor([[4], [2]])
    assert given["g"].min() < -29.5 and (given["g"] > -0.1).any()
    out, after = ops.delta_rule(**given, state=pool, slots=slots)
    steps = []
    for t in range(seq):
        one = {k: v[:, t : t + 1] if isinstance(v, Tensor) else v for k, v in given.items()}
        o, pool = ops.delta_rule(**one, state=pool, slots=slots)
        steps.append(o)
    # both compute in float32 and round once
    tolerance = PRIMITIVES["delta_rule"].tolerance
    assert relative_rms(out, torch.cat(steps, dim=1)) < tolerance[dtype].relative_rms
    assert relative_rms(after[slots], pool[slots]) < tolerance[F32].relative_rms
    assert torch.equal(after[[0, 1, 3]], pool[[0, 1, 3]])


def test_23_strong_decay_in_the_model(square: qn.Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same through all layers: prefill against decode, with the gates looked at."""
    seen = []
    gates = ops.delta_gates

    def spied(**arguments: Any) -> tuple[Tensor, Tensor]:
        g, beta = gates(**arguments)
        seen.append(g)
        return g, beta

    monkeypatch.setattr(ops, "delta_gates", spied)
    strong = rebuild(
        square,
        [
            leaf + torch.linspace(-6, 4, leaf.shape[0]) if path.endswith("dt_bias") else leaf
            for path, leaf in leaves_with_paths(square)
        ],
    )
    state, tokens = used(strong), words(70)
    want = step_by_step(strong, state, tokens)
    g = torch.cat([x.flatten() for x in seen])
    assert g.min() < -25 and (g < -10).float().mean() > 0.05 and (g > -0.1).float().mean() > 0.1
    check_close(run(strong, state, tokens, [70] * BATCH), want, HARSH)


BUDGET = 2.5e-2  # four layers of bfloat16 roundings
# sums in another order; and roundings of the state, once a call, that fall one way or the other
SPREAD = {F32: 1.1, BF16: 1.4}


def typical_error(got: Tensor, want: Tensor) -> float:
    """The median over tokens: a norm of nearly nothing blows up the roundings of some."""
    off, size = ((x.double().square().mean(-1)) for x in (got - want, want))
    return float((off / size).sqrt().median())


@pytest.mark.parametrize("state", SPREAD, ids=["float32 state", "bfloat16 state"])
def test_24_one_budget_for_decode_verify_and_prefill(state: torch.dtype) -> None:
    """Bug 24: beta rounded to bfloat16 in prefill and verify, float32 in decode.

    The same twelve tokens three ways, against float32 with the same weights.
    """
    params = model(BF16, state, **DENSE)
    exact = rebuild(model(F32, F32, **DENSE), [leaf.float() for leaf in leaves(params)])
    tokens, start = words(12), used(params, DRAFT)
    want, _ = qn.forward(exact, used(exact, DRAFT), tokens)
    ways = {"prefill": qn.forward(params, start, tokens)[0]}
    ways["decode"] = torch.stack(step_by_step(params, start, tokens).logits)
    parts, now = [], start
    for piece in tokens.split(DRAFT + 1, dim=1):
        logits, pending = qn.verify(params, now, piece)
        now = qn.commit(pending, torch.full((BATCH,), DRAFT + 1))
        parts.append(logits)
    ways["verify"] = torch.cat(parts, dim=1)
    errors = {way: typical_error(logits, want) for way, logits in ways.items()}
    assert max(errors.values()) < min(BUDGET, SPREAD[state] * min(errors.values()))


def test_24_the_same_dtypes_reach_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the delta rule is given has the same dtypes in each of the three."""
    params = model(BF16, F32)
    state = qn.init_state(params.config, BATCH, 200, draft=DRAFT)
    given: list[dict[str, torch.dtype]] = []

    def spied(**arguments: Any) -> Any:
        tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
        given.append({k: v.dtype for k, v in tensors.items()})
        return PRIMITIVES["delta_rule"].op(**arguments)

    monkeypatch.setattr(ops, "delta_rule", spied)
    qn.decode(params, state, words(1)[:, 0])
    qn.verify(params, state, words(DRAFT + 1))
    qn.prefill(params, state, words(30))
    assert len(given) == 3 * 3 and all(dtypes == given[0] for dtypes in given)
    assert given[0]["beta"] == BF16 and given[0]["g"] == given[0]["state"] == F32
