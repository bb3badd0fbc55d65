"""Programs: the kernels of a step run together, and torch stands before, between or after them."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from qnext.functional import ops
from qnext.functional.ops.quant import OVER
from qnext.functional.tree import leaves
from qnext.lowering.compiled import Compiled
from tests.lowering.test_cpu_steps import compiled, needs_a_compiler, poison, programs

pytestmark = needs_a_compiler


@pytest.fixture(autouse=True)
def poisoned_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


WIDE, NARROW = torch.randn(24, 40), torch.randn(40, 24)


def near(function: Callable[..., Any], *given: Any, count: int, weights: str = "a") -> Compiled:
    """The step of a function of tensors, in so many programs, with the function's own results."""
    step = compiled(function, *given, weights=weights)
    assert len(programs(step)) == count
    for got, want in zip(leaves(step(*given)), leaves(function(*given)), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    return step


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 40)


def test_what_does_not_wait_goes_before(x: Tensor) -> None:
    def step(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        first = linear(x, a)
        other = x[:, :24].cumsum(0)  # reads nothing that a kernel made
        return linear(other + first, b)

    made = near(step, WIDE, NARROW, x, count=1)
    targets = [call.target for call in made.parts.graph.calls]
    (program,) = programs(made)
    assert targets.index(torch.ops.aten.cumsum.default) < targets.index(program)


def test_what_waits_stands_between_two(x: Tensor) -> None:
    def step(a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        first = linear(x, a)
        return linear(first.cumsum(0), b), first + first

    near(step, WIDE, NARROW, x, count=2)


def test_views_of_results_and_results_twice(x: Tensor) -> None:
    def step(a: Tensor, b: Tensor, x: Tensor) -> Any:
        first = linear(x, a)
        view = first.view(7, 6, 4)[2:].transpose(1, 2)
        second = linear(first[1:3], b)  # read within the program as well
        return {"view": view, "row": first[3], "twice": (second, second), "whole": first}

    near(step, WIDE, NARROW, x, count=1)


def test_views_within_a_program(x: Tensor) -> None:
    """Results cut, turned and cut again are read where they lie."""

    def step(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        q, gate, rest = linear(x, a).split([10, 10, 4], dim=-1)
        return linear(x, b.mT[:, :40]) + (silu(gate) * q).repeat(1, 3)[:, :24] * rest.mT[0, 0]

    near(step, WIDE, NARROW, x, count=1 + 1)


def test_one_of_several_results(x: Tensor) -> None:
    def step(a: Tensor, x: Tensor) -> Tensor:
        _, scale = ops.quantize_tokens(x=linear(x, a), rounding=OVER)
        return scale

    near(step, WIDE, x, count=1)


def test_inputs_returned_as_they_came(x: Tensor) -> None:
    def step(a: Tensor, x: Tensor, pool: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return pool, linear(x, a), pool[1:]

    pool = torch.randn(3, 5)
    got = near(step, WIDE, x, pool, count=1)(WIDE, x, pool)
    assert torch.equal(got[0], pool) and got[0].data_ptr() == pool.data_ptr()


def test_memory_is_shared_only_by_what_does_not_meet() -> None:
    """Results of many sizes, of which the first two are read at the end, and a workspace.

    The arena is a fraction of what was made, and nothing in it was overwritten too early.
    """
    sizes = [40, 18, 24, 56, 8, 72, 16, 88, 24, 48, 8, 64, 32, 18]
    weights = [torch.randn(n, m) / m**0.5 for m, n in pairwise(sizes)]
    experts = [torch.randn(5, 28, 18) / 4, torch.randn(5, 18, 14) / 4]

    def step(a: Any, x: Tensor, expert: Tensor) -> Tensor:
        layers, (gate_up, down) = a
        made = [x]
        for layer in layers:
            made.append(linear(made[-1], layer))
        early, second = made[1], made[2].view(7, 8, 3)[:, 5, 1:]
        mixed = ops.experts(x=early, expert=expert, weight=second, gate_up=gate_up, down=down)
        return made[-1] + mixed + early

    x, expert = torch.randn(7, 40), torch.tensor([[0, 2], [3, 1], [4, 0], [1, 2]]).repeat(2, 1)[:7]
    (program,) = programs(near(step, (weights, experts), x, expert, count=1))
    assert 0 < program._arena < 4 * 7 * sum(sizes) / 2
