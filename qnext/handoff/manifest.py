"""What the two sides of a hand-off tell each other, and when one refuses the other.

The decoder makes an `Offer`: a region of its pool, and the value that it wants there. The side that
prefills writes, tells of parts that are there, and ends with one `Commit`, which says once more
what the value is, with checksums, or with a `Refusal`. Nothing counts before the commit, and no
commit counts that does not fit the offer of its attempt: a late one, of an attempt that was given
up, finds none.
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from qnext.errors import QnextError
from qnext.handoff.layout import Entry, Layout

SHOWN = 8  # differences that an error lists
DRAFTS = "mtp["  # paths of the module's part, which one of the sides may lack


class HandoffError(QnextError):
    """A hand-off that did not happen; the prompt can be read where the answer is made."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Message):
    """A tensor of a value, and where its bytes begin in the region."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    begin: int


class Claim(_Message):
    """What a value is: of which weights, after which tokens, laid out how."""

    model: str  # the config's fingerprint
    weights: str  # a digest of numbers out of all of them
    tokens: str  # a digest of the ids that were consumed
    position: int = Field(ge=1)  # how many these are
    tensors: tuple[TensorSpec, ...]


class Offer(_Message):
    """A region for a value; `seconds` is how long the decoder waits for it."""

    kind: Literal["offer"] = "offer"
    room: str
    attempt: str
    address: str
    begin: int = Field(ge=0)
    claim: Claim
    seconds: float = Field(gt=0)


class Part(_Message):
    """Some tensors of a value have been written, which may be looked at. checksums: as below."""

    kind: Literal["part"] = "part"
    room: str
    attempt: str
    checksums: dict[str, int]


class Commit(_Message):
    """All of a value has been written. checksums: XXH3 by path, of the tensors that were sent."""

    kind: Literal["commit"] = "commit"
    room: str
    attempt: str
    claim: Claim
    checksums: dict[str, int]


class Refusal(_Message):
    """The value does not come."""

    kind: Literal["refusal"] = "refusal"
    room: str
    attempt: str
    why: str


Answer = Annotated[Part | Commit | Refusal, Field(discriminator="kind")]
ANSWER: TypeAdapter[Part | Commit | Refusal] = TypeAdapter(Answer)


def claim_of(model: str, weights: str, tokens: Sequence[int], layout: Layout) -> Claim:
    """What a value is that has consumed these tokens."""
    specs = tuple(map(_spec, layout.entries))
    return Claim(
        model=model,
        weights=weights,
        tokens=digest(tokens),
        position=len(tokens),
        tensors=specs,
    )


def _spec(entry: Entry) -> TensorSpec:
    dtype = str(entry.dtype).removeprefix("torch.")
    return TensorSpec(path=entry.path, shape=entry.shape, dtype=dtype, begin=entry.begin)


def digest(tokens: Sequence[int]) -> str:
    """A name for a sequence of token ids."""
    text = ",".join(map(str, tokens))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def shared(one: Claim, other: Claim) -> list[str]:
    """The paths of the tensors to hand over: of the module only where both sides have one."""
    theirs = {spec.path for spec in other.tensors}
    return [spec.path for spec in one.tensors if spec.path in theirs or not _is_draft(spec)]


def differences(wanted: Claim, got: Claim) -> list[str]:
    """What keeps a value from being the one that is wanted, a line each."""
    wrong = []
    for name, what in (
        ("model", "config"),
        ("weights", "weights"),
        ("position", "position"),
        ("tokens", "prompt"),
    ):
        mine, theirs = getattr(wanted, name), getattr(got, name)
        if mine != theirs:
            wrong.append(f"another {what}: {theirs}, not {mine}")
    mine, theirs = ({t.path: t for t in c.tensors} for c in (wanted, got))
    for path in dict.fromkeys((*mine, *theirs)):
        a, b = mine.get(path), theirs.get(path)
        if a and b and a != b:
            wrong.append(f"{path} is {_text(b)}, not {_text(a)}")
        elif not (a and b) and not path.startswith(DRAFTS):
            wrong.append(f"{path} is {'missing' if a else 'unknown'}")
    return wrong


def refuse(wanted: Claim, got: Claim) -> None:
    """Raise HandoffError unless a value is the one that is wanted."""
    if wrong := differences(wanted, got):
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise HandoffError("it is another value: " + "; ".join(wrong[:SHOWN]) + more)


def _is_draft(spec: TensorSpec) -> bool:
    return spec.path.startswith(DRAFTS)


def _text(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)} at {spec.begin}"
