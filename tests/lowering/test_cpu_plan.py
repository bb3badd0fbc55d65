"""Plans: a list of calls computes what its graph does, and holds nothing for longer than that."""

import gc
import operator
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.fx import symbolic_trace

from qnext.lowering.cpu.plan import Call, Plan, Value, planned


class Everything(torch.nn.Module):
    """Arguments in lists and slices, by name, a program's call, and a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 5)
        self.register_buffer("offset", torch.tensor([[1.0], [2.0]]))

    def forward(self, x: Tensor, unread: Tensor, at: Tensor) -> Any:
        both = torch.cat([x, x + 1], dim=0)
        part = operator.getitem(both, (slice(at, None), slice(0, 3)))
        return self.inner(part), (torch.add(part, self.offset, alpha=2), unread), part


def test_a_plan_computes_what_its_graph_does() -> None:
    module = symbolic_trace(Everything())
    plan = planned(module)
    given = (torch.arange(6.0).view(2, 3), torch.ones(4), torch.tensor(2))
    mine, (sums, unread), part = plan(*given)
    wanted, (other_sums, _), other_part = module(*given)
    assert torch.equal(mine, wanted) and mine.shape == (2, 5)
    assert torch.equal(sums, other_sums) and torch.equal(part, other_part)
    assert unread is given[1]


def test_inputs_that_are_asked_for() -> None:
    def third(x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> Any:
        return torch.cat([z, z]), w

    assert planned(symbolic_trace(third)).inputs_used == [2, 3]


def test_memory_is_given_back_once_nothing_asks_for_it() -> None:
    """As many of the values made so far are there as a later call, or the result, asks for."""
    made: list[ref[Tensor]] = []
    alive: list[list[int]] = []

    def step(*given: Tensor, more: Any = ()) -> Tensor:
        alive.append([i for i, each in enumerate(made) if each() is not None])
        result = torch.ones(2)
        made.append(ref(result))
        return result

    graph = torch.fx.Graph()
    a = graph.placeholder("a")
    b = graph.call_function(step, (a,))
    c = graph.call_function(step, (b,))
    graph.call_function(step, (b, c))  # which nobody reads
    d = graph.call_function(step, (), {"more": [c]})
    graph.output((graph.call_function(step, (d,)), c))
    gc.disable()
    try:
        results = planned(torch.fx.GraphModule(torch.nn.Module(), graph))(torch.ones(1))
    finally:
        gc.enable()
    assert alive == [[], [0], [0, 1], [1], [1, 3]]
    assert results[1] is made[1]()


def test_a_plan_made_by_hand_reads_as_one() -> None:
    call = Call(torch.add, (Value(0), 2), {"alpha": 3}, (0,))
    assert Plan(1, (call,), [Value(1)])(torch.ones(2))[0].tolist() == [7, 7]
