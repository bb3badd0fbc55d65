"""Calls that groups of ranks agree on: which is next, and what becomes of another's shape."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qnext.functional.sampling import Sampling, knobs
from qnext.functional.state import State, init_state, select, view, widen
from qnext.functional.tree import leaves, map_leaves
from qnext.runtime.rounds import NOTHING, OVER, Form, Rounds, chosen, form_of
from tests.runtime.engines import params, steps

DRAFT = 1


NEXT, READ = Form("next", 2, 1), Form("consume", 1, 16)


@pytest.mark.parametrize(
    ("wanted", "agreed"),
    [
        ([(NOTHING, 0), (NOTHING, 0)], NOTHING),
        ([(OVER, 0), (NOTHING, 0)], NOTHING),
        ([(OVER, 0), (OVER, 0)], OVER),
        ([(OVER, 0), (NEXT, 0)], NEXT),
        ([(NEXT, 0), (Form("next", 4, 1), 0), (NOTHING, 0)], Form("next", 4, 1)),
        ([(NEXT, 0), (READ, 0)], READ),
        ([(NEXT, 0), (READ, 0), (Form("next", 1, 1), 0)], NEXT),
        ([(NEXT, 0), (READ, 1), (Form("next", 1, 1), 0)], READ),  # who lost a round is next
        ([(Form("consume", 1, 48), 0), (Form("consume", 2, 32), 0)], Form("consume", 2, 32)),
        ([(Form("consume", 1, 48), 1), (Form("consume", 2, 32), 0)], Form("consume", 1, 48)),
    ],
)
def test_what_is_called_next(wanted: list[tuple[Form, int]], agreed: Form) -> None:
    assert chosen(wanted) == agreed
    assert chosen(wanted[::-1]) == agreed


def test_nobody_waits_for_long() -> None:
    """Three groups that want other calls again and again: each has its turn in three rounds."""
    forms = [NEXT, READ, Form("consume", 2, 8)]
    waited, turns = [0, 0, 0], list[Form]()
    for _ in range(12):
        agreed = chosen(list(zip(forms, waited, strict=True)))
        turns.append(agreed)
        waited = [0 if agreed.takes(f) else w + 1 for f, w in zip(forms, waited, strict=True)]
        assert max(waited) < 3
    assert set(turns) == set(forms)


def test_forms() -> None:
    tokens = torch.zeros(3, dtype=torch.int64)
    assert form_of("decode", (tokens,)) == form_of("next", (tokens,)) == Form("next", 3, 1)
    line = torch.zeros(2, 16, dtype=torch.int64)
    assert form_of("score", (line, tokens)) == Form("consume", 2, 16)
    assert form_of("ahead", (tokens, 2, line)) == Form("ahead", 3, 2)
    assert Form("consume", 2, 32).takes(Form("consume", 2, 16))
    assert not Form("consume", 2, 32).takes(Form("consume", 1, 48))
    assert not Form("consume", 2, 32).takes(Form("next", 1, 1))


class Told(Rounds):
    """Rounds whose outcome is known beforehand."""

    def __init__(self, *agreed: Form) -> None:
        self.agreed = list(agreed)

    def agree(self, wanted: Form, waited: int = 0) -> Form:
        return self.agreed.pop(0)


def used() -> State:
    """A state of three sequences that have read some tokens."""
    made = init_state(params().config, 3, 300, draft=DRAFT)
    line = torch.randint(90, (3, 16), generator=torch.Generator().manual_seed(1))
    return steps(DRAFT).run("consume", made, line, torch.tensor([9, 16, 4], dtype=torch.int32))[-1]


def calls() -> dict[str, tuple[Any, ...]]:
    tokens, ends = torch.tensor([5, 7]), torch.full((2, 4), -2)
    line = torch.tensor([[5, 6], [7, 8]])
    prompt = torch.randint(90, (2, 16), generator=torch.Generator().manual_seed(2))
    settings = knobs([Sampling(temperature=0.8, seed=3), Sampling(temperature=0.0)])
    return {
        "consume": (prompt, torch.tensor([16, 3], dtype=torch.int32)),
        "score": (prompt, torch.tensor([16, 3], dtype=torch.int32)),
        "guess": (tokens, DRAFT, settings),
        "verify": (line,),
        "ahead": (tokens, DRAFT, ends),
    }


LARGER = {"consume": Form("consume", 3, 32), "score": Form("consume", 3, 32)}


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("others", [False, True])
def test_a_call_that_others_share(name: str, others: bool) -> None:
    """Larger than it need be, and after others' calls: the same results, to roundings, and nobody
    else's sequence is touched."""
    rest, made = calls()[name], steps(DRAFT)
    form = form_of(name, rest)
    larger = LARGER.get(name, form._replace(batch=3))
    before = [Form("ahead", 3, DRAFT), Form("consume", 1, 16)] if others else []
    index = torch.tensor([2, 0])
    want = made.run(name, view(used(), index), *rest)
    got = Told(*before, larger).call(made.run, name, view(used(), index), rest)
    for ours, theirs in zip(got[:-1], want[:-1], strict=True):
        assert ours.shape == theirs.shape
        close(ours, theirs)
    for ours, theirs in zip(tables(got[-1]), tables(want[-1]), strict=True):
        assert torch.equal(ours, theirs)
    untouched = [select(widened(each[-1]), [1]) for each in (got, want)]
    for ours, theirs in zip(*map(leaves, untouched), strict=True):
        close(ours, theirs)


def close(ours: Tensor, theirs: Tensor) -> None:
    if ours.is_floating_point():
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(ours, theirs)


def tables(state: State) -> list[Tensor]:
    return leaves(state._replace(layers=(), mtp=()))


def widened(state: State) -> State:
    """All three sequences of a state that has the tables of two."""
    whole = used()
    return whole._replace(layers=state.layers, mtp=state.mtp)


def test_a_group_without_work_attends() -> None:
    """What it holds is as before; pools are those of the call."""
    made, state = steps(DRAFT), used()
    kept = map_leaves(torch.clone, select(state, [0, 1, 2]))
    for form in (Form("ahead", 3, DRAFT), Form("consume", 2, 16), Form("verify", 1, DRAFT + 1)):
        called, state = Told(form).attend(made.run, state, over=False)
        assert called == form
    for ours, theirs in zip(leaves(select(state, [0, 1, 2])), leaves(kept), strict=True):
        assert torch.equal(ours, theirs)
    assert Told(NOTHING).attend(made.run, state, over=False) == (NOTHING, state)
    assert Told(OVER).attend(made.run, state, over=True)[0] == OVER


def test_rows_that_rest_are_scratch() -> None:
    idle = widen(view(used(), torch.zeros(0, dtype=torch.long)), 3)
    assert idle.batch == 3
    assert not any(bool(t.any()) for t in (idle.block_table, idle.slots, idle.rows, idle.lengths))
