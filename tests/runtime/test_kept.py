"""A sequence taken out of the pools and put back elsewhere goes on to the bit as if it had stayed.

What goes on is asked one row at a time, or the same rows in the same order, so that products have
the same shapes on both sides.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.config import PAGE
from qnext.functional.state import KV, pages_of, view
from qnext.functional.tree import leaves, leaves_with_paths, map_leaves, same_structure
from qnext.runtime.kept import Kept, as_state, completed, of_state, put, take, wipe
from qnext.runtime.prefix import shared_pages
from tests.samples import ODD
from tests.sequences import cells, check_memory, content, model

VOCAB, WHOLE = 211, 3  # pages of a sequence here
SMALL = {"num_hidden_layers": 2, "full_attention_interval": 2, "mtp_num_hidden_layers": 1}
LENGTHS = [1, 127, 128, 129, 255, 256, 257]


@cache
def params(name: str = "base") -> qn.Params:
    return model(**ODD[name] | SMALL)


def words(seq: int, batch: int = 1, seed: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def consumed(length: int, draft: int = 0, more: int = 0) -> qn.State:
    """One sequence of so many tokens in a state of its own."""
    state = qn.init_state(params().config, 1, WHOLE * PAGE, draft=draft)
    return qn.prefill(params(), state, words(length + more)[:, more:])[1] if length else state


@cache
def lived(draft: int, name: str = "base") -> qn.State:
    """Rows that have consumed 262, 130 and 36 tokens, in permuted slots and at other offsets."""
    p, three = params(name), torch.tensor
    state = qn.init_state(p.config, 3, WHOLE * PAGE, draft=draft)
    _, state = qn.prefill(p, state, words(256, batch=3), three([256, 126, 30]))
    for seed in range(6 if draft == 0 else 2):
        counts = three([draft + 1] * 3)
        counts = three([1, min(2, draft + 1), draft + 1]) if seed else counts
        _, pending = qn.verify(p, state, words(draft + 1, batch=3, seed=40 + seed))
        state = qn.commit(pending, counts)
    if draft:
        state = qn.rewind(state, three([0, 1, 0]))
    return state


def blank(p: qn.Params, batch: int, draft: int, pages: int) -> qn.State:
    """Rows that have nothing yet, at any places of pools that hold nothing but NaN."""
    state = qn.init_state(p.config, batch, WHOLE * PAGE, draft=draft, pages=pages)
    generator = torch.Generator().manual_seed(13)

    def mixed(table: Tensor) -> Tensor:
        order = torch.randperm(table.numel(), generator=generator)
        return table.flatten()[order].view_as(table)

    state = state._replace(slots=mixed(state.slots), rows=mixed(state.rows))
    ruin(state)
    return state


def ruin(state: qn.State) -> None:
    for pool in leaves((state.layers, state.mtp)):
        pool.fill_(torch.nan)


def settle(
    state: qn.State, row: int, pages: Sequence[int], kept: Kept | None, length: int, fill: int = 0
) -> qn.State:
    """The state with a row that begins anew with a value; the first `fill` pages are there."""
    table = state.block_table.clone()
    table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
    at = torch.tensor([row])
    state = state._replace(
        lengths=state.lengths.index_fill(0, at, length),
        capacity=state.capacity.index_fill(0, at, len(pages) * PAGE),
        accepted=state.accepted.index_fill(0, at, 0),
        mtp_lengths=state.mtp_lengths.index_fill(
            0, at, max(length - 1, 0) if state.slots.shape[1] > 1 else 0
        ),
        block_table=table,
    )
    put(state, row, pages[fill : pages_of(length)], kept)
    return state


def own_pages(state: qn.State, row: int) -> list[int]:
    return state.block_table[row, : pages_of(int(state.lengths[row]))].tolist()


def future(
    p: qn.Params, state: qn.State, rows: list[int], drafted: int, seed: int = 7
) -> tuple[list[Tensor], qn.State]:
    """What rows say if they go on: steps, drafts, guesses, a chunk; and the state after it."""
    batch, whole = len(rows), state
    tokens = words(22, batch, seed)
    state = view(state, torch.tensor(rows))
    said = [qn.draft(p, state, tokens[:, 0], drafted)[0]] if drafted else []
    logits, state = qn.decode(p, state, tokens[:, 0])
    said.append(logits)
    if drafted:
        *new, state = qn.speculate(p, state, tokens[:, 1], drafted)
        logits, state = qn.verify(p, state, tokens[:, 2 : 3 + drafted])
        state = qn.commit(state, 1 + torch.arange(batch) % (drafted + 1))
        said += [*new, logits, qn.draft(p, state, tokens[:, 9], drafted)[0]]
    for each in (tokens[:, 4:21], tokens[:, 21:]):
        logits, state = qn.forward(p, state, each)
        said.append(logits)
    return said, merged(whole, state, rows)


def module_memory(state: qn.State, row: int) -> dict[str, Tensor]:
    """What the MTP module remembers of a row."""
    pools, at = state.mtp[0], cells(state, row)[: int(state.mtp_lengths[row])]
    return {
        "pairs": state.mtp_lengths[row],
        "key": pools.key.flatten(0, 1)[at],
        "value": pools.value.flatten(0, 1)[at],
        "hidden": pools.hidden[int(state.rows[row]), int(state.accepted[row])],
    }


def merged(whole: qn.State, part: qn.State, rows: list[int]) -> qn.State:
    """All rows' tables with what became of some, and their pools."""
    changed = {
        name: getattr(whole, name).index_copy(0, torch.tensor(rows), getattr(part, name))
        for name in ("lengths", "slots", "accepted", "mtp_lengths")
    }
    return whole._replace(layers=part.layers, mtp=part.mtp, **changed)


def check_said(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for mine, other in zip(got, want, strict=True):
        assert mine.isfinite().all() and torch.equal(mine, other)


def bits(tensor: Tensor) -> Tensor:
    """For comparing: NaN is equal to itself."""
    return tensor.contiguous().view(torch.uint8)


def check_equal(got: Kept, want: Kept) -> None:
    assert same_structure(got, want)
    for (path, mine), other in zip(leaves_with_paths(got), leaves(want), strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape, path
        assert torch.equal(bits(mine), bits(other)), path


# --- from one state into another -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "draft", "other"),
    [("base", m, n) for m in range(3) for n in range(4) if m or n % 2 == 0] + [("conv2", 2, 3)],
)
def test_moved_sequences_go_on_as_they_would_have(name: str, draft: int, other: int) -> None:
    p, state, drafted = params(name), lived(draft, name), min(draft, other)
    if draft:
        assert state.accepted.tolist() != [0, 0, 0]
        assert not torch.equal(state.slots, state.slots.sort()[0])
    there = blank(p, batch=5, draft=other, pages=17)
    places = [(4, [9, 16, 2]), (0, [3, 17, 1]), (2, [8, 5, 12])]
    for row, (place, pages) in enumerate(places):
        kept = take(state, row, own_pages(state, row))
        there = settle(there, place, pages, kept, int(state.lengths[row]))
        check_memory(content(p, there, place), content(p, state, row))
        if drafted:
            check_memory(module_memory(there, place), module_memory(state, row))
    for rows in ([0, 1, 2], [1]):
        got, _ = future(p, there, [places[row][0] for row in rows], drafted)
        check_said(got, future(p, state, rows, drafted)[0])


def test_what_is_taken_is_a_copy_and_taking_changes_nothing() -> None:
    state = map_leaves(torch.clone, lived(2))
    before = map_leaves(torch.clone, state)
    kept = take(state, 1, own_pages(state, 1))
    assert all(torch.equal(a, b) for a, b in zip(leaves(state), leaves(before), strict=True))
    copy = map_leaves(torch.clone, kept)
    ruin(state)
    check_equal(kept, copy)


def test_what_is_taken_does_not_depend_on_where_it_lay() -> None:
    """Neither on the room for drafts, but for the module's part, which is not without."""
    state = lived(2)
    kept = take(state, 0, own_pages(state, 0))
    again = blank(params(), batch=4, draft=3, pages=7)
    again = settle(again, 3, [6, 4, 5], kept, int(state.lengths[0]))
    check_equal(take(again, 3, [6, 4, 5]), kept)
    plain = blank(params(), batch=4, draft=0, pages=7)
    plain = settle(plain, 1, [6, 4, 5], kept, int(state.lengths[0]))
    check_equal(take(plain, 1, [6, 4, 5]), kept._replace(mtp=()))


def test_shapes_and_bytes() -> None:
    axes = params().config.axes
    kept = take(lived(2), 0, [1, 3])
    pool = 2 * PAGE * axes["hkv"] * axes["hd"]
    shapes = [list(leaf.shape) for leaf in leaves(kept)]
    page = [2, PAGE, axes["hkv"], axes["hd"]]
    assert shapes == [
        [1, axes["hv"], axes["dv"], axes["dk"]],
        [1, 3, axes["conv"]],
        *[page] * 4,
        [1, 1, axes["d"]],
    ]
    single = axes["hv"] * axes["dv"] * axes["dk"] + 3 * axes["conv"] + axes["d"]
    assert kept.nbytes == 4 * (4 * pool + single)


def lines(
    p: qn.Params, state: qn.State, tokens: Tensor, steps: int
) -> tuple[list[Tensor], qn.State]:
    """What some iterations of speculation yield, and the state after them."""
    made = []
    for _ in range(steps):
        line, count, state = qn.speculate(p, state, tokens, 3)
        tokens = qn.newest(line, count)
        made.append(line)
    return made, state


def test_the_demo_s_guesses_are_right_where_it_is_moved_to() -> None:
    """Of random models hardly a guess is right; here some are, before and after the move."""
    p, text = qn.demo(torch.float32), qn.tokenizer()
    prompt = torch.tensor([text.encode("Question: Tom has 9 pens and buys 8. How many?\nAnswer:")])
    state = qn.init_state(p.config, 1, WHOLE * PAGE, draft=3)
    logits, state = qn.prefill(p, state, prompt)
    (*_, last), state = lines(p, state, logits.argmax(-1), 2)
    assert int(state.accepted)
    kept = take(state, 0, own_pages(state, 0))
    there = settle(blank(p, batch=3, draft=3, pages=5), 1, [5, 3, 1], kept, int(state.lengths))
    tokens = last[:, state.accepted[0]]
    got, _ = lines(p, view(there, torch.tensor([1])), tokens, 4)
    want, _ = lines(p, state, tokens, 4)
    check_said(got, want)
    assert sum(int((line >= 0).sum()) for line in got) > 2 * 4


# --- prefixes that share pages -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "draft"), [(n, 2) for n in LENGTHS] + [(n, 0) for n in LENGTHS[::2]]
)
def test_two_futures_on_shared_pages(length: int, draft: int) -> None:
    """A snapshot is the last token's page and shared ones before; the first goes on beside it."""
    p, mine = params(), [7, 2, 9]
    state = settle(blank(p, batch=4, draft=draft, pages=9), 2, mine, None, 0)
    _, part = qn.prefill(p, view(state, torch.tensor([2])), words(length))
    state = merged(state, part, [2])
    shared = shared_pages(length)
    assert pages_of(length) - shared == 1
    kept = take(state, 2, mine[shared : pages_of(length)])
    theirs = [*mine[:shared], *[1, 8, 5][shared:]]
    whole = take(state, 2, mine[: pages_of(length)])
    check_equal(completed(state, mine[:shared], kept), whole)

    alone = {row: consumed(length, draft) for row in (0, 2)}
    for row, seed in ((2, 8), (0, 9), (2, 10)):
        if seed == 9:  # the first is ahead when the other begins
            state = settle(state, 0, theirs, kept, length, fill=shared)
        got, state = future(p, state, [row], draft, seed)
        want, alone[row] = future(p, alone[row], [0], draft, seed)
        check_said(got, want)


# --- nothing, and zeros --------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [0, 2])
def test_a_row_put_anew_is_a_fresh_sequence(draft: int) -> None:
    """Whatever it held: all pools are NaN."""
    p = params()
    state = settle(blank(p, batch=4, draft=draft, pages=9), 3, [4, 9, 6], None, 0)
    fresh = qn.init_state(p.config, 1, WHOLE * PAGE, draft=draft)
    check_said(future(p, state, [3], draft)[0], future(p, fresh, [0], draft)[0])


def test_a_value_without_a_module_s_part_costs_guesses_only() -> None:
    """Even where the module's pages are full of NaN."""
    p, length, token = params(), 140, words(1)[:, 0]
    plain = consumed(length)
    there = blank(p, batch=2, draft=2, pages=3)
    there = settle(there, 1, [2, 3, 1], take(plain, 0, [1, 2]), length)
    assert not there.mtp[0].hidden[int(there.rows[1]), 0].any()
    row = view(there, torch.tensor([1]))
    got, want = (qn.decode(p, state, token)[0] for state in (row, plain))
    assert torch.equal(got, want)
    line, _, row = qn.speculate(p, row, token, 2)
    assert int(line[0, 0]) == int(want.argmax())
    assert qn.decode(p, row, token)[0].isfinite().all()


@pytest.mark.parametrize("draft", [0, 2])
def test_wiping_leaves_zeros_and_touches_nothing_else(draft: int) -> None:
    state = map_leaves(torch.clone, lived(draft))
    for pool in leaves((state.layers, state.mtp)):
        pool.normal_()
        pool.flatten()[::3] = torch.nan
    want = map_leaves(torch.clone, state)
    for part in (*want.layers, *want.mtp):
        if isinstance(part, KV | type(want.mtp[0])):
            part.key[[4, 6]] = part.value[[4, 6]] = 0
        for slot in state.slots[1].tolist() if hasattr(part, "recurrent") else ():
            part.recurrent[slot] = 0
        for name in {"window", "hidden"} & set(part._fields):
            getattr(part, name)[int(state.rows[1])] = 0
    wipe(state, 1, [4, 6])
    for (path, got), other in zip(leaves_with_paths(state), leaves(want), strict=True):
        assert torch.equal(bits(got), bits(other)), path


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [0, 2])
@pytest.mark.parametrize("length", [0, *LENGTHS, 384])
def test_a_value_comes_back_from_a_file_to_the_bit(tmp_path: Path, length: int, draft: int) -> None:
    p = params()
    state = consumed(length, draft)
    kept = take(state, 0, own_pages(state, 0))
    alone = as_state(p.config, kept, length)
    assert alone.lengths.tolist() == [length] and alone.block_table.numel() == max(
        pages_of(length), 1
    )
    assert torch.equal(alone.mtp_lengths, state.mtp_lengths)
    qn.save_state(p, alone, tmp_path / "state.safetensors")
    loaded = qn.load_state(p, tmp_path / "state.safetensors")
    check_equal(of_state(loaded), kept)
    if length % PAGE:
        token = words(1, seed=5)[:, 0]
        got, want = (qn.decode(p, s, token)[0] for s in (loaded, state))
        assert torch.equal(got, want)
        if draft:
            got, want = (qn.draft(p, s, token, 1)[0] for s in (loaded, state))
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["base", "only_delta", "only_attention"])
def test_a_value_s_state_has_its_dtypes(name: str) -> None:
    p = model(compute=torch.bfloat16, **ODD[name])
    state = qn.init_state(p.config, 1, 200)
    _, state = qn.prefill(p, state, words(140))
    kept = take(state, 0, [1, 2])
    check_equal(of_state(as_state(p.config, kept, 140)), kept)
