"""How ranks share a model: which logical axes of its tensors are divided, over which ranks.

A mesh is `dp` groups of `tp` ranks. The ranks of a group hold each other's heads and answer the
same requests; groups have requests of their own. Experts are divided over `ep` consecutive ranks,
of one group or of several. What is divided is data: `TABLE` names the mesh axis of each logical
axis, and an axis that it does not name is whole on every rank.

Matrices are divided by their outputs. What a rank has computed of a vector is gathered before the
next matrix takes it, so that no sum is split: with any number of ranks a number is rounded where it
is on one, also with int8, whose scales are of whole vectors. Only the experts' sum is made of
parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from qnext.errors import InputError

TP, DP, EP = "tp", "dp", "ep"
# groups on CPUs: of a group's ranks, of the first ranks of all groups, of all ranks of a mesh
CONTROL, LEADERS, ALL = "control", "leaders", "all"
TABLE: Mapping[str, str] = {
    "heads": TP,  # of attention
    "delta_heads": TP,
    "dense": TP,
    "vocab": TP,
    "experts": EP,
}
UNEVEN = "experts"  # need not be divisible


class Span(NamedTuple):
    """Consecutive places of an axis."""

    start: int
    size: int


class Block(NamedTuple):
    """A part of an axis: so many units, of `size` places each, divided as a logical axis is.

    repeats: where there are fewer than ranks, several of these hold the same.
    """

    logical: str
    units: int
    size: int = 1
    repeats: bool = False


@dataclass(frozen=True)
class Mesh:
    """A rank's place among `dp` times `tp` ranks. ep: ranks that share experts, all by default.

    groups: the process groups of this rank's axes by name, as torch.distributed knows them; a mesh
    without them is for specs and plans. whole: logical axes that are not divided after all.
    """

    tp: int = 1
    dp: int = 1
    ep: int = 0
    rank: int = 0
    groups: tuple[tuple[str, str], ...] = ()
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("tp", 1), ("dp", 1), ("ep", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"{name} must be an integer >= {least}, got {value!r}")
        if not self.ep:
            object.__setattr__(self, "ep", self.ranks)
        if self.ranks % self.ep or (self.ep % self.tp and self.tp % self.ep):
            raise InputError(
                f"ep = {self.ep} must divide the {self.ranks} ranks, and divide tp = {self.tp} or "
                "be a multiple of it"
            )
        if not 0 <= self.rank < self.ranks:
            raise InputError(f"rank must lie in 0..{self.ranks - 1}, got {self.rank}")
        if unknown := [name for name in self.whole if name not in TABLE]:
            raise InputError(f"whole: {unknown[0]!r} is none of the axes {', '.join(TABLE)}")

    @property
    def ranks(self) -> int:
        return self.tp * self.dp

    def size(self, axis: str) -> int:
        """How many ranks an axis of the mesh has."""
        return {TP: self.tp, DP: self.dp, EP: self.ep}[axis]

    def index(self, axis: str) -> int:
        """This rank's place on an axis of the mesh."""
        return {TP: self.rank % self.tp, DP: self.rank // self.tp, EP: self.rank % self.ep}[axis]

    def peers(self, axis: str) -> list[int]:
        """The ranks along an axis of the mesh, in their order."""
        if axis == DP:
            return list(range(self.rank % self.tp, self.ranks, self.tp))
        first = self.rank - self.index(axis)
        return list(range(first, first + self.size(axis)))

    def group(self, axis: str) -> str:
        """The name of the process group along an axis; "" for specs."""
        return dict(self.groups).get(axis, "")

    def divides(self, logical: str) -> int:
        """Over how many ranks a logical axis is divided; 1: it is whole."""
        axis = None if logical in self.whole else TABLE.get(logical)
        return self.size(axis) if axis else 1

    def for_vocab(self, size: int) -> "Mesh":
        """This mesh, with the vocabulary whole where tp ranks cannot share so many tokens."""
        return replace(self, whole=() if size % self.tp == 0 else ("vocab",))

    def units(self, block: Block) -> range:
        """Which of a block's units this rank holds; InputError where they cannot be shared."""
        logical, count = block.logical, block.units
        ranks = self.divides(logical)
        at = self.index(TABLE[logical]) if ranks > 1 else 0
        if block.repeats and ranks > count and ranks % count == 0:
            return range(at * count // ranks, at * count // ranks + 1)
        if count % ranks and logical != UNEVEN:
            raise InputError(
                f"{count} {logical} cannot be divided over {ranks} ranks; Mesh(..., "
                f"whole=({logical!r},)) keeps them whole on each"
            )
        return range(at * count // ranks, (at + 1) * count // ranks)

    def spans(self, blocks: tuple[Block, ...]) -> list[Span]:
        """Which places of an axis of these blocks this rank holds."""
        spans, start = list[Span](), 0
        for block in blocks:
            held = self.units(block)
            spans.append(Span(start + held.start * block.size, len(held) * block.size))
            start += block.units * block.size
        return spans
