"""Decode steps and prefills as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qnext.bench.plot import BLUE, GREY, ORANGE, TOP, import_figure
from qnext.bench.steps.measure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

COLOURS = {"cpu": BLUE, "reference": ORANGE}


def draw_decode(figures: Sequence[Figure], limit: float, title: str, path: Path) -> None:
    """Tokens per second by batch, below what the memory's bandwidth allows."""
    picture, axes = _axes(f"Decode: {title}", "rows", "tokens/s")
    batches = sorted({f.batch for f in figures})
    targets = list(dict.fromkeys(f.target for f in figures))
    width = 0.8 / len(targets)
    for i, target in enumerate(targets):
        mine = [f for f in figures if f.target == target]
        at = [batches.index(f.batch) + (i - (len(targets) - 1) / 2) * width for f in mine]
        axes.bar(at, [f.rate for f in mine], width, color=COLOURS[target], label=target)
    most = {f.batch: f.batch * limit / f.least for f in figures}
    ends = [(at - 0.45, at + 0.45) for at in range(len(batches))]
    for batch, (begin, end) in zip(batches, ends, strict=True):
        name = f"reading at {limit / 1e9:.1f} GB/s" if batch == batches[0] else ""
        axes.hlines(most[batch], begin, end, color=GREY, linestyle="--", label=name)
    axes.set_xticks(range(len(batches)), [str(b) for b in batches])
    axes.set_ylim(0, TOP * max(*most.values(), *(f.rate for f in figures)))
    axes.legend(loc="upper left", ncols=3, fontsize=9)
    picture.savefig(path, format="png", dpi=120)


def draw_prefill(figures: Sequence[Figure], limit: float, title: str, path: Path) -> None:
    """Seconds by length, on logarithmic scales: time that grows as the length is a line at 45°."""
    picture, axes = _axes(f"Prefill: {title}", "tokens", "seconds")
    lengths = sorted({f.length for f in figures})
    for target in dict.fromkeys(f.target for f in figures):
        mine = sorted((f for f in figures if f.target == target), key=lambda f: f.length)
        seconds = [f.seconds for f in mine]
        axes.plot([f.length for f in mine], seconds, "o-", color=COLOURS[target], label=target)
    least = {f.length: f.least / limit for f in figures}
    name = f"{limit / 1e9:.0f} GFLOP/s"
    axes.plot(lengths, [least[n] for n in lengths], "--", color=GREY, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.legend(fontsize=9)
    picture.savefig(path, format="png", dpi=120)


def _axes(title: str, x: str, y: str) -> "tuple[Picture, Axes]":
    picture = import_figure()(figsize=(8, 5), layout="constrained")
    axes = picture.subplots()
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return picture, axes
