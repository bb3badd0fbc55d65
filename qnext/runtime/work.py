"""What the engine hands to its worker for a step, and what comes back: values, no tensors of pools.

Rows are places in the worker's tables; the engine decides who has which.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from qnext.functional.sampling import Sampling
from qnext.runtime.kept import Kept
from qnext.runtime.request import Guide, Logprob


@dataclass(frozen=True)
class Manner:
    """How a row draws its tokens. prompt: tokens before the first that is drawn, the offset of
    `min_new_tokens`; ends: ids that end it, where a step that draws several must halt."""

    sampling: Sampling
    prompt: int = 0
    ends: tuple[int, ...] = ()
    min_new_tokens: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    guide: Guide | None = None


@dataclass(frozen=True)
class Put:
    """A sequence takes a row. tokens: all of it so far, the last of them not consumed once it
    decodes; length: of these, what `kept` has consumed; fill: pages that `kept` is written to."""

    row: int
    tokens: tuple[int, ...]
    length: int
    limit: int
    pages: tuple[int, ...]
    fill: tuple[int, ...]
    kept: Kept | None
    manner: Manner


@dataclass(frozen=True)
class Piece:
    """Tokens of a row's prompt to consume; score: how many of the likeliest to tell in the place of
    each, and of `after`, the token that follows them."""

    row: int
    tokens: tuple[int, ...]
    score: int | None = None
    after: int | None = None


@dataclass(frozen=True)
class Take:
    """Take a row's state out; whole, with its pages from the `first` on, or with the last token's
    alone. into: where it is copied to, whose number of pages are taken (default: memory of its
    own). Without `states` these are all that is copied."""

    row: int
    whole: bool = False
    first: int = 0
    states: bool = True
    into: Kept | None = None


@dataclass(frozen=True)
class Complete:
    """Give a snapshot of so many tokens the pages before its own, while they are still there."""

    length: int
    pages: tuple[int, ...]
    kept: Kept


@dataclass(frozen=True)
class Work:
    """A step, in this order: take out, wipe, put in, grant pages, prefill, take copies, decode.

    A row may be in both `prefill` and `decode`, if its prompt ends in this step."""

    first: tuple[Take | Complete, ...] = ()
    wipes: tuple[tuple[int, tuple[int, ...]], ...] = ()  # (row, pages)
    puts: tuple[Put, ...] = ()
    grants: tuple[tuple[int, tuple[int, ...]], ...] = ()  # (row, all its pages)
    prefill: tuple[Piece, ...] = ()
    then: tuple[Take, ...] = ()
    decode: tuple[int, ...] = ()


class Drawn(NamedTuple):
    """What one row drew in a step; finite: whether its logits were numbers."""

    tokens: tuple[int, ...]
    finite: bool
    logprobs: tuple[Logprob, ...] = ()


class Read(NamedTuple):
    """What became of a piece of a prompt."""

    finite: bool
    logprobs: tuple[Logprob, ...] = ()


@dataclass
class Done:
    """The results of a step by row; `failed` are rows whose call raised.

    What was taken out is (length, value) each, in order, None for rows that failed."""

    drawn: dict[int, Drawn] = field(default_factory=dict)
    read: dict[int, Read] = field(default_factory=dict)
    first: list[tuple[int, Kept] | None] = field(default_factory=list)
    then: list[tuple[int, Kept] | None] = field(default_factory=list)
    failed: dict[int, Exception] = field(default_factory=dict)
