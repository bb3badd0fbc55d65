"""What the engine remembers of one request while it is served."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from qnext.acceptance import NONE, Acceptance
from qnext.runtime.kept import Kept
from qnext.runtime.plan import Job
from qnext.runtime.request import Logprob, Output, Request
from qnext.runtime.work import Manner
from qnext.text.continuation import Continuation

Sink = Callable[[Output], None]


@dataclass(eq=False)
class Sequence:
    """uncached: why no prefix of it is looked up or kept, if so. tokens: the prompt and what was
    drawn; of a sequence that decodes all but the last are consumed. sent: consumed, at most, once
    every step under way has run. `swapped` is its state while it runs no more and waits."""

    request: Request
    ends: tuple[int, ...]
    sink: Sink
    text: Continuation | None
    tokens: list[int]
    uncached: str | None = None
    number: int = 0  # of its arrival
    marks: tuple[int, ...] = ()
    place: int | None = None
    pages: list[int] = field(default_factory=list)
    sent: int = 0
    length: int = 0
    swapped: Kept | None = None
    admitted: bool = False  # it has run before
    cached: int = 0
    snapshot: int = 0  # the length of its last one
    handed: int = 0  # pages that were handed off ahead
    flying: int = 0  # steps of decoding under way
    finish: str | None = None
    error: Exception | None = None
    acceptance: Acceptance = NONE
    prompt_logprobs: list[Logprob] = field(default_factory=list)

    @property
    def row(self) -> int:
        """Its place in the worker's tables, while it runs."""
        assert self.place is not None
        return self.place

    @property
    def caches(self) -> bool:
        return self.uncached is None

    @cached_property
    def prompt(self) -> int:
        return len(self.request.tokens)

    @property
    def made(self) -> int:
        return len(self.tokens) - self.prompt

    @cached_property
    def limit(self) -> int:
        """The most it will have consumed: the last token that it draws is not."""
        return self.prompt + self.request.max_new_tokens - 1

    @property
    def reusable(self) -> int:
        """Tokens that a cached prefix may spare: all but the last, which is drawn from, and one
        that must be read for a step to end with its state."""
        return self.prompt - 1 - (self.request.handoff is not None)

    def manner(self) -> Manner:
        request = self.request
        return Manner(
            request.sampling,
            self.prompt,
            self.ends,
            request.min_new_tokens,
            request.bias,
            request.logprobs,
            request.guide,
        )

    def job(self, own: int = 0) -> Job:
        """What planning is told of a sequence that runs, or that waits without a cached prefix."""
        waits = self.place is None
        return Job(
            id=self.number,
            arrival=self.number,
            prompt=self.prompt - 1,
            limit=self.limit,
            # what a swapped state holds comes back with it
            length=(self.length if self.swapped is not None else 0) if waits else self.sent,
            pages=len(self.pages),
            own=own,
            priority=self.request.priority,
            deadline=self.request.deadline,
            marks=self.marks,
        )


def marks_of(request: Request, every: int, most: int = 4) -> tuple[int, ...]:
    """Lengths of a prompt at which its state is kept: ends of messages, and every so many tokens.

    Of many messages the first and the last ones count: conversations that begin alike share the
    first, those that go on or are tried again share the last. Each costs a call of its own.
    """
    known = sorted({mark for mark in request.marks if 0 < mark < len(request.tokens) - 1})
    chosen = known if len(known) <= most else [known[0], *known[1 - most :]]
    return tuple(sorted({*chosen, *range(every, len(request.tokens) - 1, every)}))


def why_uncached(request: Request, cache_bytes: int) -> str | None:
    """Why a request's prefixes are neither looked up nor kept; None where they are."""
    if not cache_bytes:
        return "cache_bytes=0"
    if not request.cache:
        return "cache=false"
    if request.prompt_logprobs is not None:
        return "prompt_logprobs"  # they take every token of the prompt
    return None
