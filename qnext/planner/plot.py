"""Plans as a picture: where a token's time goes, and what fills a card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qnext.bench.plot import import_figure
from qnext.functional.state import pages_of
from qnext.planner.assumed import MEASURED_SECONDS
from qnext.planner.plan import Plan

COLORS = {
    "experts": "#3b6fb6",
    "other weights": "#7fb0e0",
    "states and keys": "#4a9a5c",
    "all other sites": "#b8d8b0",
    "launches": "#e0a030",
    "collectives, latency": "#9a6fb0",
    "collectives, bytes": "#cdb3da",
}
FILLS = {
    "experts": "#3b6fb6",
    "other weights": "#7fb0e0",
    "workspace": "#b8d8b0",
    "HCCL": "#9a6fb0",
    "recurrent states": "#4a9a5c",
    "keys and values": "#e0a030",
}


def draw(plans: Sequence[Plan], length: int, title: str, measured: bool, path: Path) -> None:
    """Write the picture of some plans as PNG. length: tokens of a request. measured: whether the
    measured point is one of this load."""
    figure = import_figure()(figsize=(12, 1.8 + 0.5 * len(plans)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    times, room = figure.subplots(1, 2, sharey=True)
    names = [f"tp {p.mesh.tp}, dp {p.mesh.dp}, ep {p.mesh.ep}" for p in plans]
    shares = [{k: 1e3 * v / p.tokens_a_step for k, v in p.step.parts.items()} for p in plans]
    _bars(times, names, shares, COLORS, "ms")
    times.set(xlabel="time a token [ms]", xlim=(0, 1.12 * max(sum(s.values()) for s in shares)))
    if measured:
        times.set_xlim(0, 1.1e3 * MEASURED_SECONDS)
        times.axvline(1e3 * MEASURED_SECONDS, color="black", linestyle=":")
        said = f"measured, SGLang\n{1e3 * MEASURED_SECONDS:.2f}"
        times.annotate(said, (1e3 * MEASURED_SECONDS, len(plans) / 2), ha="right")
    _bars(room, names, [_filled(plan, length) for plan in plans], FILLS, "GB")
    most = plans[0].memory.usable / 1e9
    room.axvline(most, color="black", linestyle=":", label="usable")
    room.set(xlabel="memory of a card with this load [GB]")
    times.invert_yaxis()
    for axes in (times, room):
        axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=120, bbox_inches="tight")


def _filled(plan: Plan, length: int) -> dict[str, float]:
    """GB of a card that the load itself takes."""
    memory = plan.memory
    return {
        "experts": memory.experts / 1e9,
        "other weights": memory.others / 1e9,
        "workspace": memory.workspace / 1e9,
        "HCCL": memory.buffers / 1e9,
        "recurrent states": plan.rows * memory.a_request / 1e9,
        "keys and values": plan.rows * pages_of(length) * memory.a_page / 1e9,
    }


def _bars(
    axes: Any,
    names: Sequence[str],
    rows: Sequence[dict[str, float]],
    colors: dict[str, str],
    unit: str,
) -> None:
    left = [0.0] * len(rows)
    for part, color in colors.items():
        widths = [row.get(part, 0.0) for row in rows]
        axes.barh(names, widths, left=left, color=color, label=part, edgecolor="white")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for at, total in enumerate(left):
        axes.annotate(f" {total:.1f} {unit}", (total, at), va="center", fontsize=8)
