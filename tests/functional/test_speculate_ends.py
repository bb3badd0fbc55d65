"""Where speculation ends: eos, stop, max_new_tokens and capacity inside a draft; and `rewind`."""

from typing import Any

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.tree import leaves, leaves_with_paths, map_leaves
from tests.functional.test_speculate import (
    BATCH,
    GREEDY,
    VOCAB,
    Planted,
    check_remembered,
    fresh,
    made,
    prompts,
    remembered,
)
from tests.sequences import check_memory

NEW, LENGTHS = 11, torch.tensor([6, 2, 9])


@pytest.fixture(scope="module")
def odd() -> qn.Params:
    return made("base")


@pytest.fixture(scope="module")
def text(odd: qn.Params) -> Tensor:
    return qn.generate(odd, fresh(odd, 0), prompts(9), NEW, LENGTHS)[0]


def planted(text: Tensor, p: float = 1.0) -> Planted:
    return Planted(text, LENGTHS, p, seed=1)


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("p", [pytest.param(1.0, marks=pytest.mark.slow), 0.6])
def test_eos_anywhere_in_a_draft(odd: qn.Params, text: Tensor, at: int, p: float) -> None:
    """Row 1 ends there; the others, and its own state, are as plain decoding leaves them."""
    eos = int(text[1, at])
    want, plain = qn.generate(odd, fresh(odd, 3), prompts(9), NEW, LENGTHS, eos=eos)
    got, state = qn.generate(
        odd, fresh(odd, 3), prompts(9), NEW, LENGTHS, GREEDY, eos, 3, planted(text, p)
    )
    assert torch.equal(got, want) and (want[1] >= 0).sum() <= at + 1
    check_remembered(odd, state, plain)


def test_a_finished_row_keeps_every_bit(odd: qn.Params, text: Tensor) -> None:
    """While others go on; and a column is asked of once, with the tokens that are still wanted."""
    ends = {0: int(text[0, 4]), 2: int(text[2, 1])}
    asked: list[list[int]] = []

    def stop(new: Tensor) -> Tensor:
        asked.append(new.tolist())
        return torch.tensor([ends.get(row) == token for row, token in enumerate(new.tolist())])

    last: dict[int, dict[str, Tensor]] = {}
    steps = qn.stream(
        odd, fresh(odd, 3), prompts(9), NEW, LENGTHS, GREEDY, stop, 3, planted(text, 0.7)
    )
    for new, state in steps:
        for row in ends:
            if row in last:
                assert (new[row] == -1).all()
                check_memory(remembered(odd, state, row), last[row])
            elif ends[row] in new[row].tolist():
                last[row] = remembered(odd, state, row)
    assert last.keys() == ends.keys()
    for row in range(BATCH):
        cut = text[row].tolist()
        cut = cut[: cut.index(ends[row]) + 1] if row in ends else cut
        assert [column[row] for column in asked if column[row] >= 0] == cut


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 6])
def test_max_new_tokens_inside_a_draft(odd: qn.Params, text: Tensor, new: int) -> None:
    """With no room in the state for more than that."""
    states = [qn.init_state(odd.config, BATCH, 9 + new, draft=3) for _ in range(2)]
    want, plain = qn.generate(odd, states[0], prompts(9), new, LENGTHS)
    got, state = qn.generate(odd, states[1], prompts(9), new, LENGTHS, draft=3, step=planted(text))
    assert torch.equal(got, want) and torch.equal(want, text[:, :new])
    assert state.capacity.tolist() == [9 + new] * BATCH
    check_remembered(odd, state, plain)


@pytest.mark.parametrize("capacity", [14, 128])
def test_capacity_inside_a_draft(odd: qn.Params, capacity: int) -> None:
    """Counts are cut to the room, full rows rest, and no valid position is written past the end.

    128 is a whole page: what is beyond has no page of its own.
    """
    lengths = torch.tensor([capacity - 3, capacity, capacity - 1])
    tokens = prompts(capacity, seed=12)
    states = {
        room: qn.prefill(odd, qn.init_state(odd.config, BATCH, room, draft=3), tokens, lengths)
        for room in (capacity, 300)
    }
    new = states[300][0].argmax(-1)
    text = [new]
    state = states[300][1]
    for _ in range(4):
        logits, state = qn.decode(odd, state, text[-1])
        text.append(logits.argmax(-1))
    line = torch.stack(text, dim=1)
    before = states[capacity][1]
    drawn, count, after = qn.accept(odd, before, new, line[:, 1:4])
    assert count.tolist() == [3, 0, 1]
    assert drawn[0].tolist() == [*line[0, 1:4].tolist(), -1] and (drawn[1] == -1).all()
    check_memory(remembered(odd, after, 1), remembered(odd, before, 1))
    assert after.lengths.tolist() == [capacity] * BATCH
    _, plain = qn.forward(odd, before, line[:, :3], torch.tensor([3, 0, 1]))
    check_remembered(odd, after, plain)
    again = qn.speculate(odd, after, qn.newest(drawn, count), 3)
    assert again[1].tolist() == [0, 0, 0]
    for row in range(BATCH):
        check_memory(remembered(odd, again[2], row), remembered(odd, after, row))


def test_a_full_row_s_token_may_be_anything(odd: qn.Params) -> None:
    _, state = qn.prefill(odd, qn.init_state(odd.config, BATCH, 9, draft=2), prompts(9), LENGTHS)
    tokens = torch.tensor([5, 8, -1])
    want = qn.speculate(odd, state, tokens.clamp(min=0), 2)
    got = qn.speculate(odd, state, tokens, 2)
    assert all(map(torch.equal, leaves(got), leaves(want)))
    with pytest.raises(qn.InputError, match=r"tokens\[1, 0\] = -1 is no token id"):
        qn.speculate(odd, state, torch.tensor([5, -1, -1]), 2)


def test_nothing_that_was_left_behind_is_read(odd: qn.Params, text: Tensor) -> None:
    """NaN in scratch and in the slots of drafts, garbage in what is beyond each row."""
    _, state = qn.prefill(odd, fresh(odd, 3), prompts(9), LENGTHS)

    def spoil(pool: Tensor) -> Tensor:
        return pool.index_fill(0, torch.tensor([0]), torch.nan)

    spoilt = state._replace(
        layers=map_leaves(spoil, state.layers), mtp=map_leaves(spoil, state.mtp)
    )
    want = qn.speculate(odd, state, text[:, 0], 3)
    got = qn.speculate(odd, spoilt, text[:, 0], 3)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    check_remembered(odd, got[2], want[2])


def test_arguments_are_values(odd: qn.Params, text: Tensor) -> None:
    _, state = qn.prefill(odd, fresh(odd, 3), prompts(9), LENGTHS)
    arguments = (state, text[:, 0])
    old = [(leaf, leaf.clone(), leaf._version) for leaf in leaves(arguments)]
    first, second = (qn.speculate(odd, *arguments, 3) for _ in range(2))
    for leaf, copy, version in old:
        assert torch.equal(leaf, copy) and leaf._version == version
    assert all(map(torch.equal, leaves(first), leaves(second)))


# --- one function, compiled -----------------------------------------------------------------------


def test_a_compiled_iteration_is_bit_equal(odd: qn.Params, text: Tensor) -> None:
    """The whole iteration traces as one function, and goes round with a donated state."""
    step = qn.jit(qn.speculate, donate="state")
    settings = qn.knobs([qn.Sampling(0.8, seed=n, top_p=0.9) for n in range(BATCH)])
    mine, state = (qn.prefill(odd, fresh(odd, 3), prompts(9), LENGTHS)[1] for _ in range(2))
    tokens = text[:, 0]
    for _ in range(6):
        want, want_count, state = qn.speculate(odd, state, tokens, 3, settings, True)
        got, count, mine = step(odd, mine, tokens, 3, settings, True)
        assert torch.equal(got, want) and torch.equal(count, want_count)
        assert all(map(torch.equal, leaves(mine), leaves(state)))
        tokens = qn.newest(want, want_count)
    assert len(step._compiled) == 1


@pytest.mark.parametrize("name", ["greedy", "penalties"])
def test_generate_takes_a_compiled_iteration(odd: qn.Params, name: str) -> None:
    way = {"greedy": GREEDY, "penalties": qn.Sampling(0.7, seed=4, presence_penalty=0.5)}[name]
    want, plain = qn.generate(odd, fresh(odd, 0), prompts(9), NEW, LENGTHS, way)
    step = qn.jit(qn.speculate, donate="state")
    got, state = qn.generate(odd, fresh(odd, 2), prompts(9), NEW, LENGTHS, way, draft=2, step=step)
    assert torch.equal(got, want) and state.lengths.tolist() == plain.lengths.tolist()


def test_no_pool_is_copied_by_accepting(odd: qn.Params) -> None:
    """On paper: every write of the lowered iteration is in place, and what it makes is small."""
    bf16 = odd.config.with_precision(compute=torch.bfloat16, state=torch.bfloat16)
    arguments = qn.specs(bf16, batch=BATCH, capacity=9000, draft=2)
    traced = qn.jit(qn.speculate, donate="state").trace(*arguments, 2)
    lowered = traced.lower("npu:910b")
    pools = [leaf for leaf in leaves(arguments[1]) if leaf.is_floating_point()]
    written = [write for write in lowered.writes if write.argument != "into"]
    # attention's and the module's keys and values, windows, states, hidden states; the module's
    # again for each of two guesses
    assert len(written) == len(pools) + 2 * 2
    assert {write.verdict for write in lowered.writes} == {"in place"}
    nodes = [node for node in lowered.graph.graph.nodes if node.op == "call_function"]
    least = min(leaf.nbytes for leaf in pools)
    moved = [n for n in nodes if n.name.startswith(("clone", "copy", "write_back"))]
    assert sum(n.meta["val"].nbytes for n in moved) < least  # lengths and tables


# --- rewind ------------------------------------------------------------------------------------


def committed(odd: qn.Params, counts: list[int]) -> qn.State:
    _, state = qn.prefill(odd, fresh(odd, 3), prompts(9), LENGTHS)
    state = qn.commit(qn.verify(odd, state, prompts(4, seed=8))[1], torch.tensor([3, 2, 4]))
    return qn.commit(qn.verify(odd, state, prompts(4, seed=9))[1], torch.tensor(counts))


@pytest.mark.parametrize("back", [[3, 1, 0], [1, 2, 1], [0, 0, 0], [2, 0, 1]])
def test_rewind_is_a_commit_of_fewer(odd: qn.Params, back: list[int]) -> None:
    """Bit for bit, at once or one by one; not a pool is touched."""
    counts = [4, 3, 2]
    whole = committed(odd, counts)
    want = committed(odd, [n - k for n, k in zip(counts, back, strict=True)])
    got = qn.rewind(whole, torch.tensor(back))
    assert all(map(torch.equal, leaves(got), leaves(want)))
    slow = whole
    for at in range(3):
        slow = qn.rewind(slow, (torch.tensor(back) > at).int())
    assert all(map(torch.equal, leaves(slow), leaves(want)))
    changed = [
        path
        for (path, old), (_, new) in zip(
            leaves_with_paths(whole), leaves_with_paths(got), strict=True
        )
        if old is not new
    ]
    assert changed == [".lengths", ".slots", ".accepted", ".mtp_lengths"]


def test_rewind_goes_no_further_than_the_last_commit(odd: qn.Params) -> None:
    state = committed(odd, [4, 3, 2])
    for back in ([4, 0, 0], [0, -1, 0], [0, 0, 2]):
        with pytest.raises(qn.InputError, match=r"count\[\d\] = -?\d must lie in 0\.\.\d"):
            qn.rewind(state, torch.tensor(back))
    _, after = qn.decode(odd, state, torch.tensor([1, 2, 3]))
    with pytest.raises(qn.InputError, match=r"count\[0\] = 1 must lie in 0\.\.0"):
        qn.rewind(after, torch.tensor([1, 0, 0]))
    wrong: list[Any] = [torch.tensor([1.0, 0, 0]), torch.tensor([1, 0])]
    for count in wrong:
        with pytest.raises(qn.InputError, match=r"count must be int32 or int64 \[batch=3\]"):
            qn.rewind(state, count)


# --- what is refused ---------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(odd: qn.Params) -> None:
    _, state = qn.prefill(odd, fresh(odd, 2), prompts(9), LENGTHS)
    tokens = torch.tensor([1, 2, 3])
    bare = odd._replace(config=odd.config.__class__(**vars(odd.config) | {"mtp_layers": 0}), mtp=())
    other = qn.prefill(bare, fresh(bare, 2), prompts(9), LENGTHS)[1]
    pending = qn.verify(odd, state, prompts(3))[1]
    bad: list[tuple[str, Any]] = [
        (
            "draft=3 on a state that has room to draft 2",
            lambda: qn.speculate(odd, state, tokens, 3),
        ),
        ("draft must be an integer >= 0, got -1", lambda: qn.draft(odd, state, tokens, -1)),
        ("draft must be an integer >= 0, got True", lambda: qn.speculate(odd, state, tokens, True)),
        ("has no MTP module to draft with", lambda: qn.speculate(bare, other, tokens, 2)),
        ("has no MTP module", lambda: qn.generate(bare, fresh(bare, 2), prompts(9), 3, draft=2)),
        (r"tokens must be \[batch\], got shape \[3, 2\]", lambda: qn.draft(odd, state, prompts(2))),
        ("holds a draft that waits", lambda: qn.speculate(odd, pending, tokens, 1)),
        (r"guesses must be .* \[3\]", lambda: qn.accept(odd, state, tokens, tokens)),
        ("guesses must be .*float32", lambda: qn.accept(odd, state, tokens, prompts(2).float())),
        (r"tokens\[2, 1\] = 211 is", lambda: qn.accept(odd, state, tokens, guess(2, 0))),
        ("draft=3 on a state", lambda: qn.accept(odd, state, tokens, prompts(3))),
        ("draft=1 on a state", lambda: qn.generate(odd, fresh(odd, 0), prompts(9), 3, draft=1)),
    ]
    for says, call in bad:
        with pytest.raises(qn.InputError, match=says):
            call()
    assert qn.accept(bare, other, tokens, prompts(2))[1].tolist() == [1, 1, 1]


def guess(row: int, column: int) -> Tensor:
    """Guesses of which one is beyond the vocabulary."""
    return prompts(2).index_put((torch.tensor([row]), torch.tensor([column])), torch.tensor(VOCAB))
