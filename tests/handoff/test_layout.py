"""A value as bytes and back: the same numbers, wherever pages went ahead and whoever lays out."""

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.state import pages_of
from qnext.functional.tree import leaves, leaves_with_paths, same_structure
from qnext.handoff.layout import (
    ALIGNMENT,
    BLOCK,
    Layout,
    checksum,
    checksums,
    copy_summed,
    layout_of,
    places,
    together,
)
from qnext.runtime.kept import Kept, take, take_into
from tests.samples import ODD
from tests.sequences import BATCH, model, started, used

TORN = 0xA5


def value(state: qn.State, row: int, pages: int | None = None) -> Kept:
    count = pages_of(int(state.lengths[row])) if pages is None else pages
    return take(state, row, state.block_table[row, :count].tolist())


def region(layout: Layout, beyond: int = 0) -> Tensor:
    return torch.full((layout.nbytes + beyond,), TORN, dtype=torch.uint8)


def written(
    state: qn.State, row: int, pages: Tensor, layout: Layout, memory: Tensor, first: int = 0
) -> list[tuple[int, int]]:
    """Have pages and states copied to their places; (begin, bytes) of these."""
    into = places(layout, memory, first, len(pages))
    assert take_into(into, state, row, pages.tolist()) is into
    return [entry.part(first, len(pages)) for entry in layout.entries]


def equal(one: Kept, other: Kept) -> bool:
    pairs = zip(leaves(one), leaves(other), strict=True)
    return all(
        a.dtype == b.dtype and a.view(torch.uint8).equal(b.view(torch.uint8)) for a, b in pairs
    )


@pytest.mark.parametrize("draft", [0, 1, 3])
@pytest.mark.parametrize("name", ODD)
def test_a_value_comes_back_to_the_bit(name: str, draft: int) -> None:
    params = model(**ODD[name], mtp_num_hidden_layers=1)
    state = started(params, draft)
    for row in (1, 3, 4):
        kept = value(state, row)
        layout = layout_of(state, pages_of(int(state.lengths[row])))
        assert same_structure(layout.specs, kept)
        memory = region(layout, beyond=100)
        count = pages_of(int(state.lengths[row]))
        written(state, row, state.block_table[row, :count], layout, memory)
        assert bool((memory[layout.nbytes :] == TORN).all())
        assert equal(places(layout, memory), kept)
        for (path, leaf), spec in zip(leaves_with_paths(kept), layout.entries, strict=True):
            assert ("." + spec.path, tuple(leaf.shape), leaf.dtype) == (path, *spec[1:3])
            assert spec.begin % ALIGNMENT == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_pools_are_kept(dtype: torch.dtype) -> None:
    state = used(model(), dtype=dtype)
    kept, layout = value(state, 3, 2), layout_of(state, 2)
    memory = region(layout)
    written(state, 3, state.block_table[3, :2], layout, memory)
    assert equal(places(layout, memory), kept)
    assert {leaf.dtype for leaf in leaves(kept)} == {torch.float32, dtype}


def test_pages_may_go_ahead(draft: int = 1) -> None:
    state = started(model(mtp_num_hidden_layers=1), draft)
    row, layout = 1, layout_of(state, 3)
    whole, memory = value(state, row, 3), region(layout)
    ranges = list[tuple[int, int]]()
    for first, count in ((0, 1), (1, 2)):
        pages = state.block_table[row, first : first + count]
        ranges += written(state, row, pages, layout, memory, first)
    assert equal(places(layout, memory), whole)
    sent, where = region(layout), together(ranges)
    for begin, nbytes in where:
        sent[begin : begin + nbytes] = memory[begin : begin + nbytes]
    assert where == [(0, layout.entries[-1].end)] and equal(places(layout, sent), whole)


def test_what_was_written_is_told_and_nothing_else_is_touched() -> None:
    state = started(model(mtp_num_hidden_layers=1), 1)
    layout = layout_of(state, 3)
    memory, pages = region(layout), state.block_table[3, 1:2]
    ranges = written(state, 3, pages, layout, memory, 1)
    told = torch.zeros(layout.nbytes, dtype=torch.bool)
    for begin, nbytes in ranges:
        assert not bool(told[begin : begin + nbytes].any())
        told[begin : begin + nbytes] = True
    assert bool((memory[~told] == TORN).all()) and not bool((memory[told] == TORN).all())
    paged = [entry for entry in layout.entries if entry.is_paged]
    assert sum(n for _, n in ranges) == sum(
        entry.nbytes // (3 if entry in paged else 1) for entry in layout.entries
    )


@pytest.mark.parametrize("draft", [1, 3])
def test_sides_of_other_pools_lay_out_the_same(draft: int) -> None:
    """Other rows, other pages, another number of guesses: a value does not know them."""
    params = model(mtp_num_hidden_layers=1)
    mine = layout_of(qn.init_state(params.config, BATCH, 290, draft=1), 2)
    theirs = layout_of(qn.init_state(params.config, 2, 1000, draft=draft, pages=31), 2)
    assert mine.entries == theirs.entries and mine.nbytes == theirs.nbytes
    without = layout_of(qn.init_state(params.config, BATCH, 290), 2)
    assert without.entries == tuple(e for e in mine.entries if not e.path.startswith("mtp"))


def test_a_bit_that_differs_is_seen() -> None:
    state = started(model())
    layout = layout_of(state, 2)
    memory = region(layout)
    written(state, 4, state.block_table[4, :2], layout, memory)
    before = checksums(layout.entries, memory)
    assert list(before) == [entry.path for entry in layout.entries]
    for entry in layout.entries:
        for place in (entry.begin, entry.end - 1):
            memory[place] ^= 1
            after = checksums(layout.entries, memory)
            assert [path for path in before if after[path] != before[path]] == [entry.path]
            memory[place] ^= 1


@pytest.mark.parametrize("nbytes", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 77])
def test_a_copy_is_summed_as_it_is_made(nbytes: int) -> None:
    source = torch.arange(nbytes, dtype=torch.int64).mul(7919).to(torch.uint8)
    into = torch.zeros_like(source)
    assert copy_summed(into, source) == checksum(source) and into.equal(source)


def test_ranges_that_follow_one_another_are_one() -> None:
    assert together([(128, 64), (0, 100), (300, 5), (192, 8)]) == [(0, 200), (300, 5)]
    assert together([]) == []
