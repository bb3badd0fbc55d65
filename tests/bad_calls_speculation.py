"""Bad calls of verify, commit, rewind, draft, accept and speculate; tests/bad_calls.py takes them.

As there, nothing here needs pytest.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import qnext as qn
from tests.calls import World, case, config, other, world

NO_ID = r" is no token id: the vocabulary is 0\.\.210"
WAITS = r"this state holds a draft that waits: state = commit\(state, accepted\) says"
ROOM = r"draft={0} on a state that has room to draft {1}: make it with init_state\(.*, draft={0}\)"
Change = Callable[[Tensor], Any]


@cache
def ready() -> qn.State:
    """Two rows that have consumed 3 of 7, with room for two guesses."""
    w = world()
    return qn.forward(w.params, qn.init_state(config(), 2, 7, draft=2), w.tokens)[1]


@cache
def pending(used: int = 0) -> qn.State:
    """A verification of three tokens that waits for commit, in a state with room for 7."""
    w = world()
    state = qn.verify(w.params, qn.init_state(config(), 2, 7, draft=2), w.tokens)[1]
    return state._replace(lengths=state.lengths + used)


@cache
def committed() -> qn.State:
    """Three and two tokens of a draft taken: rewind may go back two and one."""
    return qn.commit(pending(), torch.tensor([3, 2]))


# --- verify and commit -------------------------------------------------------------------------

case(
    "tokens beyond what the state keeps",
    r"given 3 tokens a row, this state keeps the states after 1: .*capacity, draft=2\)",
    "verify",
)
MOST = r"\[{}\] = {} must lie in 0\.\.{}, the tokens of "
HELD, LAST = MOST + "that row which the state holds from veri", MOST + "the last commit but the fi"
KIND = r"{} must be int32 or int64 \[batch=2\], got {}"
for title, field, state, bounds in (
    (
        "commit",
        "accepted",
        pending,
        (HELD.format(1, 4, 3), HELD.format(0, -1, 3), HELD.format(1, 2**32 + 1, 3)),
    ),
    (
        "rewind",
        "count",
        committed,
        (LAST.format(1, 4, 1), LAST.format(0, -1, 2), LAST.format(1, 2**32 + 1, 1)),
    ),
):
    least = 3 if title == "commit" else 2
    for name, says, value in (
        ("beyond what is kept", field + bounds[0], [least, 4]),
        ("negative", field + bounds[1], [-1, least]),
        ("beyond int32", field + bounds[2], [1, 2**32 + 1]),
        ("float", KIND.format(field, r"torch\.float32 \[2\]"), [1.0, 2.0]),
        ("bool", KIND.format(field, r"torch\.bool \[2\]"), [True, False]),
        ("of another batch", KIND.format(field, r"torch\.int64 \[3\]"), [1, 2, 3]),
        ("of rank 2", KIND.format(field, r"torch\.int64 \[2, 1\]"), [[1], [2]]),
        ("of rank 0", KIND.format(field, r"torch\.int64 \[\]"), 2),
    ):
        other(
            f"{title}: {field} {name}",
            lambda w, t=title, s=state, v=value: partial(getattr(qn, t), s(), torch.tensor(v)),
            says,
        )
    for value in ([1, 2], 2, None):
        other(
            f"{title}: {field} {type(value).__name__}",
            lambda w, t=title, s=state, v=value: partial(getattr(qn, t), s(), v),
            KIND.format(field, type(value).__name__),
            typed=True,
        )
other(
    "commit: twice",
    lambda w: partial(qn.commit, qn.commit(pending(), torch.tensor([1, 2])), torch.tensor([0, 2])),
    "accepted" + HELD.format(1, 2, 0),
)
other(
    "commit: beyond capacity",
    lambda w: partial(qn.commit, pending(used=5), torch.tensor([2, 3])),
    "row 1 would hold 8 tokens, but its capacity is 7; verify fewer tokens of it, by lengths",
    error=qn.CapacityError,
)
other(
    "advance: a state that waits",
    lambda w: partial(qn.advance, w.params, pending(), w.tokens[:, 0]),
    WAITS,
)

# --- rewind ------------------------------------------------------------------------------------

for name, make in (
    ("after a plain call", ready),
    ("further, the second time", lambda: qn.rewind(committed(), torch.tensor([2, 1]))),
):
    other(
        f"rewind: {name}",
        lambda w, m=make: partial(qn.rewind, m(), torch.tensor([0, 1])),
        "count" + LAST.format(1, 1, 0),
    )
other(
    "rewind: a state that waits",
    lambda w: partial(qn.rewind, pending(), torch.tensor([0, 0])),
    "waits",
)

# --- draft, accept and speculate ---------------------------------------------------------------

GIVEN: dict[str, Callable[[World], Any]] = {
    "params": lambda w: w.params,
    "state": lambda w: ready(),
    "tokens": lambda w: w.tokens[:, 0],
    "draft": lambda w: 2,
    "guesses": lambda w: w.tokens[:, 1:],
}
TAKE = {
    "draft": "params state tokens draft",
    "speculate": "params state tokens draft",
    "accept": "params state tokens guesses",
}


def each(
    name: str,
    says: str,
    only: str = "draft accept speculate",
    typed: bool = False,
    error: type[Exception] = qn.InputError,
    **bad: Callable[[World], Any],
) -> None:
    """A case for several of the three, with an argument that is bad among good ones."""

    def make(title: str, w: World) -> Callable[[], Any]:
        given = GIVEN | bad
        return partial(getattr(qn, title), **{kind: given[kind](w) for kind in TAKE[title].split()})

    for title in only.split():
        other(f"{title}: {name}", partial(make, title), says, error=error, typed=typed)


def donated(w: World) -> qn.State:
    return World(w.params, ready(), w.tokens).donated(lambda s: s.mtp[0].hidden)


each(
    "params None",
    r"params must be a qnext Params .*, got NoneType",
    typed=True,
    params=lambda w: None,
)
each(
    "state None", r"state must be a qnext State .*, got NoneType", typed=True, state=lambda w: None
)
each(
    "a state of another model",
    r"state.layers\[1\].key must be \[pages=3, page=128, hkv=2, hd=24\], got \[3, 128, 4, 24\]",
    state=lambda w: w.other(num_key_value_heads=4),
)
each(
    "a donated state",
    re.escape("state.mtp[0].hidden was donated to a call and its memory reused."),
    error=qn.DonatedError,
    state=donated,
)
each("a state that waits", WAITS, state=lambda w: pending())

RANK = r"tokens must be \[batch\], got shape {}"
INTEGER = r"tokens must be int32 or int64, got torch\.{}; write tokens\.long\(\)"
tokens: tuple[tuple[str, str, Change], ...] = (
    ("beyond the vocabulary", r"tokens\[1, 0\] = 213" + NO_ID, lambda t: t + 210),
    ("negative", r"tokens\[0, 0\] = -2" + NO_ID, lambda t: t - 2),
    ("of rank 2", RANK.format(r"\[2, 1\]"), lambda t: t[:, None]),
    ("of rank 0", RANK.format(r"\[\]"), lambda t: t[0]),
    ("of another batch", "tokens has 4 rows, the state has 2 seq", lambda t: t.repeat(2)),
    ("float", INTEGER.format("float64"), Tensor.double),
    ("bool", INTEGER.format("bool"), Tensor.bool),
)
for name, says, change in tokens:
    each(f"tokens {name}", says, tokens=lambda w, c=change: c(w.tokens[:, 0]))
for change in (Tensor.tolist, lambda t: None):
    kind = type(change(torch.zeros(1))).__name__
    each(
        f"tokens {kind}",
        rf"tokens must be an integer tensor \[batch\], got {kind}",
        typed=True,
        tokens=lambda w, c=change: c(w.tokens[:, 0]),
    )

GUESSES = r"guesses must be int32 or int64 \[batch=2, drafted\], got {}"
guesses: tuple[tuple[str, str, Change], ...] = (
    ("beyond the vocabulary", r"tokens\[1, 1\] = 211" + NO_ID, lambda t: t + 207),
    ("negative", r"tokens\[0, 1\] = -1" + NO_ID, lambda t: t - 2),
    ("of rank 1", GUESSES.format(r"torch\.int64 \[2\]"), lambda t: t[0]),
    ("of rank 3", GUESSES.format(r"torch\.int64 \[2, 2, 1\]"), lambda t: t[..., None]),
    ("of another batch", GUESSES.format(r"torch\.int64 \[1, 2\]"), lambda t: t[:1]),
    ("float", GUESSES.format(r"torch\.float32 \[2, 2\]"), Tensor.float),
    ("bool", GUESSES.format(r"torch\.bool \[2, 2\]"), Tensor.bool),
    ("beyond the state's room", ROOM.format(4, 2), lambda t: t.repeat(1, 2)),
)
for name, says, change in guesses:
    each(f"guesses {name}", says, "accept", guesses=lambda w, c=change: c(w.tokens[:, 1:]))
for change in (Tensor.tolist, lambda t: None):
    kind = type(change(torch.zeros(1))).__name__
    each(
        f"guesses {kind}",
        GUESSES.format(kind),
        "accept",
        typed=True,
        guesses=lambda w, c=change: c(w.tokens[:, 1:]),
    )

both = partial(each, only="draft speculate")
for value in (-1, -7, True, 2.5, "2", None):
    both(
        f"draft {value!r}",
        rf"draft must be an integer >= 0, got {value!r}",
        typed=not isinstance(value, int),
        draft=lambda w, v=value: v,
    )
both("draft beyond the state's room", ROOM.format(3, 2), draft=lambda w: 3)
both("a state without room", ROOM.format(2, 0), state=lambda w: w.state)


def without(w: World) -> qn.Params:
    """The model without its MTP module."""
    return w.params._replace(config=replace(w.params.config, mtp_layers=0), mtp=())


MODULE = "this model has no MTP module to draft with: load a checkpoint that has mtp"
both("no MTP module", MODULE, params=without, state=lambda w: ready()._replace(mtp=()))
for name, says, state_draft, params in (
    ("no MTP module", MODULE, 2, without),
    ("draft without room", ROOM.format(2, 0), 0, lambda w: w.params),
):
    other(
        f"generate: {name}",
        lambda w, n=state_draft, p=params: partial(
            qn.generate,
            p(w),
            qn.init_state(p(w).config, 2, 7, draft=n),
            w.tokens,
            1,
            draft=2,
        ),
        says,
    )
