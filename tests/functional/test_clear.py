"""Rows of a state made empty again: what a server does before another sequence moves in."""

from typing import Any

import pytest
import torch

import qnext as qn
from qnext.functional.state import Delta
from tests.sequences import BATCH, check_memory, content, started, words

ROWS = [3, 1]
OTHERS = [row for row in range(BATCH) if row not in ROWS]


@pytest.fixture(scope="module")
def params(checkpoints: Any) -> qn.Params:
    return checkpoints("base")[2]


def poisoned(state: qn.State) -> qn.State:
    """NaN wherever the rows to be cleared have left anything."""

    def spoil(part: Any) -> Any:
        tables = (state.slots, state.rows) if isinstance(part, Delta) else (state.block_table,) * 2
        return type(part)(
            *(
                pool.index_fill(0, table[ROWS].flatten().long(), torch.nan)
                for pool, table in zip(part, tables, strict=True)
            )
        )

    return state._replace(layers=tuple(map(spoil, state.layers)))


@pytest.mark.parametrize("draft", [0, 2])
def test_cleared_rows_are_those_of_a_fresh_state(params: qn.Params, draft: int) -> None:
    state = poisoned(started(params, draft))
    cleared = qn.clear(state, ROWS)
    assert cleared.lengths[ROWS].tolist() == [0, 0] == cleared.accepted[ROWS].tolist()
    fresh = qn.init_state(params.config, BATCH, 290, draft=draft)
    fresh = qn.forward(params, fresh, words(130, seed=5), torch.tensor([31, 0, 0, 0, 2]))[1]
    tokens, lengths = words(6), torch.tensor([0, 6, 0, 2, 0])
    got, after = qn.forward(params, cleared, tokens, lengths)
    want, alone = qn.forward(params, fresh, tokens, lengths)
    for row in ROWS:
        count = int(lengths[row])
        assert torch.equal(got[row, :count], want[row, :count])
        check_memory(content(params, after, row), content(params, alone, row))


def test_other_rows_keep_every_bit(params: qn.Params) -> None:
    state = started(params, 2)
    cleared = qn.clear(state, torch.tensor(ROWS))
    for row in OTHERS:
        check_memory(content(params, cleared, row), content(params, state, row))


def test_clearing_is_in_place_where_donated(params: qn.Params) -> None:
    """On an NPU a copy of a pool to empty two rows would be absurd."""
    state = qn.init_state(params.config, 40, 150, device="meta")
    rows = torch.zeros(2, dtype=torch.int64, device="meta")
    lowered = qn.jit(qn.clear, donate="state").trace(state, rows).lower("npu:910b")
    kinds = {write.verdict for write in lowered.writes}
    assert kinds == {"in place"} and "rows_put" in lowered.report()
    pools = sum(leaf.nbytes for part in state.layers for leaf in part)
    assert lowered.cost_analysis()["bytes"] < pools / 4  # of two rows in forty, read and written


@pytest.mark.parametrize("rows", [[], [5], [-1], torch.tensor([7])])
def test_rows_that_are_none_are_named(params: qn.Params, rows: Any) -> None:
    with pytest.raises(qn.InputError, match=r"rows must list indices within 0\.\.4, got "):
        qn.clear(started(params), rows)
