"""What became of requests, the figures made of that, and how they are told.

Times are in seconds since the run began.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

INTERRUPTED = "interrupted"  # a request that Ctrl-C cut off: neither answered nor an error
DIGITS = 6  # of seconds in JSON: microseconds
LONGEST_EXAMPLE = 100


@dataclass
class Record:
    """One request. Counts of tokens are the server's own, None where it told none."""

    index: int
    planned: float | None = None  # when it should be sent; None where the last answer decides
    sent: float = 0.0
    ended: float = 0.0
    text_times: list[float] = field(default_factory=list)  # when text (or a call) arrived
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    accepted_guesses: int | None = None
    rejected_guesses: int | None = None
    finish: str | None = None
    error: str | None = None  # its kind
    message: str | None = None

    @property
    def ttft(self) -> float | None:
        """Time to the first text."""
        return self.text_times[0] - self.sent if self.text_times else None

    @property
    def tpot(self) -> float | None:
        """Time for each output token after the first; None where all text came at once."""
        if len(self.text_times) < 2 or self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.text_times[-1] - self.text_times[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Times between events with text; an event may hold several tokens."""
        return [float(gap) for gap in np.diff(self.text_times)]

    @property
    def latency(self) -> float:
        """Time from sending to the end of the answer."""
        return self.ended - self.sent

    def to_json(self) -> dict[str, Any]:
        made = {**asdict(self), "ttft": self.ttft, "tpot": self.tpot, "latency": self.latency}
        return {name: _rounded(value) for name, value in made.items()}


@dataclass(frozen=True)
class Spread:
    """How values of many requests are spread."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True)
class ErrorKind:
    count: int
    example: str


@dataclass(frozen=True)
class Figures:
    """A run in numbers. Tokens, rates and spreads are of answered requests alone."""

    seconds: float
    sent: int
    answered: int
    failed: int
    interrupted: int
    without_usage: int  # answered, but their tokens were not told
    requests_per_second: float
    input_tokens: int
    output_tokens: int
    input_tokens_per_second: float
    output_tokens_per_second: float
    cached_tokens: int | None
    accepted_guesses: int | None
    rejected_guesses: int | None
    errors: dict[str, ErrorKind]
    ttft: Spread | None
    tpot: Spread | None
    gaps: Spread | None
    latency: Spread | None
    lateness: Spread | None  # of sending, behind the plan; tells whether the client kept up

    def to_json(self) -> dict[str, Any]:
        """Nested dicts, times rounded."""
        made: dict[str, Any] = _rounded(asdict(self))
        return made


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the values that are there; None of none."""
    there = np.array([value for value in values if value is not None], dtype=np.float64)
    if not there.size:
        return None
    p50, p90, p95, p99 = (float(p) for p in np.percentile(there, [50, 90, 95, 99]))
    low, high = float(there.min()), float(there.max())
    return Spread(there.size, float(there.mean()), low, p50, p90, p95, p99, high)


def measure(records: Sequence[Record], seconds: float) -> Figures:
    """The figures of a run that took so long."""
    good = [record for record in records if record.error is None]
    cut = [record for record in records if record.error == INTERRUPTED]
    span = max(seconds, 1e-9)
    taken = _total(good, lambda r: r.input_tokens) or 0
    made = _total(good, lambda r: r.output_tokens) or 0
    plans = [None if r.planned is None else r.sent - r.planned for r in records]
    return Figures(
        seconds=seconds,
        sent=len(records),
        answered=len(good),
        failed=len(records) - len(good) - len(cut),
        interrupted=len(cut),
        without_usage=sum(record.output_tokens is None for record in good),
        requests_per_second=len(good) / span,
        input_tokens=taken,
        output_tokens=made,
        input_tokens_per_second=taken / span,
        output_tokens_per_second=made / span,
        cached_tokens=_total(good, lambda r: r.cached_tokens),
        accepted_guesses=_total(good, lambda r: r.accepted_guesses),
        rejected_guesses=_total(good, lambda r: r.rejected_guesses),
        errors=_errors(records),
        ttft=spread(record.ttft for record in good),
        tpot=spread(record.tpot for record in good),
        gaps=spread(gap for record in good for gap in record.gaps),
        latency=spread(record.latency for record in good),
        lateness=spread(plans),
    )


def _total(records: Sequence[Record], of: Callable[[Record], int | None]) -> int | None:
    """The sum of a count over the requests where it was told; None where it never was."""
    told = [count for record in records if (count := of(record)) is not None]
    return sum(told) if told else None


def _errors(records: Sequence[Record]) -> dict[str, ErrorKind]:
    """Kinds of errors, the most frequent first, each with the first message of its kind."""
    examples: dict[str, str] = {}
    counts: dict[str, int] = {}
    for record in records:
        if record.error is not None and record.error != INTERRUPTED:
            counts[record.error] = counts.get(record.error, 0) + 1
            examples.setdefault(record.error, record.message or "")
    order = sorted(counts, key=lambda kind: -counts[kind])
    return {kind: ErrorKind(counts[kind], examples[kind]) for kind in order}


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return round(value, DIGITS)
        case dict():
            return {name: _rounded(inner) for name, inner in value.items()}
        case list():
            return [_rounded(inner) for inner in value]
    return value


# ---- the report


def report(figures: Figures, load: Sequence[tuple[str, str]]) -> str:
    """Figures as aligned lines; `load` tells what was asked, as (name, text) lines before them."""
    lines = [*load, *_outcomes(figures), *_tokens(figures)]
    width = max(len(name) for name, _ in lines) + 2
    told = [f"{name:<{width}}{text}" for name, text in lines]
    return "\n".join([*told, "", *_spreads(figures), *_told_errors(figures)])


def _outcomes(figures: Figures) -> list[tuple[str, str]]:
    counts = f"{figures.answered} answered, {figures.failed} failed"
    if figures.interrupted:
        counts += f", {figures.interrupted} cut off"
    return [
        ("requests", f"{counts}, in {figures.seconds:.2f} s"),
        ("", f"{figures.requests_per_second:.2f} answered/s"),
    ]


def _tokens(figures: Figures) -> list[tuple[str, str]]:
    taken, made = figures.input_tokens, figures.output_tokens
    if figures.answered and figures.without_usage == figures.answered:
        return [("tokens", "not told: the server sends no usage")]
    lines = [
        ("input tokens", f"{taken}, {figures.input_tokens_per_second:.1f}/s"),
        ("output tokens", f"{made}, {figures.output_tokens_per_second:.1f}/s"),
    ]
    if figures.cached_tokens is not None:
        cached = f"{figures.cached_tokens}, {_share(figures.cached_tokens, taken)} of input tokens"
        lines.insert(1, ("cached tokens", cached))
    right, wrong = figures.accepted_guesses or 0, figures.rejected_guesses or 0
    if right + wrong:
        share = _share(right, right + wrong)
        lines.append(("guesses", f"{right} accepted of {right + wrong}, {share}"))
    if figures.without_usage:
        lines.append(("", f"the tokens of {figures.without_usage} answers were not told"))
    return lines


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _spreads(figures: Figures) -> list[str]:
    rows = [
        ("TTFT, to the first text", figures.ttft),
        ("TPOT, an output token after it", figures.tpot),
        ("between events with text", figures.gaps),
        ("whole request", figures.latency),
    ]
    if figures.lateness is not None:
        rows.append(("sent behind the plan", figures.lateness))
    columns = ["mean", "min", "p50", "p90", "p95", "p99", "max"]
    lines = [f"{'milliseconds':<32}" + "".join(f"{name:>10}" for name in columns)]
    for name, values in rows:
        cells = ["-" if values is None else _ms(getattr(values, column)) for column in columns]
        lines.append(f"{name:<32}" + "".join(f"{cell:>10}" for cell in cells))
    return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds < 100 else f"{1e3 * seconds:.0f}"


def _told_errors(figures: Figures) -> list[str]:
    if not figures.errors:
        return []
    width = max(len(kind) for kind in figures.errors) + 2
    lines = ["", f"{'errors':<{width}}{'count':>6}  for example"]
    for kind, told in figures.errors.items():
        example = " ".join(told.example.split())
        short = example if len(example) <= LONGEST_EXAMPLE else f"{example[:LONGEST_EXAMPLE]}..."
        lines.append(f"{kind:<{width}}{told.count:>6}  {short}".rstrip())
    return lines
