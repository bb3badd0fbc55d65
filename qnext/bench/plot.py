"""A run as a picture: how long answers took, and what went on over time."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qnext.bench.figures import INTERRUPTED, Record
from qnext.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY, PALE = "#1f5fa8", "#d9731a", "#555555", "#a9c6e8"
BINS, CELLS = 30, 400
TOP = 1.25  # of the highest value: room for the legend
Series = tuple["np.ndarray[Any, np.dtype[np.float64]]", "np.ndarray[Any, np.dtype[np.float64]]"]


def import_figure() -> Any:
    """matplotlib's Figure, which the rest of qnext does without."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError(
            f"--plot needs the extra: pip install 'qnext[bench]' ({error.name} is missing)"
        ) from error
    return Figure


def draw(records: Sequence[Record], seconds: float, title: str, path: Path) -> None:
    """Write the picture of a run as PNG."""
    figure = import_figure()(figsize=(12, 8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(2, 2)
    good = [record for record in records if record.error is None]
    _draw_first(axes[0, 0], [r.ttft for r in good])
    _draw_rest(axes[0, 1], [r.tpot for r in good])
    _draw_throughput(axes[1, 0], records, seconds)
    _draw_under_way(axes[1, 1], records, seconds)
    for each in axes.flat:
        each.grid(alpha=0.25, linewidth=0.6)
        each.set_axisbelow(True)
        each.spines[["top"]].set_visible(False)
    figure.savefig(path, format="png", dpi=120)


def _draw_first(axes: "Axes", values: Iterable[float | None]) -> None:
    times = _milliseconds(values)
    _name(axes, "Time to the first text (TTFT)", "ms", "requests")
    if not times.size:
        _say_empty(axes)
        return
    heights, _, _ = axes.hist(times, bins=BINS, color=PALE, label="requests")
    axes.set_ylim(0, TOP * float(np.max(heights)))
    share = axes.twinx()
    share.set_ylabel("share of requests")
    share.spines[["top"]].set_visible(False)
    _draw_cdf(share, times)
    # one legend for both scales, in front of the curve
    handles = [*axes.get_legend_handles_labels()[0], *share.get_legend_handles_labels()[0]]
    share.legend(handles=handles, loc="upper center", ncols=2, fontsize=9)


def _draw_rest(axes: "Axes", values: Iterable[float | None]) -> None:
    times = _milliseconds(values)
    _name(axes, "Time per output token after it (TPOT)", "ms", "share of requests")
    if not times.size:
        _say_empty(axes)
        return
    _draw_cdf(axes, times)
    axes.legend(loc="upper center", ncols=3, fontsize=9)


def _draw_cdf(axes: "Axes", times: "np.ndarray[Any, np.dtype[np.float64]]") -> None:
    from matplotlib.ticker import PercentFormatter

    axes.ecdf(times, color=BLUE, linewidth=1.6, label="as fast or faster")
    axes.set_ylim(0, TOP)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    for percent, style in ((50, "--"), (99, ":")):
        value = float(np.percentile(times, percent))
        name = f"p{percent}: {value:.4g} ms"
        axes.axvline(value, color=ORANGE, linestyle=style, linewidth=1.2, label=name)


def _draw_throughput(axes: "Axes", records: Sequence[Record], seconds: float) -> None:
    _name(axes, "Output over time", "seconds", "tokens/s")
    edges, rates = throughput(records, seconds)
    if not rates.any():
        _say_empty(axes)
        return
    axes.stairs(rates, edges, color=PALE, fill=True)
    axes.stairs(rates, edges, color=BLUE, linewidth=1.4, label="in 1 s bins")
    mean = float((rates * np.diff(edges)).sum() / edges[-1])
    axes.axhline(mean, color=ORANGE, linestyle="--", linewidth=1.2, label=f"mean: {mean:.4g}")
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(0, TOP * rates.max())
    axes.legend(loc="upper right", ncols=2, fontsize=9)


def _draw_under_way(axes: "Axes", records: Sequence[Record], seconds: float) -> None:
    from matplotlib.ticker import MaxNLocator

    _name(axes, "Requests under way", "seconds", "requests")
    if not records:
        _say_empty(axes)
        return
    edges, counts = under_way([(r.sent, r.ended) for r in records], seconds)
    axes.stairs(counts, edges, color=BLUE, linewidth=1.4, baseline=None, label="under way")
    waits = [(r.sent, r.text_times[0] if r.text_times else r.ended) for r in records]
    edges, counted = under_way(waits, seconds)
    axes.stairs(counted, edges, color=ORANGE, fill=True, alpha=0.35, label="no text yet")
    failed = [r for r in records if r.error not in (None, INTERRUPTED)]
    if failed:
        level = [0.0] * len(failed)
        ends = [r.ended for r in failed]
        axes.plot(ends, level, "x", color="#b01818", clip_on=False, zorder=5, label="failed")
    axes.set_xlim(0, max(seconds, 1e-3))
    axes.set_ylim(0, TOP * counts.max())
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right", ncols=3, fontsize=9)


def throughput(records: Sequence[Record], seconds: float) -> Series:
    """Edges of bins of 1 s, the last up to 2 s wide, and output tokens/s in each.

    A request's tokens are shared out evenly over its events. Where they were not told, an event
    counts as one of the others does on average.
    """
    told = [r for r in records if r.output_tokens is not None and r.text_times]
    events = sum(len(r.text_times) for r in told)
    usual = sum(r.output_tokens or 0 for r in told) / events if events else 1.0
    edges = np.append(np.arange(max(int(seconds), 1), dtype=np.float64), max(seconds, 1e-3))
    times = [time for r in records for time in r.text_times]
    weights: list[float] = []
    for r in records:
        count = len(r.text_times)
        each = usual if r.output_tokens is None else r.output_tokens / max(count, 1)
        weights += [each] * count
    sums, _ = np.histogram(times, bins=edges, weights=weights)
    return edges, sums / np.diff(edges)


def under_way(spans: Sequence[tuple[float, float]], seconds: float, cells: int = CELLS) -> Series:
    """Edges of cells of time, and how many of the spans hold each on average.

    A closed loop has a short gap after each request, which would be a forest of spikes.
    """
    edges = np.linspace(0, max(seconds, 1e-3), cells + 1)
    ends = np.array(spans, dtype=np.float64).reshape(-1, 2)
    lasted = np.zeros(cells)
    for begin, end in ends:
        lasted += np.diff(np.clip(edges, begin, end))
    return edges, lasted / np.diff(edges)


def _milliseconds(values: Iterable[float | None]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    return 1e3 * np.array([value for value in values if value is not None], dtype=np.float64)


def _name(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _say_empty(axes: "Axes") -> None:
    axes.text(0.5, 0.5, "nothing measured", ha="center", transform=axes.transAxes, color=GREY)
