"""Plans as text: a table, where the time of one of them goes, and what was assumed."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from qnext.functional.config import Config
from qnext.planner.assumed import (
    MEASURED,
    MEASURED_CARDS,
    MEASURED_LOAD,
    MEASURED_SECONDS,
    Load,
    Machine,
)
from qnext.planner.plan import Plan, buffer_bytes

GB, MB = 1e9, 1e6
HEAD = (
    *("", "tp", "dp", "ep", "requests a group", "GB a card", "room: tokens", "requests"),
    *("launches", "collectives", "MB links", "MB network", "ms a token", "s to first", "most time"),
)


def title(config: Config, int8: bool, cards: int, load: Load, machine: Machine) -> str:
    """What is planned, in a line or two."""
    moe = f", {config.num_experts} experts" if any(config.is_moe) else ""
    weights = "W8A8" if int8 else str(config.precision.compute).removeprefix("torch.")
    draft = f", {load.draft} guesses of which {load.accepted:.0%} are right" if load.draft else ""
    return (
        f"{config.num_hidden_layers} layers{moe}, {weights}, on {cards:,} x {machine.chip.name}\n"
        f"{load.requests:,} requests at once, of {load.prompt:,} + {load.output:,} tokens{draft}"
    )


def table(plans: Sequence[Plan], asked: Plan | None = None) -> str:
    """A line a plan; `>` is the one that was asked for, `*` the best. Figures are of one step."""
    best = next((plan for plan in plans if plan.fits), None)
    rows = [HEAD, *(_line(plan, _mark(plan, best, asked)) for plan in plans)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _mark(plan: Plan, best: Plan | None, asked: Plan | None) -> str:
    same = asked is not None and plan.mesh == asked.mesh
    return (">" if same else "") + ("*" if plan is best else "")


def _line(plan: Plan, mark: str) -> tuple[str, ...]:
    memory, step = plan.memory, plan.step
    full = not plan.fits
    return (
        mark,
        *(str(getattr(plan.mesh, axis)) for axis in ("tp", "dp", "ep")),
        f"{plan.rows:,}",
        f"{memory.weights / GB:.1f} of {memory.usable / GB:.1f}",
        f"{memory.tokens:,}",
        f"{memory.requests:,}",
        f"{step.launches:,}",
        f"{step.collectives:,}",
        f"{step.link_bytes / MB:.1f}",
        f"{step.network_bytes / MB:.1f}",
        f"{1e3 * plan.token:.2f}",
        "" if plan.first is None else f"{plan.first:.2f}",
        "does not fit" if full else step.bottleneck,
    )


def account(plan: Plan) -> str:
    """Where the time of a token and of a prompt goes."""
    times = {"a token": plan.step.parts, "a prompt": plan.prefill.parts if plan.prefill else {}}
    kinds = sorted({kind for parts in times.values() for kind in parts})
    head = ("ms", *times)
    rows = [(kind, *(_ms(parts.get(kind)) for parts in times.values())) for kind in kinds]
    sums = ("sum", *(_ms(sum(parts.values())) if parts else "" for parts in times.values()))
    lines = [head, *rows, sums]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )
    if plan.tokens_a_step > 1:
        text += f"\na step yields {plan.tokens_a_step:.2f} tokens: {1e3 * plan.token:.2f} ms each"
    return text


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.2f}"


def measured(cards: int, load: Load) -> str:
    """The measured point, which is of this load where that is the same."""
    same = cards == MEASURED_CARDS and load == MEASURED_LOAD
    point = MEASURED_LOAD
    of = (
        "the same load"
        if same
        else f"{point.requests} requests of {point.prompt:,} + {point.output:,} tokens"
    )
    return (
        f"measured by others: {1e3 * MEASURED_SECONDS:.2f} ms a token on {MEASURED_CARDS} cards, "
        f"{of} ({MEASURED}, read here as tp 4, dp 4, ep 16)"
    )


def advice(plan: Plan, config: Config, load: Load, machine: Machine) -> str:
    """How to run a plan."""
    mesh = plan.mesh
    axes = " ".join(f"--{axis} {getattr(mesh, axis)}" for axis in ("tp", "dp", "ep"))
    lines = [f"torchrun ... -m qnext serve ... {axes}"]
    if needed := buffer_bytes(replace(config, mesh=mesh), load, machine):
        lines.append(f"HCCL_BUFFSIZE (MB) at least {-(-needed // (1 << 20)):,}")
    return "\n".join(lines)


def assumptions(machine: Machine) -> Iterable[str]:
    """What was taken for granted."""
    chip = machine.chip
    yield (
        f"{chip.bf16_flops / 1e12:.0f} TFLOP/s bfloat16, {chip.int8_ops / 1e12:.0f} TOP/s int8, "
        f"{chip.bytes_per_second / 1e12:.1f} TB/s, {chip.memory_bytes / GB:.1f} GB a card, of "
        f"which {machine.usable:.0%} are used; sites run at the roofline, one after another"
    )
    yield (
        f"a launch takes {1e6 * machine.launch:g} us beside its work, a collective "
        f"{1e6 * machine.collective:g} us beside its bytes; nothing hides behind anything else"
    )
    yield (
        f"links: {machine.link / GB:g} GB/s a card among {machine.island:,} cards, "
        f"{machine.network / GB:g} GB/s beyond; peers talk directly"
    )
    yield "a router likes all experts alike; all wait for the card with most chosen ones"
    yield "attention reads as many keys and values as a request has room for"
    yield "a group takes its prompts one after another, then decodes all of them"
