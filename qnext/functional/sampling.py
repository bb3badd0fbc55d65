"""Drawing tokens: a pure function of (logits, seed, position).

By the Gumbel-max rule, argmax(logits / T + noise) is a draw from softmax(logits / T). The noise is
hashed from (seed, position, token), so a request draws the same tokens whatever shares its batch,
however it was chunked, and whether or not its tokens were guessed ahead.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int, Int32, Int64
from torch import Tensor

from qnext.errors import InputError
from qnext.functional import ops
from qnext.shapes import Shaped

NUMBER = (int, float)
GREATEST = torch.finfo(torch.float32).max
RULES: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "temperature": (NUMBER, lambda t: 0 <= t <= GREATEST, "a float32 number >= 0"),
    "top_k": (int, lambda k: k >= 0, "an integer >= 0 (0 is off)"),
    "top_p": (NUMBER, lambda p: 0 < p <= 1, "a number in (0, 1]"),
    "min_p": (NUMBER, lambda p: 0 <= p <= 1, "a number in [0, 1]"),
    "seed": (int, lambda s: -(2**63) <= s < 2**63, "a 64-bit integer"),
    "repetition_penalty": (NUMBER, lambda r: 0 < r < math.inf, "a finite number > 0"),
    "presence_penalty": (NUMBER, lambda p: abs(p) < math.inf, "a finite number"),
    "frequency_penalty": (NUMBER, lambda p: abs(p) < math.inf, "a finite number"),
}


@dataclass(frozen=True)
class Sampling:
    """How one request draws its tokens; temperature 0 takes the likeliest.

    top_k 0, top_p 1, min_p 0 and the penalties 1, 0, 0 are off. Filters apply to
    softmax(logits / temperature), in the order top_k, top_p, min_p. The repetition penalty divides
    positive and multiplies negative logits of the tokens counted so far (arXiv:1909.05858);
    presence and frequency penalties are subtracted for generated tokens, once and per occurrence.
    """

    temperature: float | int = 1.0
    top_k: int = 0
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    seed: int = 0
    repetition_penalty: float | int = 1.0
    presence_penalty: float | int = 0.0
    frequency_penalty: float | int = 0.0

    def __post_init__(self) -> None:
        for name, (kinds, holds, rule) in RULES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds) or not holds(value):
                raise InputError(f"{name} must be {rule}, got {value!r}")

    @property
    def filters(self) -> bool:
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalises(self) -> bool:
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


class Knobs(NamedTuple):
    """`Sampling` records of a batch as tensors."""

    temperature: Float32[Tensor, " batch"]
    top_k: Int64[Tensor, " batch"]
    top_p: Float32[Tensor, " batch"]
    min_p: Float32[Tensor, " batch"]
    seed: Int64[Tensor, " batch"]
    repetition_penalty: Float32[Tensor, " batch"]
    presence_penalty: Float32[Tensor, " batch"]
    frequency_penalty: Float32[Tensor, " batch"]


class Bias(NamedTuple):
    """What is added to the logits of a batch before anything else; -inf forbids a token."""

    always: Float32[Tensor, "batch vocab"]
    early: Float32[Tensor, "batch vocab"]  # added as well
    until: Int32[Tensor, " batch"]  # to draws of positions before this one


class Counts(NamedTuple):
    """Which tokens a row has seen and how often it generated them; what penalties read."""

    prompt: Bool[Tensor, "batch vocab"]
    output: Int32[Tensor, "batch vocab"]


def records(sampling: Any, batch: int) -> tuple[Sampling, ...]:
    """One record a row, from one for all or a sequence of them."""
    each = (sampling,) * batch if isinstance(sampling, Sampling) else sampling
    each = tuple(each) if isinstance(each, Sequence) else ()
    if len(each) != batch or not all(isinstance(s, Sampling) for s in each):
        raise InputError(
            f"sampling must be one Sampling or one for each of the {batch} rows, got {sampling!r}"
        )
    return each


def knobs(each: Sequence[Sampling], device: torch.device | None = None) -> Knobs:
    """The records of a batch as tensors."""
    dtypes = {"top_k": torch.int64, "seed": torch.int64}
    return Knobs(
        *(
            torch.tensor(
                [getattr(s, f.name) for s in each],
                dtype=dtypes.get(f.name, torch.float32),
                device=device,
            )
            for f in fields(Sampling)
        )
    )


def sample(
    logits: Tensor,
    sampling: Sampling | Sequence[Sampling],
    position: Tensor | int,
    counts: Counts | None = None,
) -> Tensor:
    """Draw a token a row: logits [batch, vocab] -> tokens [batch], int64.

    `position` (one, or [batch]) is the place in its sequence that the token will take; `counts` is
    needed where a record penalises. Raises InputError.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise InputError(
            f"logits must be floating point [batch, vocab], got {logits.dtype} {list(logits.shape)}"
        )
    batch = logits.shape[0]
    each = records(sampling, batch)
    if any(s.penalises for s in each) and counts is None:
        raise InputError("penalties need the tokens seen so far: pass counts=Counts(...)")
    position = torch.as_tensor(position, device=logits.device)
    if position.is_floating_point() or position.shape not in ((), (1,), (batch,)):
        raise InputError(
            f"position must be an integer or one for each of the {batch} rows, "
            f"got {position.dtype} {list(position.shape)}"
        )
    seen = counts if any(s.penalises for s in each) else None
    return drawing(each, seen, logits.device).draw(logits, position.expand(batch))


def drawing(
    each: Sequence[Sampling], counts: Counts | None, device: torch.device | None = None
) -> "Drawing":
    """How rows with these records draw; no settings where all take the likeliest."""
    if all(s.temperature == 0 and not s.penalises for s in each):
        return Drawing(None, False, counts)
    return Drawing(knobs(each, device), any(s.filters for s in each), counts)


def draw(
    logits: Float32[Tensor, "batch vocab"], settings: Shaped[Knobs], position: Int[Tensor, " batch"]
) -> Int64[Tensor, " batch"]:
    """argmax(logits + temperature * noise): the Gumbel-max rule, and greedy at temperature 0."""
    noise = ops.gumbel(seed=settings.seed, position=position, vocab=logits.shape[-1])
    return (logits + settings.temperature[:, None] * noise).argmax(-1)


def choose(
    logits: Float[Tensor, "batch vocab"],
    position: Int[Tensor, " batch"],
    settings: Shaped[Knobs] | None = None,
    filters: bool = False,
    counts: Shaped[Counts] | None = None,
    bias: Shaped[Bias] | None = None,
) -> Int64[Tensor, " batch"]:
    """`sample` without checks or a look at any value, so that it may be part of a compiled step.

    No settings: the likeliest. `filters`: some row has top_k, top_p or min_p, which sorts the
    vocabulary; `counts`: some row has penalties; `bias`: some row has preferences of its own.
    """
    if bias is not None:
        early = bias.early.where((position < bias.until)[:, None], 0)
        logits = logits.to(torch.float32) + bias.always + early
    if settings is None:
        return logits.argmax(-1)
    logits = logits.to(torch.float32)
    if counts is not None:
        logits = penalise(logits, settings, counts)
    if filters:
        logits = restrict(logits, settings)
    return draw(logits, settings, position)


class Drawing(NamedTuple):
    """How the rows of a batch draw, as `choose` takes it, and what they have drawn so far."""

    settings: Knobs | None = None
    filters: bool = False
    counts: Counts | None = None
    bias: Bias | None = None

    def draw(self, logits: Tensor, position: Tensor) -> Tensor:
        """A token [batch] of each row of logits [batch, vocab]."""
        return choose(logits, position, *self)

    def after(self, tokens: Tensor) -> "Drawing":
        """Having drawn tokens [batch] as well; -1 counts for nothing."""
        if self.counts is None:
            return self
        return self._replace(counts=count_output(self.counts, tokens))


def restrict(
    logits: Float32[Tensor, "batch vocab"], settings: Shaped[Knobs]
) -> Float32[Tensor, "batch vocab"]:
    """Logits with the tokens that top_k, top_p and min_p rule out at -inf; the likeliest stays."""
    heat = settings.temperature.where(settings.temperature > 0, 1)[:, None]
    ordered, token = logits.sort(dim=-1, descending=True, stable=True)
    ordered = (ordered - ordered[:, :1]) / heat  # at most 0: no temperature overflows to inf
    rank = torch.arange(logits.shape[-1], device=logits.device)
    off = settings.top_k[:, None] == 0
    ordered = ordered.where(off | (rank < settings.top_k[:, None]), -torch.inf)
    share = ordered.softmax(-1)
    before, top_p = share.cumsum(-1) - share, settings.top_p[:, None]
    keep = (before < top_p) | (top_p >= 1)  # off is off: a rounded sum reaches 1 before the end
    keep = keep & (share >= settings.min_p[:, None] * share[:, :1])
    keep = (keep & ordered.isfinite()) | (rank == 0)
    return logits.where(torch.zeros_like(keep).scatter(-1, token, keep), -torch.inf)


def penalise(
    logits: Float32[Tensor, "batch vocab"], settings: Shaped[Knobs], counts: Shaped[Counts]
) -> Float32[Tensor, "batch vocab"]:
    """Logits after the repetition, presence and frequency penalties."""
    made = counts.output > 0
    repeat = settings.repetition_penalty[:, None]
    repeated = torch.where(logits > 0, logits / repeat, logits * repeat)
    logits = repeated.where(counts.prompt | made, logits)
    presence, frequency = settings.presence_penalty, settings.frequency_penalty
    return logits - presence[:, None] * made - frequency[:, None] * counts.output


def count_prompt(
    tokens: Int[Tensor, "batch seq"], valid: Bool[Tensor, "batch seq"], vocab: int
) -> Counts:
    """Counts of rows that have consumed a prompt and generated nothing."""
    batch, device = tokens.shape[0], tokens.device
    seen = torch.zeros(batch, vocab, dtype=torch.int32, device=device)
    seen = seen.scatter_add(1, tokens.where(valid, 0).long(), valid.to(torch.int32))
    return Counts(seen > 0, torch.zeros_like(seen))


def count_output(counts: Shaped[Counts], tokens: Int64[Tensor, " batch"]) -> Counts:
    """Counts after each row generated a token; -1 counts for nothing."""
    made = (tokens >= 0).to(torch.int32)[:, None]
    output = counts.output.scatter_add(1, tokens.clamp(min=0)[:, None], made)
    return counts._replace(output=output)
