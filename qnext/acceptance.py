"""How guesses fared: what speculation accepted, by position, and how many tokens a step made."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Acceptance:
    """Counts of one text, or of many added up.

    Of each position in a draft: how many guesses there were judged, and how many were accepted with
    all before them. A guess behind the end of a text was not judged, as neither right nor wrong.
    """

    steps: int = 0
    tokens: int = 0
    judged: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()

    @property
    def rates(self) -> tuple[float | None, ...]:
        """The share accepted at each position, of all drafts judged there; None of none."""
        pairs = zip(self.accepted, self.judged, strict=True)
        return tuple(right / judged if judged else None for right, judged in pairs)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a row consumed in a call of the model, on average."""
        return self.tokens / self.steps if self.steps else 0.0

    def __add__(self, other: "Acceptance") -> "Acceptance":
        return Acceptance(
            self.steps + other.steps,
            self.tokens + other.tokens,
            _sums(self.judged, other.judged),
            _sums(self.accepted, other.accepted),
        )

    def __str__(self) -> str:
        if not self.steps:
            return "no step yet"
        rates = ", ".join("-" if rate is None else f"{rate:.2f}" for rate in self.rates)
        return f"accepted {rates} by position; {self.tokens_per_step:.2f} tokens a step"


def of_step(tokens: int, draft: int, room: int, ended: bool) -> Acceptance:
    """One row's step that consumed `tokens` of the `room` it had, all but the first being guesses.

    Where the step ended the text, or without room, guesses further on were not judged.
    """
    right = tokens - 1
    judged = right if ended else min(draft, room - 1)
    return Acceptance(1, tokens, _ones(judged, draft), _ones(right, draft))


def _ones(count: int, width: int) -> tuple[int, ...]:
    return (1,) * count + (0,) * (width - count)


def _sums(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    width = max(len(a), len(b))
    pairs = zip(a + (0,) * (width - len(a)), b + (0,) * (width - len(b)), strict=True)
    return tuple(x + y for x, y in pairs)


NONE = Acceptance()
