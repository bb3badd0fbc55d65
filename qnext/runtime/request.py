"""What is asked of the engine, and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple, Protocol, runtime_checkable
from uuid import uuid4

from torch import Tensor

from qnext.acceptance import NONE, Acceptance
from qnext.errors import InputError, QnextError
from qnext.functional.generate import GREEDY
from qnext.functional.sampling import Sampling
from qnext.runtime.kept import Kept


class RefusedError(QnextError):
    """A request that was not taken, as the engine drains or is closed."""


class FullError(RefusedError):
    """A request that was not taken, as too many wait."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again later")


class CorruptedError(QnextError):
    """A request whose logits ceased to be numbers."""

    def __init__(self, request: str) -> None:
        super().__init__(f"{request}: its logits are no numbers any more (NaN or infinite)")


class StepError(QnextError):
    """A step of the engine that raised, and with it the requests that it served."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"the step that served it failed: {type(cause).__name__}: {cause}")
        self.__cause__ = cause


class RankError(QnextError):
    """Ranks that are gone, or failed: a model that is shared cannot go on without them."""


@runtime_checkable
class Guide(Protocol):
    """What restricts a request's tokens, such as a grammar; asked between steps, never at once.

    error: why it could not go on, where it ended a text that is not complete.
    """

    error: str | None

    def allowed(self, ahead: Sequence[int]) -> Tensor | None:
        """Which tokens [vocab], bool, may follow the text so far and then `ahead`.

        None where these do not fit, so that what follows is of no interest.
        """
        ...

    def advance(self, tokens: Sequence[int]) -> bool:
        """Take tokens that were drawn; whether the text is complete with them."""
        ...


class Start:
    """A state that requests begin with: after `length` tokens of their prompts.

    Each of so many `uses` takes it once; with the last of them it is let go, as it may be large.
    """

    def __init__(self, length: int, kept: Kept, uses: int = 1) -> None:
        self.length, self._kept, self._uses = length, kept, uses
        self._lock = Lock()

    def take(self) -> Kept:
        """The state. Raises InputError where it was taken too often."""
        with self._lock:
            if not self._uses:
                raise InputError("start: it was taken by as many requests as it was meant for")
            self._uses -= 1
            kept = self._kept
            if not self._uses:
                self._kept = Kept((), ())
            return kept


@runtime_checkable
class Portion(Protocol):
    """Room for a part of a state that is handed off: the part is copied `into` it."""

    into: Kept

    def filled(self, whole: bool) -> None:
        """It holds the part now; where not `whole`, nobody writes to it any more."""
        ...


@runtime_checkable
class Handoff(Protocol):
    """Where the state of a prompt goes, to be decoded elsewhere. Calls must not wait for anything.

    Of the prompt's tokens all but the last are consumed.
    """

    def portion(self, first: int, count: int, ends: bool) -> Portion | None:
        """Room for so many pages from the `first` on, and where that `ends` it for the states, too;
        None where nobody wants them any more."""
        ...

    def fail(self, why: str) -> None:
        """The rest will not come."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue; `tokens` are its ids.

    eos: ids that end the text, None for the tokenizer's. stops: strings that do. Before
    `min_new_tokens` neither counts, and eos are not drawn. bias: added to the logits of tokens.
    logprobs: how many of the likeliest tokens to tell beside each that was drawn (None: nothing);
    prompt_logprobs: of those of the prompt. marks: lengths of the prompt at which a message ends,
    where its state is worth keeping. deadline: seconds on time.monotonic(). priority: the lower the
    sooner. cache: whether prefixes may be looked up and kept. handoff: where the prompt's state
    goes; nothing is drawn then, and `max_new_tokens` is 0. start: how many tokens of the prompt
    were consumed elsewhere, and the state after them.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int = 64
    sampling: Sampling = GREEDY
    eos: tuple[int, ...] | None = None
    stops: tuple[str, ...] = ()
    min_new_tokens: int = 0
    keep_stop: bool = False
    skip_special_tokens: bool = True
    bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guide: Guide | None = None
    marks: tuple[int, ...] = ()
    priority: int = 0
    deadline: float | None = None
    cache: bool = True
    handoff: Handoff | None = None
    start: Start | None = None
    id: str = field(default_factory=lambda: f"request-{uuid4().hex}")


@dataclass(frozen=True)
class Logprob:
    """A token's log probability under the model, and the likeliest in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Output(NamedTuple):
    """What became certain of a request in one step; `finish` is set on the last.

    tokens: new ones, eos included. text: theirs, as far as no stop string may begin in it.
    cached: tokens of the prompt that a cached prefix spared. made: new tokens so far. finish: "eos"
    (a token that ends texts), "stop" (a string that does), "length", "guide" (complete), "abort"
    (by its caller), "deadline", "closed" (the engine), or "error", which `error` tells. stopped_by:
    the stop string or eos that ended it. uncached: why no prefix was looked for, where none was.
    """

    id: str
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()
    prompt: int = 0
    cached: int = 0
    made: int = 0
    finish: str | None = None
    stopped_by: str | int | None = None
    error: Exception | None = None
    acceptance: Acceptance = NONE
    uncached: str | None = None


def joined(first: Output, then: Output) -> Output:
    """Two outputs of a request, one after the other, as one."""
    return then._replace(
        tokens=first.tokens + then.tokens,
        text=first.text + then.text,
        logprobs=first.logprobs + then.logprobs,
        prompt_logprobs=first.prompt_logprobs + then.prompt_logprobs,
    )


def check(request: Request, vocab: int, capacity: int) -> None:
    """Raise InputError unless an engine of this capacity and vocabulary can serve it."""
    counts = {"max_new_tokens": request.max_new_tokens, "min_new_tokens": request.min_new_tokens}
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise InputError(f"{name} must be an integer >= 0, got {count!r}")
    if request.min_new_tokens > request.max_new_tokens:
        raise InputError(
            f"min_new_tokens = {request.min_new_tokens} must not exceed max_new_tokens = "
            f"{request.max_new_tokens}"
        )
    if not request.tokens:
        raise InputError("empty prompt: give at least one token")
    for name, ids in (
        ("tokens", request.tokens),
        ("bias", request.bias),
        ("eos", request.eos or ()),
    ):
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab:
                raise InputError(
                    f"{name}: {token!r} is no token id: the vocabulary is 0..{vocab - 1}"
                )
    if not all(value == value for value in request.bias.values()):
        raise InputError("bias: every value must be a number, got NaN")
    if "" in request.stops:
        raise InputError("stops: an empty string stops nothing; leave it out")
    for name, most in (
        ("logprobs", request.logprobs),
        ("prompt_logprobs", request.prompt_logprobs),
    ):
        if most is not None and not 0 <= most <= vocab:
            raise InputError(f"{name} must lie in 0..{vocab}, got {most}")
    if request.start is not None and not 0 < request.start.length < len(request.tokens):
        raise InputError(
            f"start: a state after {request.start.length} tokens is none to begin with for a "
            f"prompt of {len(request.tokens)}: all but the last one, at most, are consumed"
        )
    if request.handoff is not None:
        if request.max_new_tokens or request.prompt_logprobs is not None:
            raise InputError("handoff: what is decoded elsewhere has max_new_tokens = 0 here")
        if len(request.tokens) < 2:
            raise InputError("handoff: of a prompt of one token there is no state to hand off")
    elif not request.max_new_tokens and request.prompt_logprobs is None:
        raise InputError("max_new_tokens = 0 asks for nothing, unless prompt_logprobs is given")
    need = len(request.tokens) + request.max_new_tokens
    if need > capacity:
        raise ContextError(len(request.tokens), request.max_new_tokens, capacity)


class ContextError(InputError):
    """A prompt that leaves no room for what is asked."""

    def __init__(self, prompt: int, new: int, capacity: int) -> None:
        self.prompt, self.new, self.capacity = prompt, new, capacity
        super().__init__(
            f"the capacity is {capacity} tokens, but the prompt has {prompt} and {new} more are "
            f"asked for: shorten the prompt, or ask for at most {max(capacity - prompt, 0)}"
        )
