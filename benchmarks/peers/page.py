"""What a run of `benchmarks.peers` found: figures of all cases, as a page and as a picture."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.noise import CLEAN
from benchmarks.peers.runs import NEW, OURS, PEER, PROMPT, REPEATS, ROUNDS, SIDES, STEPS, Cell
from qnext.bench.plot import BLUE, GREY, ORANGE, TOP, import_figure

NAMES = {"decode1": "decode, 1 row", "decode8": "decode, 8 rows", "prefill": "prefill"}
COLOURS = {OURS: BLUE, PEER: ORANGE}
Row = dict[str, Any]
PAGE = """\
# Beside llama.cpp

The `cpu` target and llama.cpp on one checkpoint, each run a process of its own, in turn. Written by

```bash
{command}
```

Commit {commit}, {cpu} ({machine}, {capability}), torch {torch}, llama.cpp {peer}.
Rounds: {rounds}.

## How it was measured

- In each round every case runs on one side, then on the other; the order changes from round to
  round. Figures are medians.
- {gate}
- Decode follows a prompt of {prompt} tokens. A run of qnext is {ours_rounds} rounds of {steps}
  steps, of which the median step counts; one of llama.cpp is {repeats} repetitions of {new} tokens,
  or one with 8 rows, of which the mean of {new} steps counts.
- The limit of a decode step is the time of reading its bytes (weights, recurrent states, keys and
  values; experts as if all choices differed) at the bandwidth that each run of qnext measures
  beside it. The limit of a prefill is the time of its operations at the speed of a large product
  in float32, measured likewise: products of int8 and bfloat16 may pass it. Both sides are told
  against the limit of qnext's own bytes and operations.
- `f32` is the checkpoint as it is stored, `bf16` all of it in bfloat16. `q8_0` is W8A8 with the
  head in int8 for qnext, and llama.cpp's format of that name. Both sides read a checkpoint that is
  stored in the precision. Before one is timed its logits are compared with those of the float32
  reference.
"""
GATE = (
    f"A run during which other processes used more than {CLEAN:.0%} of the machine is thrown away\n"
    "  and repeated; runs are told as those that count, of all."
)
NO_GATE = "This machine does not tell what other processes use: no run was thrown away."
STARTS_PAGE = """\
## From a start to the first token

Files of weights are put out of the page cache before a cold start and read into it before a warm
one. Times of llama.cpp are of a whole process that reads one token; qnext's are told with Python
and its imports, and without. Ratios are llama.cpp's seconds by qnext's.

"""
MEMORY_PAGE = """\
## Memory

The most that a process of decode with one row had, loading and quantising included. llama.cpp
maps its file.

"""


def rate(cell: Cell) -> Row:
    """Tokens per second of both sides, their ratio, and what they reach of the limit."""
    tokens, least, most = (cell.median(OURS, name) for name in ("tokens", "least", "most"))
    limit = tokens * most / least
    row: Row = {"case": cell.case, "precision": cell.precision, "most": most, "limit": limit}
    for side in SIDES:
        each = cell.median(side, "tokens_per_second")
        row[side] = {"tokens_per_second": each, "of_limit": each / limit, **_counts(cell, side)}
    return row | {"ratio": row[OURS]["tokens_per_second"] / row[PEER]["tokens_per_second"]}


def start(cell: Cell) -> Row:
    """Seconds to the first token of both sides, and how many times as fast ours is."""
    row: Row = {"case": cell.case, "precision": cell.precision}
    for side in SIDES:
        names = ("process_seconds", "read_bytes")
        row[side] = {name: cell.median(side, name) for name in names} | _counts(cell, side)
    for name in ("import_seconds", "first_seconds"):
        row[OURS][name] = cell.median(OURS, name)
    theirs = row[PEER]["process_seconds"]
    return row | {
        "process_ratio": theirs / row[OURS]["process_seconds"],
        "first_ratio": theirs / row[OURS]["first_seconds"],
    }


def memory(cell: Cell, held: float, file: int) -> Row:
    """Peak bytes of both sides, beside weights and state and beside the peer's file."""
    peak = cell.median(OURS, "peak_bytes")
    return {
        "precision": cell.precision,
        OURS: {"peak_bytes": peak, "held_bytes": held, "over_bytes": peak - held},
        PEER: {"peak_bytes": cell.median(PEER, "peak_bytes"), "file_bytes": file},
    }


def _counts(cell: Cell, side: str) -> Row:
    return {"runs": len(cell.clean(side)), "started": len(cell.runs[side])}


def _runs(row: Row) -> str:
    return ", ".join(f"{row[side]['runs']} of {row[side]['started']}" for side in SIDES)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 2) -> str:
    """A table, of which the first columns are words."""
    rules = ["---" if i < words else "---:" for i in range(len(heads))]
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows)]
    return "\n".join(lines) + "\n"


def rates_table(rates: Sequence[Row]) -> str:
    heads = ["case", "precision", f"{OURS} tokens/s", f"{PEER} tokens/s", "ratio"]
    heads += [f"{OURS}, of the limit", f"{PEER}, of the limit", f"runs of {OURS}, of {PEER}"]
    return markdown(
        heads,
        [
            (
                NAMES[row["case"]],
                row["precision"],
                *(f"{row[side]['tokens_per_second']:.1f}" for side in SIDES),
                f"{row['ratio']:.2f}",
                *(f"{row[side]['of_limit']:.0%}" for side in SIDES),
                _runs(row),
            )
            for row in rates
        ],
    )


def starts_table(starts: Sequence[Row]) -> str:
    heads = ["start", "precision", f"{OURS} process, s", "of that imports, s"]
    heads += ["load and first token, s", f"{PEER} process, s", "ratio of processes"]
    heads += ["ratio without imports", "MB read from disk", f"runs of {OURS}, of {PEER}"]
    return markdown(
        heads,
        [
            (
                row["case"],
                row["precision"],
                f"{row[OURS]['process_seconds']:.2f}",
                f"{row[OURS]['import_seconds']:.2f}",
                f"{row[OURS]['first_seconds']:.2f}",
                f"{row[PEER]['process_seconds']:.2f}",
                f"{row['process_ratio']:.2f}",
                f"{row['first_ratio']:.2f}",
                ", ".join(_mb(row[side]["read_bytes"]) for side in SIDES),
                _runs(row),
            )
            for row in starts
        ],
    )


def memory_table(memories: Sequence[Row]) -> str:
    heads = ["precision", f"{OURS} peak, MB", "weights and state, MB", "over them, MB"]
    heads += [f"{PEER} peak, MB", "its file, MB"]
    return markdown(
        heads,
        [
            (
                row["precision"],
                *(_mb(row[OURS][n]) for n in ("peak_bytes", "held_bytes", "over_bytes")),
                *(_mb(row[PEER][n]) for n in ("peak_bytes", "file_bytes")),
            )
            for row in memories
        ],
        words=1,
    )


def _mb(count: float) -> str:
    return f"{count / 1e6:.0f}"


def faults(row: Row) -> list[str]:
    """A line for each precision and case that has no figure."""
    red = [f"{precision}: red, {why}" for precision, why in row["red"].items()]
    return red + [f"{f['case']}, {f['precision']}: not measured: {f['why']}" for f in row["faults"]]


def page(row: Row, picture: str | None) -> str:
    """The whole page; `picture` is where the plot lies, seen from it."""
    words = {name: row[name] for name in ("command", "commit", "cpu", "machine", "capability")}
    sizes = {"prompt": PROMPT, "steps": STEPS, "ours_rounds": ROUNDS, "new": NEW}
    parts = [
        PAGE.format(
            **words,
            **sizes,
            repeats=REPEATS,
            torch=row["versions"]["torch"],
            peer=row["versions"][PEER],
            rounds=row["rounds"],
            gate=GATE if row["gated"] else NO_GATE,
        )
    ]
    if row["rates"]:
        parts.append("## Tokens per second\n\n" + rates_table(row["rates"]))
    if picture:
        parts.append(f"![shares of the limit]({picture})\n")
    if row["starts"]:
        parts.append(STARTS_PAGE + starts_table(row["starts"]))
    if row["memory"]:
        parts.append(MEMORY_PAGE + memory_table(row["memory"]))
    if lines := faults(row):
        parts.append("## Without a figure\n\n" + "\n".join(f"- {line}" for line in lines) + "\n")
    return "\n".join(parts)


def draw(rates: Sequence[Row], path: Path) -> None:
    """Bars of both sides' shares of the limit, as PNG."""
    from matplotlib.ticker import PercentFormatter

    picture = import_figure()(figsize=(max(6.0, 1.2 * len(rates)), 5), layout="constrained")
    axes = picture.subplots()
    width = 0.8 / len(SIDES)
    for i, side in enumerate(SIDES):
        at = [group + (i - (len(SIDES) - 1) / 2) * width for group in range(len(rates))]
        shares = [row[side]["of_limit"] for row in rates]
        bars = axes.bar(at, shares, width, color=COLOURS[side], label=side)
        axes.bar_label(bars, [f"{share:.0%}" for share in shares], fontsize=8)
    axes.axhline(1.0, color=GREY, linestyle="--", linewidth=1.2, label="limit")
    names = [f"{NAMES[row['case']]}\n{row['precision']}" for row in rates]
    axes.set_xticks(range(len(rates)), names, fontsize=8)
    axes.set_ylim(0, TOP * max(1.0, *(row[side]["of_limit"] for row in rates for side in SIDES)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("Shares of what bandwidth and arithmetic allow", fontsize=11)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", ncols=3, fontsize=9)
    picture.savefig(path, format="png", dpi=120)
