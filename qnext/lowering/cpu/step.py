"""A program as a module of a graph: finds out where its inputs lie, makes its results, runs."""

from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext.lowering.cpu.library import ADDRESS, Code, Integers, Program, load

KEPT = 1 << 20  # bytes of an arena that stays for the next step


class Frame(NamedTuple):
    """All that a program is, as data: memory 0 is the arena, then come inputs, then results."""

    arena: int  # bytes
    results: tuple[int, ...]  # what it returns: input i, or output ~i
    outputs: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]  # size, stride
    fixed: tuple[bool, ...]  # of each input: whether it depends on weights alone
    code: Code


class Weights(NamedTuple):
    """The inputs that stay the same over many calls."""

    given: list[Tensor]
    places: list[int]  # where they are: `tensor.data = ...` moves one
    together: list[Tensor]  # the same, or copies where they did not lie together
    memory: Integers  # the addresses of all pieces of memory, of which theirs are known


class Step(torch.nn.Module):
    """A program in a graph: takes its inputs, returns the results that outlive it.

    Pools that it writes are returned as they came, unless they did not lie together. Inputs that
    depend on weights alone are looked at when others come.
    """

    def __init__(self, frame: Frame, isa: str) -> None:
        super().__init__()
        self._made_of = frame, isa
        self._arena, self._results, self._outputs, fixed, code = frame
        self._program = Program(code, load(isa))
        self.fixed = [i for i, each in enumerate(fixed) if each]
        self.moving = [i for i, each in enumerate(fixed) if not each]
        self._order = {i: at for at, i in enumerate(self.moving)}
        self._weights = Weights([], [], [], Integers(ADDRESS))
        self._kept: Tensor | None = None

    def __reduce__(self) -> Any:
        return Step, self._made_of

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        weights = self.bind([inputs[i] for i in self.fixed])
        return self.run(weights, [inputs[i] for i in self.moving])

    def run(self, weights: Weights, moving: list[Tensor]) -> list[Tensor]:
        """The results; `moving` are the inputs in order that are not fixed."""
        moving = [_together(tensor) for tensor in moving]
        made = [torch.empty_strided(*shape, dtype=dtype) for *shape, dtype in self._outputs]
        arena = self._new_arena() if self._kept is None else self._kept
        memory = weights.memory[:]
        memory[0] = arena.data_ptr()
        for i, tensor in zip(self.moving, moving, strict=True):
            memory[1 + i] = tensor.data_ptr()
        for i, tensor in enumerate(made):
            memory[-1 - i] = tensor.data_ptr()
        self._program.run(memory, torch.get_num_threads())
        return [moving[self._order[at]] if at >= 0 else made[~at] for at in self._results]

    def _new_arena(self) -> Tensor:
        """Memory for what lives within a run; the program is run once at a time."""
        arena = torch.empty(self._arena, dtype=torch.uint8)
        if self._arena <= KEPT:
            self._kept = arena
        return arena

    def bind(self, given: list[Tensor]) -> Weights:
        """The inputs in order that are fixed; those of the last call where they still are."""
        weights, places = self._weights, [tensor.data_ptr() for tensor in given]
        if places == weights.places and all(map(is_, given, weights.given)) and weights.memory:
            return weights
        together = [_together(tensor) for tensor in given]
        inputs = len(self.fixed) + len(self.moving)
        memory = Integers(ADDRESS, [0] * (1 + inputs + len(self._outputs)))
        for i, tensor in zip(self.fixed, together, strict=True):
            memory[1 + i] = tensor.data_ptr()
        self._weights = weights = Weights(given, places, together, memory)
        return weights


def _together(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()
