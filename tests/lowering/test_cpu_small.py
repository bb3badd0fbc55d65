"""Operations on little data: each form that steps have, against torch's own; and what is declined.

A case is a function of tensors in torch's operations. Lowered, nothing of it is left to torch, and
results are equal: these kernels compute with integers, or copy.
"""

import operator
from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.speculate import verify_line
from qnext.functional.tree import leaves, map_leaves
from qnext.lowering.compiled import Compiled
from qnext.lowering.cpu import build
from qnext.lowering.cpu.small import DIVISIONS, MOST, NAMES
from qnext.lowering.cpu.step import Step
from qnext.runtime.steps import consume, draw_ahead, draw_next, guess, score
from tests.sequences import BATCH, VOCAB, model, started, words

pytestmark = pytest.mark.skipif(not build.compiler_here(), reason="no compiler for the kernels")
BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
NAN, INF = torch.nan, torch.inf
Case = tuple[Callable[..., Any], tuple[Tensor, ...]]


def whole(*shape: int, dtype: torch.dtype = I32, seed: int = 0, low: int = -9) -> Tensor:
    some = torch.Generator().manual_seed(seed)
    return torch.randint(low, 10, shape, generator=some).to(dtype)


def real(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def places(most: int, *shape: int, dtype: torch.dtype = I64, seed: int = 0) -> Tensor:
    some = torch.Generator().manual_seed(seed)
    return torch.randint(0, most, shape, generator=some).to(dtype)


def lower(function: Callable[..., Any], given: tuple[Tensor, ...]) -> Compiled:
    return qn.jit(function).trace(*given).lower("cpu").compile()


def by_torch(step: Compiled) -> list[str]:
    """The operations of a step that are left to torch."""
    targets = [call.target for call in step.parts.graph.calls]
    others = [each for each in targets if each is not getitem and not isinstance(each, Step)]
    assert all(isinstance(each, torch._ops.OpOverload) for each in others)
    return [each._schema.name.rpartition("::")[2] for each in others if not each.is_view]


def flat(made: Any) -> list[Tensor]:
    return leaves(made)


LOGICAL = {name for name, ours in NAMES.items() if ours in ("and", "or")}


def operate(name: str, a: Any, b: Any) -> Any:
    """One of torch's functions, or of Python's operators."""
    found = getattr(operator, name) if name.startswith("__") else getattr(torch, name)
    return found(a, b)


PAIRS = {
    "alike": (whole(3, 7), whole(3, 7, seed=1, low=1)),
    "dtypes": (whole(3, 7), whole(3, 7, dtype=I64, seed=1, low=1)),
    "axes": (whole(3, 1), whole(2, 1, 7, seed=1, low=1)),
    "number": (whole(3, 7, dtype=I64), torch.tensor(4)),
    "view": (whole(7, 3).t(), whole(3, 9, seed=1, low=1)[:, ::2].narrow(1, 0, 5)[:, :1]),
}


@pytest.mark.parametrize("name", NAMES)
def test_operations_on_pairs(name: str) -> None:
    """Quotients are torch's own where they are not by a number: it knows what is none."""
    for a, b in PAIRS.values():
        if name in DIVISIONS:
            b = torch.tensor(3)
            assert by_torch(lower(lambda a, b: operate(name, a, b), (a, b))) == [name]
            continue
        if name in LOGICAL:
            a, b = a > 0, b > 4
        step = lower(lambda a, b: operate(name, a, b), (a, b))
        want = operate(name, a, b)
        got = step(a, b)
        assert by_torch(step) == [] and got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("name", ["floor_divide", "remainder", "add", "sub", "mul", "lt", "eq"])
def test_operations_with_a_number(name: str) -> None:
    """Quotients and remainders are rounded down, as torch rounds them, for negative numbers too."""
    for number in (3, -3, 1 << 20):
        for x in (whole(5, 3), whole(5, 3, dtype=I64) * (1 << 33)):
            step = lower(lambda x, n=number: operate(name, x, n), (x,))
            want = operate(name, x, number)
            got = step(x)
            assert by_torch(step) == [] and got.dtype == want.dtype and torch.equal(got, want)


def indexed(pool: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return pool.index_put((index,), values)


CASES: dict[str, Case] = {
    "add with a factor": (lambda a, b: torch.add(a, b, alpha=128), (whole(3, 1), whole(3, 7))),
    "sub with a factor": (lambda a, b: torch.sub(a, b, alpha=-5), (whole(3, 1), whole(7))),
    "clamp": (lambda x: (x.clamp(min=0), x.clamp(-3, 5), x.clamp(max=2)), (whole(3, 7),)),
    "not": (lambda c, x: (~c, c.logical_not(), x.logical_not()), (whole(3) > 0, whole(3, 7))),
    "where a number": (
        lambda c, x: (x.where(c, 0), torch.where(c, x, -1), torch.where(c, 5, x)),
        (whole(3, 7) > 0, whole(3, 1, dtype=I64)),
    ),
    "where tensors": (
        lambda c, x, y: torch.where(c, x, y),
        (whole(3, 1) > 0, whole(7), whole(2, 3, 7, seed=1)),
    ),
    "where bools": (
        lambda c, x, y: torch.where(c, x, y),
        (whole(3, 7) > 0, whole(3, 7, seed=1) > 0, whole(3, 7, seed=2) > 0),
    ),
    "to": (lambda x, c: (x.to(I64), x.bool(), c.to(I32), c.long()), (whole(3, 7), whole(5) > 0)),
    "to fewer bits": (lambda x: x.to(I32), (whole(3, 7, dtype=I64) * ((1 << 31) + 7),)),
    "sum": (lambda x: (x.sum(0), x.sum(-1), x.sum(1, dtype=I32)), (whole(3, 7, 2),)),
    "sum of bools": (lambda c: (c.sum(1), c.sum(0, dtype=I32)), (whole(3, 7) > 0,)),
    "cumsum": (lambda x: (x.cumsum(0), x.cumsum(-1), x.cumsum(1)), (whole(3, 7, 2),)),
    "cumsum of a view": (lambda x: x.t().cumsum(0), (whole(3, 7),)),
    "argmax": (lambda x: x.argmax(-1), (real(2, 3, 70),)),
    "argmax of a row": (lambda x: x.argmax(0), (real(70, dtype=BF16),)),
    "finite": (
        lambda x: x.isfinite().all(-1),
        (torch.tensor([[1.0, 2, 3], [NAN, 0, 0], [0, 0, -INF], [0, 1e38, 0]]),),
    ),
    "clone": (lambda x, y: (x.t().clone(), y.clone()), (real(3, 7, dtype=BF16), whole(5))),
    "flatten": (lambda x: x[:, None].expand(5, 3, 7).flatten(), (real(5, 7),)),
    "cat": (
        lambda a, b: (torch.cat([a, b]), torch.cat([a.t(), b.t()], 1), torch.cat([a, b, a], -2)),
        (whole(2, 3, dtype=I64), whole(5, 3, dtype=I64, seed=1)),
    ),
    "cat of long rows": (
        lambda a, b: torch.cat([a, b], dim=-1),
        (real(2, 9, 3000), real(2, 9, 1234, seed=1)),
    ),
    "cat of bfloat16": (
        lambda a, b: torch.cat([a, b], dim=1),
        (real(5, 3, 7, dtype=BF16), real(5, 1, 7, dtype=BF16, seed=1)),
    ),
    "stack": (
        lambda a, b: (torch.stack([a, b], 1), torch.stack([b]), torch.stack([a, b, a], -1)),
        (whole(3, dtype=I64), whole(3, dtype=I64, seed=1)),
    ),
    "embedding": (torch.nn.functional.embedding, (places(11, 3, 7), real(11, 5))),
    "embedding, transposed": (
        lambda i, w: torch.nn.functional.embedding(i.t(), w.t()),
        (places(5, 3, 7), real(11, 5, dtype=BF16)),
    ),
    "index_select": (lambda x, i: x.index_select(0, i), (real(11, 5), places(11, 3, dtype=I32))),
    "gather": (lambda x, i: x.gather(1, i), (whole(3, 11), places(11, 3, 7))),
    "gather a part": (lambda x, i: x.gather(0, i), (real(11, 7), places(11, 3, 5))),
    "take_along_dim": (
        lambda x, i: x.take_along_dim(i, dim=1),
        (real(3, 11, 600), places(11, 3, 4, 1)),
    ),
    "take_along_dim, transposed": (
        lambda x, i: x.mT.take_along_dim(i.mT, dim=1),
        (real(3, 7, 11), places(11, 3, 1, 4)),
    ),
    "take_along_dim of the last": (
        lambda x, i: x.take_along_dim(i, dim=-1),
        (whole(3, 5, 11), places(11, 3, 1, 4)),
    ),
    "index_put": (indexed, (real(7, 3, 5), torch.tensor([6, 0, 2]), real(3, 3, 5, seed=1))),
    "index_put a row": (indexed, (whole(7, 3), torch.tensor([4]), whole(1, 3, seed=1))),
}


@pytest.mark.parametrize("case", CASES)
def test_forms(case: str) -> None:
    function, given = CASES[case]
    step, kept = lower(function, given), map_leaves(torch.clone, given)
    for _ in range(2):
        for got, want in zip(flat(step(*given)), flat(function(*given)), strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)
    assert by_torch(step) == []
    for now, before in zip(given, kept, strict=True):  # arguments are as they were
        assert torch.equal(now.nan_to_num(), before.nan_to_num())


def test_the_first_of_the_greatest_is_the_largest() -> None:
    rows = [[1, 5, 5, 2], [-INF, -INF, -INF, -INF], [NAN, 9, NAN, 1], [1, INF, NAN, NAN]]
    x = torch.tensor(rows)
    step = lower(lambda x: x.argmax(-1), (x,))
    assert step(x).tolist() == x.argmax(-1).tolist() == [1, 0, 0, 2]
    for dtype in (torch.float32, BF16):  # rows of more numbers than a vector has
        x = real(200, 77).to(dtype).round(decimals=1)
        x[::3, 50:] = 4.0
        x[::5, ::19] = NAN
        step = lower(lambda x: x.argmax(-1), (x,))
        assert step(x).tolist() == x.argmax(-1).tolist()


def test_a_donated_pool_is_written_where_it_is() -> None:
    pool, index, values = CASES["index_put"][1]
    given = (pool.clone(), index, values)
    step = qn.jit(indexed, donate="pool").trace(*given).lower("cpu").compile()
    made = step(*given)
    assert made.data_ptr() == given[0].data_ptr() and by_torch(step) == []
    assert torch.equal(made, indexed(pool, index, values))


DECLINED: dict[str, Case] = {
    "floats": (lambda a, b: a[:, :1] - b, (real(3, 7), real(3, 7, seed=1))),
    "more than a few": (lambda x: x * 3, (whole(MOST + 1, low=0),)),
    "bits": (lambda x: ~x, (whole(5),)),
    "a quotient of floats": (lambda x: x / 3, (whole(5),)),
    "a bool as a number": (lambda c: (c * 3) + (c == 2), (whole(5) > 0,)),
    "a number of 64 bits": (lambda x: x < (1 << 40), (whole(5),)),
    "a quotient by -1": (lambda x: x // -1, (whole(5),)),
    "a real number": (lambda x: x * 1.5, (whole(5),)),
    "a choice of floats": (lambda c, x: x.where(c, 0.5), (whole(3, 7) > 0, real(3, 7))),
    "a sum of floats": (lambda x: x.sum(1), (real(3, 7),)),
    "a sum over two axes": (lambda x: x.sum((0, 1)), (whole(3, 7),)),
    "a sum that keeps its axis": (lambda x: x.sum(1, keepdim=True), (whole(3, 7),)),
    "the largest of all": (lambda x: x.argmax(), (real(3, 7),)),
    "the largest of columns": (lambda x: x.argmax(0), (real(3, 7),)),
    "the largest of integers": (lambda x: x.argmax(-1), (whole(3, 7),)),
    "float64": (lambda a, b: torch.cat([a, b]), (real(2, 3).double(), real(1, 3).double())),
    "two dtypes": (lambda a, b: torch.cat([a, b]), (whole(2), whole(3, dtype=I64))),
    "rows of three axes": (lambda x, i: x.index_select(0, i), (real(7, 3, 5), places(7, 4))),
    "columns": (lambda x, i: x.index_select(1, i), (real(7, 3), places(3, 4))),
    "two indices": (lambda x, i: x.index_put((i, i), x[0, :2]), (real(3, 7), places(3, 2))),
    "values for all": (lambda x, i: x.index_put((i,), x[0]), (real(7, 3), places(7, 2))),
    "added up": (
        lambda x, i, v: x.index_put((i,), v, accumulate=True),
        (real(7, 3), places(7, 2), real(2, 3)),
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_is_declined_is_left_to_torch(case: str) -> None:
    function, given = DECLINED[case]
    step = lower(function, given)
    assert by_torch(step) != []
    assert torch.equal(step(*given), function(*given))


# ---- indices out of range


@pytest.mark.parametrize("case", ["embedding", "index_select", "gather", "take_along_dim"])
@pytest.mark.parametrize("wrong", [-1, 11])
def test_an_index_out_of_range_is_an_error(case: str, wrong: int) -> None:
    function, given = CASES[case]
    at = next(i for i, t in enumerate(given) if t.dtype in (I32, I64) and t.numel() < 30)
    step, bad = lower(function, given), [t.clone() for t in given]
    bad[at].view(-1)[-1] = wrong
    with pytest.raises(qn.InputError, match="an index is out of range"):
        step(*bad)
    assert torch.equal(step(*given), function(*given))


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_outside_of_the_vocabulary_leaves_the_state_as_it_was(token: int) -> None:
    params, state, tokens = model(), started(model()), words(1)[:, 0]
    step = qn.jit(qn.decode, donate="state").trace(params, state, tokens).lower("cpu").compile()
    before, want = map_leaves(torch.clone, state), qn.decode(params, state, tokens)[0]
    bad = tokens.clone()
    bad[3] = token
    with pytest.raises(qn.InputError, match="A token's id must be within the vocabulary"):
        step(params, state, bad)
    assert all(map(torch.equal, leaves(state), leaves(before)))
    logits, _ = step(params, state, tokens)
    assert torch.allclose(logits, want, atol=1e-4)


# ---- whole steps


@pytest.mark.slow
def test_the_engines_steps_are_one_program_each() -> None:
    """Nothing between arguments and results is torch's: no Python, whatever the number of rows."""
    params, tokens = model(mtp_num_hidden_layers=1), words(1)[:, 0]
    plain, drafted = started(params), started(params, draft=2)
    counts = torch.ones(BATCH, dtype=I32)
    steps: dict[Callable[..., Any], tuple[Any, ...]] = {
        qn.advance: (params, drafted, tokens),
        consume: (params, plain, words(7), counts),
        score: (params, plain, words(7), counts),
        guess: (params, drafted, tokens, 2, None),
        verify_line: (params, drafted, words(3)),
        draw_next: (params, plain, tokens),
        draw_ahead: (params, drafted, tokens, 2, words(4)),
        qn.commit: (qn.verify(params, drafted, words(3))[1], counts),
    }
    for function, given in steps.items():
        step = qn.jit(function, donate="state").trace(*given).lower("cpu", strict=True).compile()
        programs = [call for call in step.parts.graph.calls if isinstance(call.target, Step)]
        assert (by_torch(step), len(programs)) == ([], 1), function.__name__
