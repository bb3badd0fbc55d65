"""Verify and commit against decode, token by token: nothing of a draft that is not accepted stays.

All in float32 and between our own functions. The plain side never has room for a draft, so no slot,
offset or window of verifying is in it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import qnext as qn
from qnext.functional.state import KV
from qnext.functional.tree import leaves, leaves_with_paths
from tests.calls import Floats
from tests.samples import relative_rms
from tests.sequences import (
    BATCH,
    HARSH,
    Result,
    check_close,
    check_memory,
    check_same,
    content,
    relocate,
    result,
    run,
    spoil,
    started,
    words,
)

MODELS = ("base", "conv2", "conv3")  # windows of 3, 1 and 2 inputs; 2, 1 and 2 values a key
DRAFT = 3
LENGTHS, ACCEPTED = [4, 2, 0, 3, 4], [4, 1, 0, 2, 3]  # of DRAFT + 1 tokens; the third row rests
close = partial(check_close, tolerance=HARSH)
# patterns are short as they are: shrinking one would take minutes
FEW = settings(deadline=None, max_examples=4, derandomize=True, phases=[Phase.generate])


@pytest.fixture(scope="module", params=MODELS)
def params(request: pytest.FixtureRequest, checkpoints: Any) -> qn.Params:
    return checkpoints(request.param)[2]


class Plain(NamedTuple):
    """Token by token: logits [batch, seq, vocab], and the states before and after each token."""

    logits: Tensor
    states: list[qn.State]

    def after(self, params: qn.Params, counts: list[int]) -> list[dict[str, Tensor]]:
        """What rows remember once each has consumed its count."""
        return [content(params, self.states[n], row) for row, n in enumerate(counts)]


def decoded(params: qn.Params, state: qn.State, tokens: Tensor) -> Plain:
    logits, states = [], [state]
    for token in tokens.unbind(1):
        out, state = qn.decode(params, state, token)
        logits.append(out)
        states.append(state)
    return Plain(torch.stack(logits, dim=1), states)


def fed(params: qn.Params, state: qn.State, tokens: Tensor, counts: list[int]) -> qn.State:
    """The state after `counts` tokens of each row, one at a time."""
    for at in range(max(counts)):
        more = (torch.tensor(counts) > at).int()
        _, state = qn.forward(params, state, tokens[:, at : at + 1], more)
    return state


def verified(
    params: qn.Params, state: qn.State, tokens: Tensor, lengths: list[int], accepted: list[int]
) -> tuple[Tensor, qn.State]:
    logits, pending = qn.verify(params, state, tokens, torch.tensor(lengths))
    return logits, qn.commit(pending, torch.tensor(accepted))


# --- what is left of a draft -------------------------------------------------------------------


@pytest.mark.parametrize("draft", range(1, 8))
def test_every_accepted_count(params: qn.Params, draft: int) -> None:
    """One verification, committed in every way; each leads on as if nothing else had been."""
    tokens, more, room = words(draft + 1), words(1, seed=8)[:, 0], draft + 1
    plain = decoded(params, started(params), tokens)
    following = [qn.decode(params, state, more) for state in plain.states]
    logits, pending = qn.verify(params, started(params, draft), tokens)
    assert relative_rms(logits, plain.logits) < HARSH
    for shift in range(room):
        counts = [1 + (row + shift) % room for row in range(BATCH)]
        state = qn.commit(pending, torch.tensor(counts))
        got, after = qn.decode(params, state, more)
        for row, count in enumerate(counts):
            want, want_after = following[count]
            mine = [content(params, s, row) for s in (state, after)]
            other = [content(params, s, row) for s in (plain.states[count], want_after)]
            close(Result([got[row]], mine), Result([want[row]], other))


class Round(NamedTuple):
    """Tokens of each row to verify, how many of them hold, and whether a plain step follows."""

    lengths: list[int]
    accepted: list[int]
    decode: bool


def rounds(room: int) -> st.SearchStrategy[list[Round]]:
    def made(rows: list[tuple[int, int]], decode: bool) -> Round:
        return Round([n for n, _ in rows], [1 + k % n if n else 0 for n, k in rows], decode)

    row = st.tuples(st.integers(0, room), st.integers(0, room - 1))
    rows = st.lists(row, min_size=BATCH, max_size=BATCH)
    return st.lists(st.builds(made, rows, st.booleans()), min_size=2, max_size=4)


@FEW
@given(plan=st.integers(1, 5).flatmap(lambda d: st.tuples(st.just(d), rounds(d + 1))))
def test_rounds_in_any_pattern(params: qn.Params, plan: tuple[int, list[Round]]) -> None:
    """Ragged drafts, other counts a row and a round, plain steps between, slots ever permuted."""
    draft, each = plan
    state, plain = started(params, draft), started(params)
    for number, (lengths, accepted, decode) in enumerate(each):
        tokens = words(draft + 1, seed=20 + number)
        logits, state = verified(params, state, tokens, lengths, accepted)
        want, _ = qn.forward(params, plain, tokens, torch.tensor(lengths))
        plain = fed(params, plain, tokens, accepted)
        close(
            result(params, logits, state, lengths),
            Result(
                [want[row, :n] for row, n in enumerate(lengths)],
                [content(params, plain, row) for row in range(BATCH)],
            ),
        )
        table = state.slots.sort(dim=1).values
        assert torch.equal(table, started(params, draft).slots)  # none lost, none held twice
        if decode:
            (got, state), (want, plain) = (
                qn.decode(params, s, tokens[:, 0]) for s in (state, plain)
            )
            assert relative_rms(got, want) < HARSH


@pytest.mark.parametrize("seq", [1, 2, 3])
def test_fewer_tokens_than_the_state_keeps(params: qn.Params, seq: int) -> None:
    """Slots of the other tokens keep every bit, and one token is a decode."""
    tokens, ready = words(seq), started(params, DRAFT)
    counts = [1 + row % seq for row in range(BATCH)]
    logits, pending = qn.verify(params, ready, tokens)
    plain = decoded(params, started(params), tokens)
    state = qn.commit(pending, torch.tensor(counts))
    close(
        result(params, logits, state, [seq] * BATCH),
        Result(list(plain.logits), plain.after(params, counts)),
    )
    spare = ready.slots[:, seq:].flatten().long()
    for part, old in zip(pending.layers, ready.layers, strict=True):
        if not isinstance(part, KV):
            assert torch.equal(part.recurrent[spare], old.recurrent[spare])


def test_one_token_needs_no_room_for_drafts(params: qn.Params) -> None:
    tokens = words(1)
    logits, pending = qn.verify(params, started(params), tokens)
    want, after = qn.decode(params, started(params), tokens[:, 0])
    assert torch.equal(logits[:, 0], want)
    state = qn.commit(pending, torch.ones(BATCH, dtype=torch.int64))
    assert all(map(torch.equal, leaves(state), leaves(after)))


def test_rows_without_tokens_rest(params: qn.Params) -> None:
    """Not a bit of what they remember changes, wherever their window begins."""
    _, state = verified(params, started(params, DRAFT), words(4), LENGTHS, ACCEPTED)
    rest = [0, 3, 0, 0, 1]
    _, after = verified(params, state, words(4, seed=4), rest, rest)
    for row in (0, 2, 3):
        check_memory(content(params, after, row), content(params, state, row))
    assert not torch.equal(after.lengths, state.lengths)


# --- what goes on from a commit ----------------------------------------------------------------

CONTINUED: dict[str, Callable[[qn.Params, qn.State], Result]] = {
    "forward": lambda p, s: run(p, s, words(13, seed=6), [9, 0, 13, 1, 6]),
    "chunks": lambda p, s: run(p, s, words(70, seed=6), [70, 3, 19, 0, 64]),
    "prefill": lambda p, s: _last(p, *qn.prefill(p, s, words(6), torch.tensor([6, 1, 4, 3, 2]))),
    "decode": lambda p, s: _last(p, *qn.decode(p, s, words(1, seed=6)[:, 0])),
    "generate": lambda p, s: _last(p, *qn.generate(p, s, words(2, seed=6), 4)),
}


def _last(params: qn.Params, values: Tensor, state: qn.State) -> Result:
    return result(params, values, state, [1] * BATCH)._replace(logits=list(values.float()))


@pytest.mark.parametrize("way", CONTINUED)
def test_going_on_from_a_commit(params: qn.Params, way: str) -> None:
    _, state = verified(params, started(params, DRAFT), words(4), LENGTHS, ACCEPTED)
    plain = fed(params, started(params), words(4), ACCEPTED)
    assert state.accepted.tolist() == [3, 0, 0, 1, 2]
    close(CONTINUED[way](params, state), CONTINUED[way](params, plain))


def test_select_after_a_commit(params: qn.Params) -> None:
    """Rows with permuted slots and late windows are taken as they are, and verify on."""
    _, state = verified(params, started(params, DRAFT), words(4), LENGTHS, ACCEPTED)
    rows, tokens = [4, 1, 1], words(4, batch=3, seed=6)
    chosen = qn.select(state, rows)
    for new, old in enumerate(rows):
        check_memory(content(params, chosen, new), content(params, state, old))
    logits, after = verified(params, chosen, tokens, [4, 3, 4], [2, 3, 4])
    whole = words(4).index_put((torch.tensor([4, 1]),), tokens[:2])
    want, other = verified(params, state, whole, [0, 3, 0, 0, 4], [0, 3, 0, 0, 2])
    for new, old, count in ((0, 4, 4), (1, 1, 3)):
        close(
            Result([logits[new, :count]], [content(params, after, new)]),
            Result([want[old, :count]], [content(params, other, old)]),
        )


def test_a_saved_commit_verifies_on(params: qn.Params, tmp_path: Path) -> None:
    _, state = verified(params, started(params, DRAFT), words(4), LENGTHS, ACCEPTED)
    qn.save_state(params, state, tmp_path / "state")
    loaded = qn.load_state(params, tmp_path / "state")
    assert all(map(torch.equal, leaves(loaded), leaves(state)))
    want, got = (verified(params, s, words(4, seed=6), LENGTHS, ACCEPTED) for s in (state, loaded))
    assert all(map(torch.equal, leaves(got), leaves(want)))


def test_one_draft_has_many_futures(params: qn.Params) -> None:
    """Two commits of one verification, and the state before it, go on without each other."""
    before, tokens, more = started(params, DRAFT), words(4), words(5, seed=6)
    old = [(leaf, leaf.clone(), leaf._version) for leaf in leaves(before)]
    pending = qn.verify(params, before, tokens)[1]
    left, right = (
        qn.commit(qn.fork(pending), torch.tensor(n)) for n in ([1, 4, 2, 3, 1], [4, 2, 2, 1, 3])
    )
    want = [run(params, s, more, [5] * BATCH) for s in (left, right)]
    again = [run(params, s, more, [5] * BATCH) for s in (left, right)]
    for got, first in zip(again, want, strict=True):
        check_same(got, first)
    for leaf, copy, version in old:
        assert torch.equal(leaf, copy) and leaf._version == version
    fresh = run(params, started(params, DRAFT), more, [5] * BATCH)
    check_same(run(params, before, more, [5] * BATCH), fresh)


# --- what verify reads and writes --------------------------------------------------------------


@pytest.mark.parametrize("garbage", [-1, 211, 10**9])
def test_padding_may_hold_anything(params: qn.Params, garbage: int) -> None:
    state, tokens, counts = started(params, DRAFT), words(4), torch.tensor(LENGTHS)
    valid = torch.arange(4) < counts[:, None]
    want = qn.verify(params, state, tokens, counts)
    got = qn.verify(params, state, tokens.where(valid, garbage), counts)
    assert all(map(torch.equal, leaves(got), leaves(want)))


@pytest.mark.parametrize("change", [spoil, relocate], ids=["poisoned", "relocated"])
def test_only_content_is_read(params: qn.Params, change: Callable[..., qn.State]) -> None:
    """NaN in scratch, in slots of drafts, beyond lengths and around windows; or other places."""
    _, state = verified(params, started(params, DRAFT), words(4), LENGTHS, ACCEPTED)
    other = spoil(params, state) if change is spoil else relocate(spoil(params, state))
    tokens = words(4, seed=6)
    (want, mine), (got, theirs) = (
        verified(params, s, tokens, [2, 4, 4, 1, 3], [1, 3, 4, 1, 2]) for s in (state, other)
    )
    lengths = [2, 4, 4, 1, 3]
    check_same(result(params, got, theirs, lengths), result(params, want, mine, lengths))


def test_the_last_tokens_there_is_room_for(params: qn.Params) -> None:
    """Rows with less room than a whole draft verify what fits; padding beyond does no harm."""
    lengths = [4, 2, 1, 3, 4]
    states = []
    for room in (128, 250):
        state = qn.init_state(params.config, BATCH, room, draft=DRAFT)
        counts = 128 - torch.tensor(lengths)
        states.append(qn.forward(params, state, words(127), counts)[1])
    found = [
        result(params, *verified(params, s, words(4, seed=6), lengths, lengths), lengths)
        for s in states
    ]
    for mine, other in zip(found[0].memory, found[1].memory, strict=True):
        assert mine["lengths"] == mine.pop("capacity") < other.pop("capacity")
    check_same(*found)


# --- commit --------------------------------------------------------------------------------------


def test_commit_copies_nothing(params: qn.Params) -> None:
    """Every pool is the same object; in eager mode not one floating operation runs."""
    _, pending = qn.verify(params, started(params, DRAFT), words(4))
    with Floats() as floats:
        state = qn.commit(pending, torch.tensor([3, 1, 2, 4, 1]))
    assert floats.seen == []
    changed = [
        path
        for (path, old), (_, new) in zip(
            leaves_with_paths(pending), leaves_with_paths(state), strict=True
        )
        if old is not new
    ]
    assert changed == [".lengths", ".slots", ".accepted"]


def test_commit_is_indices_and_lengths_in_its_graph(params: qn.Params) -> None:
    """No node has more elements than the table of slots, and pools go straight to the results."""
    _, pending = qn.verify(params, started(params, DRAFT), words(4))
    trace = qn.jit(qn.commit).trace(pending, torch.ones(BATCH, dtype=torch.int64)).trace
    nodes = list(trace.graph.graph.nodes)
    made = [node.meta["val"] for node in nodes if node.op == "call_function"]
    assert len(made) > 3 and max(t.numel() for t in made) == pending.slots.numel()
    assert not any(t.is_floating_point() for t in made)
    smallest = min(leaf.nbytes for leaf in leaves(pending.layers))
    assert sum(t.nbytes for t in made) < smallest / 2
    results = nodes[-1].args[0]
    pools = [node for node in results if node.meta["val"].is_floating_point()]
    assert len(pools) == len(leaves(pending.layers))
    assert all(node.op == "placeholder" for node in pools)


def test_compiled_rounds_are_bit_equal(params: qn.Params) -> None:
    """Verify and commit through jit with a donated state that goes round."""
    verify, commit = qn.jit(qn.verify, donate="state"), qn.jit(qn.commit, donate="state")
    state, mine = started(params, DRAFT), started(params, DRAFT)
    for number, accepted in enumerate(([4, 1, 2, 3, 1], [1, 2, 4, 4, 3], [2, 2, 1, 1, 4])):
        tokens, counts = words(4, seed=30 + number), torch.tensor(accepted)
        logits, pending = verify(params, mine, tokens)
        with pytest.raises(qn.DonatedError, match="donated to verify"):
            qn.decode(params, mine, tokens[:, 0])
        mine = commit(pending, counts)
        want, state = verified(params, state, tokens, [4] * BATCH, accepted)
        assert torch.equal(logits, want)
        assert all(map(torch.equal, leaves(mine), leaves(state)))
