"""A program in a graph, and a graph that is one program: what is done between two steps in Python.

A step of a large model reads far more than the caches hold, so all that Python touches between two
comes from memory anew: what takes 30 us where it is hot takes 200 here. Hence little is done, and
most of it before the kernels run.
"""

from collections.abc import Sequence
from operator import getitem, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qnext.lowering.cpu.library import ADDRESS, Addresses, Instruction, Program, load


KEPT = 1 << 20  # bytes of an arena that stays for the next step


class Frame(NamedTuple):
    """All that a program is, as data: memory 0 is the arena, then come inputs, then results."""

    arena: int  # bytes
    results: tuple[int, ...]  # what it returns: input i, or output ~i
    outputs: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]  # size, stride
    fixed: tuple[bool, ...]  # of each input: whether it depends on weights alone
    instructions: tuple[Instruction, ...]


class _Weights(NamedTuple):
    """The inputs that stay the same over many calls."""

    given: list[Tensor]
    places: list[int]  # where they are: `tensor.data = ...` moves one
    together: list[Tensor]  # the same, or copies where they did not lie together
    memory: Addresses  # the addresses of all pieces of memory, of which theirs are known


class Begun(NamedTuple):
    """A program's results before it has run, and what it will run on."""

    results: list[Tensor]
    memory: Addresses
    held: tuple[Any, ...]  # what lies there


class Step(torch.nn.Module):
    """A program in a graph: takes its inputs, returns the results that outlive it.

    Pools that it writes are returned as they came, unless they did not lie together. Inputs that
    depend on weights alone are looked at when others come.
    """

    def __init__(self, frame: Frame, isa: str) -> None:
        super().__init__()
        self._made_of = frame, isa
        self._arena, self._results, self._outputs, fixed, instructions = frame
        self._program = Program(instructions, load(isa))
        self.fixed = [i for i, each in enumerate(fixed) if each]
        self.moving = [i for i, each in enumerate(fixed) if not each]
        self._order = {i: at for at, i in enumerate(self.moving)}
        self._weights = _Weights([], [], [], Addresses(ADDRESS))
        self._kept: Tensor | None = None

    def __reduce__(self) -> Any:
        return Step, self._made_of

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        begun = self.begin([inputs[i] for i in self.fixed], [inputs[i] for i in self.moving])
        self.run(begun)
        return begun.results

    def begin(self, fixed: list[Tensor], moving: list[Tensor]) -> Begun:
        """All but the run itself, of the inputs in order that are fixed, and of those that move."""
        weights = self._bound(fixed)
        moving = [t if t.is_contiguous() else t.contiguous() for t in moving]
        made = [torch.empty_strided(*shape, dtype=dtype) for *shape, dtype in self._outputs]
        arena = self._new_arena() if self._kept is None else self._kept
        memory = weights.memory[:]
        memory[0] = arena.data_ptr()
        for i, tensor in zip(self.moving, moving, strict=True):
            memory[1 + i] = tensor.data_ptr()
        for i, tensor in enumerate(made):
            memory[-1 - i] = tensor.data_ptr()
        results = [moving[self._order[at]] if at >= 0 else made[~at] for at in self._results]
        return Begun(results, memory, (weights, moving, made, arena))

    def _new_arena(self) -> Tensor:
        """Memory for what lives within a run; the program is run once at a time."""
        arena = torch.empty(self._arena, dtype=torch.uint8)
        if self._arena <= KEPT:
            self._kept = arena
        return arena

    def run(self, begun: Begun) -> None:
        self._program.run(begun.memory, torch.get_num_threads())

    def _bound(self, given: list[Tensor]) -> _Weights:
        weights, places = self._weights, [tensor.data_ptr() for tensor in given]
        if places == weights.places and all(map(is_, given, weights.given)) and weights.memory:
            return weights
        together = [t if t.is_contiguous() else t.contiguous() for t in given]
        inputs = len(self.fixed) + len(self.moving)
        memory = Addresses(ADDRESS, [0] * (1 + inputs + len(self._outputs)))
        for i, tensor in zip(self.fixed, together, strict=True):
            memory[1 + i] = tensor.data_ptr()
        self._weights = weights = _Weights(given, places, together, memory)
        return weights


class Whole(NamedTuple):
    """A graph that is one program and nothing else, so that a call of it is one of the program.

    Inputs are places among those of the graph. Results are inputs i, or ~i of the program's own.
    """

    step: Step
    fixed: list[int]
    moving: list[int]
    results: list[int]

    def begin(self, given: Sequence[Tensor]) -> Begun:
        """The graph's results, which `step.run` will fill."""
        fixed, moving = [given[i] for i in self.fixed], [given[i] for i in self.moving]
        begun = self.step.begin(fixed, moving)
        results = [given[at] if at >= 0 else begun.results[~at] for at in self.results]
        return begun._replace(results=results)


def whole(module: GraphModule) -> Whole | None:
    """A graph as one program, if it is one."""
    nodes = list(module.graph.nodes)
    inputs = {node: at for at, node in enumerate(n for n in nodes if n.op == "placeholder")}
    calls = [node for node in nodes if node.op not in ("placeholder", "output")]
    if not calls or calls[0].op != "call_module" or not all(_is_item(n, calls[0]) for n in calls[1:]):
        return None
    step = module.get_submodule(str(calls[0].target))
    assert isinstance(step, Step)
    places = [inputs[node] for node in calls[0].args]
    return Whole(
        step,
        [places[i] for i in step.fixed],
        [places[i] for i in step.moving],
        [inputs[n] if n in inputs else ~n.args[1] for n in nodes[-1].args[0]],
    )


def _is_item(node: Node, of: Node) -> bool:
    return node.target is getitem and node.args[0] is of
