"""Figures for people who study a model; needs the extra: pip install 'qnext[plot]'.

Each function takes values and returns a matplotlib Figure, which a notebook shows by itself and
`figure.savefig(path)` writes.
"""

import io
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qnext.errors import InputError
from qnext.measure import Reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d9731a", "#4a9a5c", "#8a8f98"
COLORS = ("#1f5fa8", "#d9731a", "#4a9a5c", "#9a6fb0", "#c0504d", "#5aa5b8", "#8a8f98", "#b59a2e")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, drawn without a display; notebooks show it as PNG.

    Raises InputError without the extra.
    """
    return _class()(figsize=(width, height), layout="constrained")


@cache
def _class() -> "type[Figure]":
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError(
            f"figures need the extra: pip install 'qnext[plot]' ({error.name} is missing)"
        ) from error

    class Picture(Figure):
        """A Figure that a notebook shows without pyplot, which keeps every figure it made."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=90)
            return buffer.getvalue()

    return Picture


def _plain(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def reading(found: Reading, pieces: Sequence[str] = ()) -> "Figure":
    """States over a text: norm and effective rank of each layer, mean over heads, and the range of
    its heads shaded; below them the half-life of each head.

    pieces: the text of each token, written along the axis where there are few.
    """
    figure = new_figure(10, 8)
    norm, rank, half = figure.subplots(3, 1)
    for at, number in enumerate(found.layers):
        color = COLORS[at % len(COLORS)]
        for axes, values in ((norm, found.norm[:, at]), (rank, found.rank[:, at])):
            low, high = values.amin(-1), values.amax(-1)
            axes.fill_between(range(len(values)), low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(values.mean(-1), color=color, label=f"layer {number}")
    _plain(norm, "Size of recurrent states", "token", "Frobenius norm")
    _plain(rank, "How many directions they hold", "token", "effective rank")
    norm.legend(fontsize=8, ncols=len(found.layers), loc="upper left")
    lives = half_life(found.decay.flatten(1)).T
    shown = half.imshow(
        lives.clamp(0.1, 1000).log10().numpy(),
        aspect="auto",
        cmap="viridis",
        interpolation="nearest",
    )
    half.set_title("How long a head remembers: half-life of its state", fontsize=10)
    heads = found.decay.shape[2]
    half.set_yticks(
        [at * heads + (heads - 1) / 2 for at in range(len(found.layers))],
        [f"layer {number}" for number in found.layers],
    )
    for at in range(1, len(found.layers)):
        half.axhline(at * heads - 0.5, color="white", linewidth=0.8)
    half.set(xlabel="token", ylabel="head")
    bar = figure.colorbar(shown, ax=half, label="tokens")
    bar.set_ticks([-1, 0, 1, 2, 3], labels=["0.1", "1", "10", "100", "1000"])
    if pieces and len(pieces) <= 60:
        half.set_xticks(range(len(pieces)), [p.strip() or "·" for p in pieces], rotation=90)
        half.tick_params(axis="x", labelsize=7)
    return figure


def half_life(decay: Tensor) -> Tensor:
    """Tokens after which half of a state is left, at a token's decay; inf where nothing is lost."""
    return (torch.tensor(0.5).log() / decay.clamp(max=1).log()).abs()


def matrices(values: Mapping[str, Tensor], label: str = "") -> "Figure":
    """Matrices [rows, columns] side by side, on one scale that is the same above and below zero."""
    figure = new_figure(2.6 * len(values) + 1, 3)
    most = max(float(value.abs().max()) for value in values.values()) or 1.0
    all_axes = figure.subplots(1, len(values), squeeze=False)[0]
    for axes, (name, value) in zip(all_axes, values.items(), strict=True):
        shown = axes.imshow(value.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        axes.set_title(name, fontsize=10)
        axes.set(xlabel="key channel", ylabel="value channel")
    figure.colorbar(shown, ax=all_axes, label=label)
    return figure


def bars(values: Mapping[str, float], title: str, label: str) -> "Figure":
    """A bar for each of some values."""
    figure = new_figure(8, 3)
    axes = figure.subplots()
    drawn = axes.bar(list(values), list(values.values()), color=BLUE)
    axes.bar_label(drawn, fmt="%.3g", fontsize=8, padding=2)
    axes.margins(y=0.15)
    _plain(axes, title, "", label)
    return figure


def acceptance(
    by_position: Mapping[str, Sequence[float]],
    cost: Mapping[str, float],
    tokens: Mapping[str, float],
) -> "Figure":
    """Speculation: how often the guess at each position is right, and what that brings.

    by_position: of each width the share of guesses accepted at positions 1, 2, ... cost: of each
    width what a step costs, plain decoding being 1. tokens: what a step yields.
    """
    figure = new_figure(10, 3.6)
    left, right = figure.subplots(1, 2)
    for (name, shares), color in zip(by_position.items(), COLORS, strict=False):
        left.plot(range(1, len(shares) + 1), shares, "o-", color=color, label=name)
    left.set_ylim(0, 1.03)
    left.xaxis.get_major_locator().set_params(integer=True)
    _plain(left, "Guesses that were right", "position of the guess", "share accepted")
    left.legend(fontsize=8)
    names = list(cost)
    at = torch.arange(len(names))
    right.bar(at - 0.2, [tokens[n] for n in names], 0.38, color=BLUE, label="tokens a step")
    right.bar(at + 0.2, [cost[n] for n in names], 0.38, color=ORANGE, label="cost of a step")
    for place, name in zip(at.tolist(), names, strict=True):
        gain = tokens[name] / cost[name]
        right.annotate(
            f"x {gain:.2f}", (place, max(tokens[name], cost[name]) + 0.05), ha="center", fontsize=8
        )
    right.set_xticks(at, names)
    right.set_ylim(0, 1.2 * max(*tokens.values(), *cost.values()))
    _plain(right, "What a step yields and costs", "", "of plain decoding")
    right.legend(fontsize=8, loc="upper left")
    return figure


def launches(steps: Mapping[str, Mapping[str, int]]) -> "Figure":
    """Launches of some steps as stacked bars. steps: of each the launches of its kinds of sites."""
    figure = new_figure(10, 1 + 0.6 * len(steps))
    axes = figure.subplots()
    totals: dict[str, int] = {}
    for kinds in steps.values():
        for kind, count in kinds.items():
            totals[kind] = totals.get(kind, 0) + count
    kept = sorted(totals, key=lambda kind: -totals[kind])[: len(COLORS) - 1]
    names, left = list(steps), [0] * len(steps)
    for kind, color in zip((*kept, "others"), COLORS, strict=False):
        widths = [
            sum(n for k, n in kinds.items() if k == kind or (kind == "others" and k not in kept))
            for kinds in steps.values()
        ]
        axes.barh(names, widths, left=left, color=color, label=kind, edgecolor="white")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        axes.annotate(f" {total:,}", (total, place), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(left))
    _plain(axes, "Launches of a step", "launches", "")
    figure.legend(fontsize=8, ncols=4, loc="outside lower center")
    return figure


def layer_errors(errors: Mapping[str, Sequence[float]], kinds: Sequence[str]) -> "Figure":
    """Relative error after each layer, a line a way of computing. kinds: what each layer is."""
    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    for (name, values), color in zip(errors.items(), COLORS, strict=False):
        axes.semilogy(range(len(values)), values, "o-", color=color, label=name)
    axes.set_xticks(range(len(kinds)), [f"{n}\n{kind}" for n, kind in enumerate(kinds)])
    _plain(axes, "Error after each layer", "layer", "relative error (RMS)")
    axes.legend(fontsize=8)
    return figure


def losses(values: Mapping[str, Sequence[float]], every: int = 1) -> "Figure":
    """Losses over training steps, a line a series; every: steps between two values."""
    figure = new_figure(8, 3.4)
    axes = figure.subplots()
    for (name, series), color in zip(values.items(), COLORS, strict=False):
        axes.plot([every * n for n in range(len(series))], series, color=color, label=name)
    axes.set_ylim(bottom=0)
    _plain(axes, "Training", "step", "loss [nats a token]")
    axes.legend(fontsize=8)
    return figure
