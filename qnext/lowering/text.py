"""A lowered step as text: one line a site, with its verdict in the margin."""

from collections import Counter
from collections.abc import Sequence

from torch.fx import Graph, Node

from qnext.lowering.calls import call_of
from qnext.lowering.donate import Write
from qnext.lowering.graph import primitive_of, scopes, shape_text, site_name, sites, tensors, value
from qnext.lowering.rules import Verdict

LEFT = "reference"
COPY = Verdict("copy", None, ("of a pool that is not donated or read again",))


def as_text(graph: Graph, verdicts: dict[Node, Verdict], writes: Sequence[Write] = ()) -> str:
    """Number, what the site is, its first result, what it became, and why; parts set apart."""
    owner = scopes(graph)
    settled = {write.node: write for write in writes}
    rows = []
    for number, node in enumerate(sites(graph)):
        verdict = verdicts.get(node, COPY)
        became, why = _margin(node, verdict)
        if write := settled.get(node):
            why += f"; {write.verdict}: {write.reason}"
        shape = shape_text(tensors(value(node))[0])
        rows.append(((str(number), verdict.site, shape, became), why, owner[node]))
    widths = [max((len(row[i]) for row, _, _ in rows), default=0) for i in range(4)]
    lines: list[str] = []
    part: str | None = None
    for row, why, owned in rows:
        if owned != part:
            part = owned
            lines.append(f"# {part or 'the whole step'}")
        number_text = row[0].rjust(widths[0])
        rest = (text.ljust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join((number_text, *rest, why)).rstrip())
    return "\n".join(lines)


def _margin(node: Node, verdict: Verdict) -> tuple[str, str]:
    if verdict.rule is not None:
        call = call_of(node)
        return verdict.rule, call.page if call else site_name(node)
    if primitive_of(node):
        return LEFT, "; ".join(verdict.reasons)
    return "torch", "; ".join(verdict.reasons)


def report(verdicts: dict[Node, Verdict]) -> str:
    """How often each rule fired, and each site left with its reasons, counted."""
    fired: Counter[tuple[str, str]] = Counter()
    left: Counter[tuple[str, str]] = Counter()
    for node, verdict in verdicts.items():
        if verdict.rule is not None:
            fired[verdict.rule, verdict.site] += 1
        elif primitive_of(node):
            left[verdict.site, "; ".join(verdict.reasons)] += 1
    lines = [f"{n:5}  {site}: {rule}" for (rule, site), n in sorted(fired.items())]
    lines += [f"{n:5}  {site}: {LEFT} ({why})" for (site, why), n in sorted(left.items())]
    return "\n".join(lines)
