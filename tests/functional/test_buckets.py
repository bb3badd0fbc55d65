"""Rows on scratch beside real ones, buckets of batch sizes, and decoding in one pure function."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.state import KV
from qnext.functional.tree import leaves, leaves_with_paths, map_leaves
from tests.samples import relative_rms
from tests.sequences import (
    BATCH,
    HARSH,
    Result,
    check_close,
    check_memory,
    check_same,
    content,
    result,
    started,
    words,
)

WIDE, DRAFT, NEW = 9, 2, 8  # no axis of the model has one of these sizes, nor BATCH + 1
close = partial(check_close, tolerance=HARSH)


@pytest.fixture(scope="module")
def params(checkpoints: Any) -> qn.Params:
    return checkpoints("base")[2]


@pytest.fixture(scope="module")
def dense(checkpoints: Any) -> qn.Params:
    """Without experts, the products of a call have the same shapes whatever its rows hold."""
    return checkpoints("all_dense")[2]


# --- rows on scratch ---------------------------------------------------------------------------


def fill_scratch(state: qn.State, value: float) -> qn.State:
    def fill(pool: Tensor) -> Tensor:
        return pool.index_fill(0, torch.tensor([0]), value)

    return state._replace(layers=map_leaves(fill, state.layers))


def check_pools(state: qn.State, before: qn.State, rows: Sequence[int]) -> None:
    """Nothing but scratch, and what belongs to these rows, differs from before."""
    live = [
        {0, *table[list(rows)].flatten().tolist()}
        for table in (before.block_table, before.slots, before.rows)
    ]
    for part, old in zip(state.layers, before.layers, strict=True):
        tables = [live[0]] * 2 if isinstance(part, KV) else live[1:]
        for pool, was, mine in zip(part, old, tables, strict=True):
            others = [at for at in range(pool.shape[0]) if at not in mine]
            assert torch.equal(pool[others], was[others])
            assert pool.shape == was.shape and len(others) < pool.shape[0] - 1


CALLS: dict[str, Any] = {
    "decode": lambda p, s, t: qn.decode(p, s, t[:, 0]),
    "prefill": lambda p, s, t: qn.prefill(p, s, t),
    "forward": lambda p, s, t: qn.forward(p, s, t),
    "verify": lambda p, s, t: _committed(*qn.verify(p, s, t[:, : DRAFT + 1])),
}


def _committed(logits: Tensor, pending: qn.State) -> tuple[Tensor, qn.State]:
    counts = torch.arange(pending.batch) % (DRAFT + 1) + 1
    return logits, qn.commit(pending, counts)


def rows_of(params: qn.Params, logits: Tensor, state: qn.State) -> Result:
    """Logits and memory of the first BATCH rows."""
    return result(params, logits[:BATCH, None], state, [1] * BATCH)


@pytest.mark.parametrize("seq", [4, 30], ids=["scan", "chunks"])
@pytest.mark.parametrize("call", CALLS)
def test_wide_rows_are_the_rows(params: qn.Params, call: str, seq: int) -> None:
    """A batch widened to a bucket gives what it gives alone, and touches nothing but scratch."""
    state, tokens = started(params, DRAFT), words(seq, batch=WIDE)
    wide = qn.widen(state, WIDE)
    assert all(a is b for a, b in zip(leaves(wide.layers), leaves(state.layers), strict=True))
    logits, after = CALLS[call](params, wide, tokens)
    want, alone = CALLS[call](params, state, tokens[:BATCH])
    close(rows_of(params, logits, after), rows_of(params, want, alone))
    check_pools(after, state, range(BATCH))
    back = qn.narrow(after, BATCH)
    assert [path for path, leaf in leaves_with_paths(back) if leaf.shape[:1] == (WIDE,)] == []
    for name in ("lengths", "capacity", "block_table", "slots", "rows", "accepted", "mtp_lengths"):
        assert torch.equal(getattr(back, name), getattr(alone, name))


@pytest.mark.parametrize("seq", [4, 30], ids=["scan", "chunks"])
@pytest.mark.parametrize("call", CALLS)
def test_what_is_on_scratch_reaches_nobody(dense: qn.Params, call: str, seq: int) -> None:
    """NaN there, or other tokens in its rows: real rows have the same bits."""
    wide, tokens = qn.widen(started(dense, DRAFT), WIDE), words(seq, batch=WIDE)
    want = rows_of(dense, *CALLS[call](dense, wide, tokens))
    others = tokens.clone()
    others[BATCH:] = words(seq, batch=WIDE - BATCH, seed=9)
    poisoned = fill_scratch(wide, torch.nan)
    check_same(rows_of(dense, *CALLS[call](dense, wide, others)), want)
    logits, after = CALLS[call](dense, poisoned, tokens)
    check_same(rows_of(dense, logits, after), want)
    assert logits[BATCH:].isnan().all()  # it was read, where it may be


@pytest.mark.parametrize("call", CALLS)
def test_experts_do_not_mix_rows(params: qn.Params, call: str) -> None:
    """Poison goes to experts beside real tokens; no bits, as their products have other shapes."""
    wide, tokens = qn.widen(started(params, DRAFT), WIDE), words(4, batch=WIDE)
    want = rows_of(params, *CALLS[call](params, wide, tokens))
    close(rows_of(params, *CALLS[call](params, fill_scratch(wide, torch.nan), tokens)), want)


def test_a_batch_of_the_same_size_is_itself(params: qn.Params) -> None:
    state = started(params)
    assert qn.widen(state, BATCH) is state
    again = qn.narrow(qn.widen(state, WIDE), BATCH)
    assert all(map(torch.equal, leaves(again), leaves(state)))
    with pytest.raises(qn.InputError, match="the state has 5 rows, they do not fit 4"):
        qn.widen(state, 4)


def test_narrow_takes_the_first_rows(params: qn.Params) -> None:
    """The others' memory stays where it is, for whoever has their tables."""
    state, tokens = started(params), words(6)
    few = qn.narrow(state, 3)
    want, _ = qn.forward(params, qn.select(state, [0, 1, 2]), tokens[:3])
    got, after = qn.forward(params, few, tokens[:3])
    assert torch.equal(got, want)
    joined = state._replace(layers=after.layers)
    for row in (3, 4):
        check_memory(content(params, joined, row), content(params, state, row))


# --- buckets -----------------------------------------------------------------------------------


def owner(params: qn.Params) -> qn.State:
    """Six rows, the most of the buckets below, on pools that all of them work on."""
    return qn.select(started(params), [3, 0, 1, 2, 4, 1])


@pytest.fixture(scope="module")
def buckets(params: qn.Params) -> qn.Buckets:
    examples = [(words(1)[:, 0],)]
    return qn.Buckets(qn.decode, params, owner(params), examples, batches=[4, 1, 2, 6, 2])


@pytest.mark.parametrize("rows", range(1, BATCH + 2))
def test_every_number_of_rows(params: qn.Params, buckets: qn.Buckets, rows: int) -> None:
    """Each runs in the smallest bucket that holds it, and gives what the function gives."""
    assert buckets.batches == [1, 2, 4, 6]
    state, plain = (qn.narrow(owner(params), rows) for _ in range(2))
    tokens = words(3, batch=rows)
    for token in tokens.unbind(1):
        logits, state = buckets(state, token)
        want, plain = qn.decode(params, plain, token)
        assert logits.shape == want.shape and state.batch == rows
        got = result(params, logits[:, None], state, [1] * rows)
        close(got, result(params, want[:, None], plain, [1] * rows))


def test_a_bucket_is_bit_equal_to_the_widened_function(
    params: qn.Params, buckets: qn.Buckets
) -> None:
    state, tokens = qn.narrow(owner(params), BATCH), words(1)[:, 0]
    logits, after = buckets(state, tokens)
    wide = qn.widen(qn.narrow(owner(params), BATCH), 6)
    want, wide = qn.decode(params, wide, torch.nn.functional.pad(tokens, (0, 1)))
    assert torch.equal(logits, want[:BATCH])
    assert all(map(torch.equal, leaves(after), leaves(qn.narrow(wide, BATCH))))
    with pytest.raises(qn.DonatedError, match="donated to decode"):
        buckets(state, tokens)


def test_a_bucket_for_each_form(params: qn.Params) -> None:
    """Verifying three tokens or two, each with its own lengths; the state is used up."""
    examples = [(words(seq), torch.ones(BATCH, dtype=torch.int64)) for seq in (2, DRAFT + 1)]
    verify = qn.Buckets(qn.verify, params, started(params, DRAFT), examples, batches=[3, 6])
    state, plain = started(params, DRAFT), started(params, DRAFT)
    for seq, lengths in ((3, [3, 2, 0, 3, 1]), (2, [2, 1, 2, 0, 2])):
        counts = torch.tensor(lengths)
        logits, pending = verify(state, words(seq), counts)
        state = qn.commit(pending, counts)
        want, pending = qn.verify(params, plain, words(seq), counts)
        plain = qn.commit(pending, counts)
        close(result(params, logits, state, lengths), result(params, want, plain, lengths))
    with pytest.raises(qn.LoweringError, match=r"no bucket takes rows of shapes \[\[4\], \[\]\]"):
        verify(state, words(4), counts)


def test_what_fits_no_bucket_is_told(params: qn.Params, buckets: qn.Buckets) -> None:
    state, tokens = qn.select(started(params), [0, 1, 2, 3, 4, 0, 1]), words(1, batch=7)[:, 0]
    with pytest.raises(qn.LoweringError, match="7 rows fit no bucket of 1, 2, 4, 6: make one of 7"):
        buckets(state, tokens)
    says = r"no bucket takes rows of shapes \[\[1\]\]: those made take \[\[\]\]"
    with pytest.raises(qn.LoweringError, match=says):
        buckets(qn.narrow(state, 2), tokens[:2, None])
    for batches in ([], [0, 3], [-1]):
        with pytest.raises(qn.LoweringError, match="batches must list sizes >= 1, got"):
            qn.Buckets(qn.decode, params, state, [(tokens,)], batches)
    with pytest.raises(qn.TargetError, match="unknown target 'npu:9'"):
        qn.Buckets(qn.decode, params, state, [(tokens,)], [2], target="npu:9")


# --- one iteration as one function -------------------------------------------------------------

PLAIN = [qn.Sampling(temperature=0.0)] * BATCH
HOT = [
    qn.Sampling(temperature=0.0, seed=5),
    qn.Sampling(temperature=1.0, seed=17),
    qn.Sampling(temperature=0.6, seed=2**62),
    qn.Sampling(temperature=2.5, seed=-3),
    qn.Sampling(temperature=1e3, seed=17),
]
FILTERED = [
    qn.Sampling(temperature=1.5, top_k=4, seed=3),
    qn.Sampling(temperature=1.0, seed=17),
    qn.Sampling(temperature=0.9, top_p=0.7, seed=8),
    qn.Sampling(temperature=2.0, min_p=0.2, seed=9),
    qn.Sampling(temperature=0.0, top_k=2, seed=10),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("each", "settings", "filters"),
    [(PLAIN, None, False), (PLAIN, PLAIN, False), (HOT, HOT, False), (FILTERED, FILTERED, True)],
    ids=["greedy", "temperature 0", "temperature", "filters"],
)
def test_advance_goes_round_as_generate_does(
    params: qn.Params,
    each: list[qn.Sampling],
    settings: list[qn.Sampling] | None,
    filters: bool,
    compiled: bool,
) -> None:
    state, prompt, lengths = started(params), words(7), torch.tensor([7, 1, 3, 6, 2])
    want, last = qn.generate(params, state, prompt, NEW, lengths, each)
    chosen = None if settings is None else qn.knobs(settings)
    advance = qn.jit(qn.advance) if compiled else qn.advance
    logits, state = qn.prefill(params, state, prompt, lengths)
    tokens = qn.sample(logits, each, state.lengths)
    text = [tokens]
    for _ in range(NEW):
        drawn = qn.sample(*_logits(params, state, tokens, each))
        tokens, state = advance(params, state, tokens, chosen, filters)
        assert torch.equal(tokens, drawn) and tokens.dtype == torch.int64
        text.append(tokens)
    assert torch.equal(torch.stack(text[:NEW], dim=1), want)
    assert all(map(torch.equal, leaves(state), leaves(last)))


def _logits(
    params: qn.Params, state: qn.State, tokens: Tensor, each: list[qn.Sampling]
) -> tuple[Tensor, list[qn.Sampling], Tensor]:
    logits, state = qn.decode(params, state, tokens)
    return logits, each, state.lengths


def test_filters_decide(params: qn.Params) -> None:
    """The texts above would differ without them, and without their seeds."""
    state, tokens = started(params), words(1)[:, 0]
    drawn = set()
    for each, filters in ((PLAIN, False), (HOT, False), (FILTERED, True), (FILTERED, False)):
        now, at = tokens, state
        text = []
        for _ in range(NEW):
            now, at = qn.advance(params, at, now, qn.knobs(each), filters)
            text.append(now)
        drawn.add(tuple(torch.stack(text).flatten().tolist()))
    assert len(drawn) == 4


def test_knobs_are_the_records_on_a_device() -> None:
    made = qn.knobs(FILTERED)
    for name, leaf in made._asdict().items():
        assert leaf.shape == (BATCH,)
        want = [getattr(s, name) for s in FILTERED]
        assert relative_rms(leaf, torch.tensor(want)) < 1e-7 if any(want) else not leaf.any()
    assert made.seed.dtype == made.top_k.dtype == torch.int64
    assert qn.knobs(HOT).seed.tolist() == [5, 17, 2**62, -3, 17]
