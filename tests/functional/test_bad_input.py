"""Bad arguments: an error that names the thing, the rule and what would be right, and no work done.

The table of tests/bad_calls.py is tried here, where jaxtyping's hook checks annotations as well,
and in a process without the hook. What an annotation refuses (`typed`) is tried in the second only.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

import qnext as qn
import tests.bad_calls  # noqa: F401  (fills CASES)
from qnext.functional.sampling import records
from tests.calls import CASES, Outcome, attempt, attempts, world


def check(name: str, outcome: Outcome) -> None:
    case = CASES[name]
    assert outcome.error == case.error.__name__, outcome.text
    assert re.search(case.says, outcome.text), outcome.text
    assert outcome.computed == []
    assert not outcome.changed


HERE = [name for name, case in CASES.items() if not case.typed]


@pytest.mark.parametrize("name", HERE)
def test_bad_call(name: str) -> None:
    check(name, attempt(CASES[name].make))


@pytest.fixture(scope="module")
def plain() -> dict[str, Outcome]:
    """What every case does in a process without pytest and hook."""
    code = "import json, tests.bad_calls, tests.calls as c; print(json.dumps(c.attempts()))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return {name: Outcome(*outcome) for name, outcome in json.loads(run.stdout).items()}


@pytest.mark.parametrize("name", CASES)
def test_bad_call_without_the_hook(name: str, plain: dict[str, Outcome]) -> None:
    check(name, plain[name])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.typed])
def test_typed_cases_are_those_that_the_hook_refuses(name: str) -> None:
    assert attempt(CASES[name].make).error == TypeCheckError.__name__


def test_bad_calls_are_noticed() -> None:
    """`check` can fail: a good call computes, and a call that changes its arguments is seen."""
    w = world()
    good = attempt(lambda w: lambda: qn.forward(w.params, w.state, w.tokens[:, :2]))
    assert good.error == "" and len(good.computed) > 20 and not good.changed

    def hurt() -> None:
        w.state.lengths.add_(1)

    assert attempt(lambda w: hurt).changed
    w.state.lengths.sub_(1)
    assert len(attempts()) == len(CASES) > 200


@pytest.mark.parametrize("row", [0, 1])
def test_one_wrong_sampling_record_among_right_ones(row: int) -> None:
    mixed: list[Any] = [qn.Sampling(), qn.Sampling()]
    mixed[row] = None
    with pytest.raises(qn.InputError, match="one for each of the 2 rows"):
        records(mixed, 2)


def test_errors_are_value_errors() -> None:
    assert issubclass(qn.CapacityError, qn.InputError)
    for error in (qn.InputError, qn.ConfigError, qn.CheckpointError):
        assert issubclass(error, qn.QnextError) and issubclass(error, ValueError)


# --- capacity, exactly -------------------------------------------------------------------------


@pytest.mark.parametrize("room", [1, 5, 127, 128, 129, 300])
def test_capacity_is_exact(room: int) -> None:
    params, whole = world().params, torch.arange(2 * (room + 1)).view(2, -1) % 211
    empty = qn.init_state(params.config, 2, room)
    assert empty.block_table.shape == (2, -(-room // 128))
    beyond = f"row 0 holds 0 tokens and would hold {room + 1}, but its capacity is {room}"
    for function in (qn.forward, qn.prefill):
        with pytest.raises(qn.CapacityError, match=beyond):
            function(params, empty, whole)
    logits, full = qn.forward(params, empty, whole[:, :room])
    assert logits.isfinite().all() and full.lengths.tolist() == [room, room]
    last, _ = qn.prefill(params, empty, whole[:, :room])
    torch.testing.assert_close(last, logits[:, -1], rtol=1e-5, atol=1e-5)
    for need, call in (
        (room + 1, lambda: qn.decode(params, full, whole[:, 0])),
        (room + 1, lambda: qn.forward(params, full, whole[:, :1])),
        (room + 2, lambda: qn.generate(params, full, whole[:, :1], 1)),
    ):
        says = f"holds {room} tokens and would hold {need}.*batch=2, capacity={need}"
        with pytest.raises(qn.CapacityError, match=says):
            call()
    assert full.lengths.tolist() == [room, room]


@pytest.mark.parametrize("room", [5, 128, 129])
def test_capacity_counts_what_generate_returns(room: int) -> None:
    params, prompt = world().params, torch.arange(2 * (room - 2)).view(2, -1) % 211
    empty = qn.init_state(params.config, 2, room)
    new, state = qn.generate(params, empty, prompt, 2)
    assert new.shape == (2, 2) and state.lengths.tolist() == [room, room]
    with pytest.raises(
        qn.CapacityError, match=f"would hold {room + 1}, but its capacity is {room}"
    ):
        qn.generate(params, empty, prompt, 3)
    short = torch.tensor([1, room - 2])
    with pytest.raises(qn.CapacityError, match=f"row 1 .* would hold {room + 1}"):
        qn.generate(params, empty, prompt, 3, short)


def test_each_row_has_its_own_room() -> None:
    params, tokens = world().params, torch.arange(10).view(2, 5)
    _, state = qn.forward(params, qn.init_state(params.config, 2, 5), tokens, torch.tensor([5, 1]))
    _, full = qn.forward(params, state, tokens, torch.tensor([0, 4]))
    assert full.lengths.tolist() == [5, 5]
    with pytest.raises(qn.CapacityError, match="row 0 holds 5 tokens and would hold 6"):
        qn.forward(params, state, tokens, torch.tensor([1, 4]))
    with pytest.raises(qn.CapacityError, match="row 1 holds 1 tokens and would hold 6"):
        qn.forward(params, state, tokens, torch.tensor([0, 5]))


def test_padding_may_hold_anything() -> None:
    params, lengths = world().params, torch.tensor([2, 1])
    tokens = torch.tensor([[3, 4, -1], [5, 10**6, -(2**40)]])
    state = qn.init_state(params.config, 2, 5)
    got = qn.prefill(params, state, tokens, lengths)[0]
    want = qn.prefill(params, state, tokens.clamp(0, 210), lengths)[0]
    assert got.equal(want)
