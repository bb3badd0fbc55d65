"""A reference's two serving points on paper: tables and figure of docs/serving_points.md.

`python -m studies.serving_points` prints the tables, writes them into the page between its
markers, and writes docs/images/serving_points.png and its part of studies/results.json.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qnext.lowering.target import LAUNCH_SECONDS
from studies.inputs import IMAGES, RESULTS, record
from studies.serving_costs import (
    CUT,
    DEALT,
    DEAR,
    DEAR_LATENCY,
    DEAR_LAUNCH,
    FIRST,
    LATENCIES,
    LATENCY,
    LAUNCH_COSTS,
    SITES,
    THEIR_LAUNCHES,
    TOKEN,
    config_of,
    study,
)

PAGE = Path(__file__).parents[1] / "docs" / "serving_points.md"
BEGIN = "<!-- tables of `python -m studies.serving_points` -->\n\n"
END = "\n<!-- end of tables -->\n"

Values = dict[str, Any]
PARTS = {  # of an account -> how the figure and the table call it
    "roofline": ("bytes at the roofline", "#3b6fb6"),
    "launches": ("launches, cost assumed", "#e0a030"),
    "collectives": ("collectives, latency assumed", "#4a9a5c"),
    "others' prompts": ("others' prompts, order assumed", "#9a6fb0"),
    "rest": ("not explained", "#c9c9c9"),
}


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if abs(seconds) < 0.1 else f"{1e3 * seconds:,.0f}"


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def step_table(values: Values) -> str:
    """Sizes and costs of one card's decode step, both ways of cutting."""
    configs = [config_of(card) for card in (DEALT, CUT)]
    cards = list(values["cards"].values())
    total = [card["costs"]["total"] for card in cards]
    other = [
        t["seconds"] - sum(card["costs"][site]["seconds"] for site in SITES)
        for t, card in zip(total, cards, strict=True)
    ]

    def line(key: str) -> list[str]:
        return [ms(card["roofline"][key]) for card in cards]

    return table(
        ["one card, one step", *values["cards"]],
        [
            ["requests", *(card["rows"] for card in cards)],
            ["query heads", *(c.num_attention_heads for c in configs)],
            ["key/value heads, attention", *(c.num_key_value_heads for c in configs)],
            [
                "key, value heads, delta net",
                *(f"{c.linear_num_key_heads}, {c.linear_num_value_heads}" for c in configs),
            ],
            [
                "experts, their width",
                *(f"{c.num_experts}, {c.moe_intermediate_size}" for c in configs),
            ],
            ["launches", *(f"{t['launches']:,}" for t in total)],
            ["GFLOP", *(f"{t['flops'] / 1e9:.1f}" for t in total)],
            ["GB", *(f"{t['bytes'] / 1e9:.2f}" for t in total)],
            ["**ms at the roofline, as counted**", *line("as counted")],
            *(
                [f"of it {name}", *(ms(card["costs"][site]["seconds"]) for card in cards)]
                for site, name in SITES.items()
            ),
            ["of it all other sites", *map(ms, other)],
            [
                "experts a layer: counted, expected",
                *(f"{c['experts counted']}, {c['experts expected']:.1f}" for c in cards),
            ],
            ["ms for that", *line("experts")],
            ["ms for the fullest of 16 cards", *line("fullest card")],
            ["ms for the whole router", *line("router")],
            ["**ms at the roofline, corrected**", *line("sum")],
        ],
    )


def launch_table(values: Values) -> str:
    """What launching alone takes, for several costs of a launch."""
    ours = int(values["cards"][DEALT.name]["costs"]["total"]["launches"])
    paths = {"qnext, predicted": ours, "SGLang in that pull request, about": THEIR_LAUNCHES}
    return table(
        ["ms of launches", "launches", *(f"{cost * 1e6:g} us" for cost in LAUNCH_COSTS)],
        (
            [name, f"{count:,}", *(ms(count * cost) for cost in LAUNCH_COSTS)]
            for name, count in paths.items()
        ),
    )


def collective_table(values: Values) -> str:
    """How many collectives a step has, what they move, and their time for several latencies."""
    rows = []
    for name, card in values["cards"].items():
        kinds = card["collectives"]
        count = sum(kind["count"] for kind in kinds.values())
        size = sum(kind["count"] * kind["bytes"] for kind in kinds.values())
        most = ", ".join(f"{kind['count']} {what}" for what, kind in kinds.items())
        rows.append([name, count, most, f"{size / 1e6:.1f}", *map(ms, card["moving"])])
    head = ["ms of collectives", "count", "kinds", "MB a card"]
    return table([*head, *(f"{latency * 1e6:g} us" for latency in LATENCIES)], rows)


def account_table(values: Values) -> str:
    """Predicted floors, and where the measured times go."""
    accounts = values["accounts"]
    names = [f"{1e3 * TOKEN[run.removesuffix(', dear')]:.2f}, {run}" for run in accounts]
    floors = [card["predicted"] for card in values["cards"].values()]
    rows = [
        [name, *(ms(c[key]) if key in c else "" for c in (*floors, *accounts.values()))]
        for key, (name, _) in PARTS.items()
    ]
    totals = [*(f["sum"] for f in floors), *(TOKEN[run.removesuffix(", dear")] for run in accounts)]
    enough = [f"{1e6 * account['enough']:.1f}" for account in accounts.values()]
    return table(
        ["ms a token", *(f"qnext, {name}" for name in values["cards"]), *names],
        [
            *rows,
            ["**sum**", *map(ms, totals)],
            ["us of a launch that would leave no rest", *[""] * len(floors), *enough],
        ],
    )


def first_table(values: Values) -> str:
    """A round of prefill, and the mean first token, beside what was measured."""
    first = values["first token"]
    measured = FIRST["fused rule on"]
    names = ("roofline", "launches", "collectives")
    return table(
        ["ms", *names, "a round", "mean first token"],
        [
            ["on paper", *(ms(first[name]) for name in (*names, "round", "mean"))],
            ["measured", "", "", "", f"({ms(first['their round'])})", ms(measured)],
        ],
    )


def tables(values: Values) -> str:
    """The generated part of the page."""
    makers = (step_table, launch_table, collective_table, account_table, first_table)
    return "\n".join(make(values) for make in makers)


def plot(values: Values, path: Path) -> None:
    """Stacked bars: this project's floor, and the measured times, cheap and dear assumptions."""
    import matplotlib.pyplot as plt

    costs = f"{1e6 * LAUNCH_SECONDS:g} us a launch, {1e6 * LATENCY:g} us a collective"
    dear = f"{1e6 * DEAR_LAUNCH:g} us a launch, {1e6 * DEAR_LATENCY:g} us a collective,"
    spread = f"{dear}\n{1e6 * sum(DEAR.values()):g} us dispatch and combine"
    bars = {
        f"qnext on paper, {DEALT.name}\n{costs}": values["cards"][DEALT.name]["predicted"],
        f"SGLang, fused rule on\n{costs}": values["accounts"]["fused rule on"],
        f"SGLang, fused rule on\n{spread}": values["accounts"]["fused rule on, dear"],
        f"SGLang, fused rule off\n{costs}": values["accounts"]["fused rule off"],
    }
    figure, axes = plt.subplots(figsize=(9, 4.1))
    left = [0.0] * len(bars)
    for key, (label, color) in PARTS.items():
        widths = [1e3 * bar.get(key, 0) for bar in bars.values()]
        hatch = "//" if key == "rest" else None
        drawn = axes.barh(
            list(bars), widths, left=left, label=label, color=color, hatch=hatch, edgecolor="white"
        )
        texts = [f"{width:.1f}" if width else "" for width in widths]
        axes.bar_label(drawn, texts, label_type="center", fontsize=8)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for run, seconds in TOKEN.items():
        axes.axvline(1e3 * seconds, color="black", linestyle=":", linewidth=1)
        axes.annotate(
            f"measured {1e3 * seconds:.2f}\n{run}",
            (1e3 * seconds, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set(xlim=(0, 58), xlabel="time per output token [ms]")
    figure.legend(fontsize=8, ncols=3, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def put(page: Path, made: str) -> None:
    """Replace what stands between the page's markers."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise SystemExit(f"{page} lacks the line {BEGIN.strip()} or {END.strip()}")
    page.write_text(f"{before}{BEGIN}{made}{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--page", type=Path, default=PAGE, help="where tables go")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where the figure goes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where numbers go")
    options = parser.parse_args()
    values = study()
    made = tables(values)
    print(made)
    put(options.page, made)
    options.images.mkdir(parents=True, exist_ok=True)
    plot(values, options.images / "serving_points.png")
    record("serving_points", values, options.results)


if __name__ == "__main__":
    main()
