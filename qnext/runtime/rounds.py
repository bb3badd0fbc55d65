"""Groups of ranks with requests of their own, whose tokens meet in the experts: calls in rounds.

Tokens travel between all groups in every layer, so all of them must make the same calls, with
batches of one shape. Before each call the first ranks of the groups tell each other what they want;
all then make the call that somebody has waited for longest, of equals the one that most want, as
large as the largest. A group that wanted another makes this one with rows that rest, and asks
again; so does one that has nothing to do.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from qnext.functional.mesh import DP, LEADERS, Mesh
from qnext.functional.state import State, narrow, view, widen
from qnext.functional.tree import process_group
from qnext.runtime.buckets import cut, resized

KINDS = ("consume", "guess", "verify", "ahead", "next")  # of equal wants the first goes first
LIKE = {"score": "consume", "decode": "next"}  # calls that move as much between groups
ENDS = 4  # tokens that may end a row, or a multiple: a step is compiled for each number of them


class Form(NamedTuple):
    """What groups must agree on: the kind of a call, its rows, and tokens of each."""

    kind: str
    batch: int
    seq: int

    def takes(self, other: "Form") -> bool:
        """Whether another call can be made as one of this form."""
        return self.kind == other.kind and self.batch >= other.batch and self.seq >= other.seq


NOTHING = Form("", 0, 0)  # wanted by a group without work
OVER = Form("", -1, 0)  # by one that will have no more


def form_of(name: str, rest: Sequence[Any]) -> Form:
    """The form of a step's call."""
    tokens = rest[0]
    seq = tokens.shape[1] if tokens.ndim > 1 else next((n for n in rest if type(n) is int), 1)
    return Form(LIKE.get(name, name), tokens.shape[0], seq)


def chosen(wanted: Sequence[tuple[Form, int]]) -> Form:
    """The form that all groups call next, of what each wants and for how many rounds it has.

    NOTHING where none wants a call, OVER where all have ended.
    """
    asked = [(form, waited) for form, waited in wanted if form.kind]
    if not asked:
        return OVER if all(form == OVER for form, _ in wanted) else NOTHING
    longest = max(waited for _, waited in asked)
    forms = [form for form, waited in asked if waited == longest]
    votes = {kind: sum(form.kind == kind for form in forms) for kind in KINDS}
    kind = max(KINDS, key=lambda each: votes[each])
    return max((form for form in forms if form.kind == kind), key=lambda f: (f.batch * f.seq, f))


class Rounds:
    """The rounds of one group's first rank."""

    def __init__(self, mesh: Mesh) -> None:
        from torch import distributed as dist

        self.size, self._dist = mesh.size(DP), dist
        self._group = process_group(mesh.group(LEADERS))

    def agree(self, wanted: Form, waited: int = 0) -> Form:
        """What all groups call next, given what this one wants and for how long; every one asks."""
        kind = KINDS.index(wanted.kind) if wanted.kind else -1
        mine = torch.tensor([kind, wanted.batch, wanted.seq, waited])
        every = [torch.empty_like(mine) for _ in range(self.size)]
        self._dist.all_gather(every, mine, group=self._group)
        told = [want.tolist() for want in every]
        return chosen([(Form(KINDS[k] if k >= 0 else "", b, seq), w) for k, b, seq, w in told])

    def call(
        self, run: Callable[..., Any], name: str, state: State, rest: Sequence[Any]
    ) -> tuple[Any, ...]:
        """`run(name, state, *rest)`, once all groups make such a call; until then theirs."""
        mine, waited = form_of(name, rest), 0
        while not (agreed := self.agree(mine, waited)).takes(mine):
            state = resting(run, agreed, state)
            waited += 1
        return _narrowed(run(name, *_widened(state, rest, mine, agreed)), mine)

    def attend(self, run: Callable[..., Any], state: State, over: bool) -> tuple[Form, State]:
        """A round of a group without work; over: it will have no more. (what was called, state)"""
        agreed = self.agree(OVER if over else NOTHING)
        return agreed, resting(run, agreed, state) if agreed.kind else state


def resting(run: Callable[..., Any], form: Form, state: State) -> State:
    """Make a call whose rows all rest, on scratch; the state with the pools after it."""
    device = state.lengths.device
    none = torch.zeros(0, dtype=torch.long, device=device)
    idle = widen(view(state, none), form.batch)
    idle = idle if form.kind == "consume" else idle._replace(capacity=idle.capacity * 0)
    tokens = torch.zeros(form.batch, dtype=torch.int64, device=device)
    line = tokens[:, None].expand(-1, form.seq).contiguous()
    rest: dict[str, tuple[Any, ...]] = {
        "consume": (line, tokens.int()),
        "guess": (tokens, form.seq, None),
        "verify": (line,),
        "ahead": (tokens, form.seq, tokens[:, None].expand(-1, ENDS) - 2),
        "next": (tokens,),
    }
    after = run(form.kind, idle, *rest[form.kind])[-1]
    return state._replace(layers=after.layers, mtp=after.mtp)


def _widened(state: State, rest: Sequence[Any], mine: Form, agreed: Form) -> tuple[Any, ...]:
    """The arguments of a call with rows that rest, and tokens that are padding, added to them."""
    more, longer = agreed.batch - mine.batch, agreed.seq - mine.seq
    if not more and not longer:
        return state, *rest
    wide = widen(state, agreed.batch)
    if mine.kind != "consume":  # those rest for want of room, these for want of tokens
        wide = wide._replace(capacity=pad(state.capacity, (0, more)))

    tokens, *others = rest
    tokens = pad(tokens, (0, longer)) if longer else tokens
    return wide, *resized([tokens, *others], agreed.batch)


def _narrowed(result: tuple[Any, ...], mine: Form) -> tuple[Any, ...]:
    """The results of the rows that asked, and the state with their tables."""
    *values, state = result
    own = [cut(value, mine.batch) for value in values]
    if mine.kind == "consume":  # logits of each token
        own = [value[:, : mine.seq] if value.ndim > 1 else value for value in own]
    return *own, narrow(state, mine.batch)
