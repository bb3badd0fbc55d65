"""A lowered step as text: one line a site, with its verdict in the margin."""

from collections import Counter
from collections.abc import Sequence

from torch.fx import Graph, Node

from qnext.lowering.calls import call_of
from qnext.lowering.donate import Write
from qnext.lowering.graph import primitive_of, scopes, shape_text, site_name, sites, tensors, value
from qnext.lowering.rules import OTHER_PATTERN, Verdict

LEFT = "reference"
ADDED = {
    "clone": Verdict("copy", None, ("so that memory which somebody else may read stays as it is",)),
    "write_back": Verdict("carry", "carry", ()),
}


def as_text(graph: Graph, verdicts: dict[Node, Verdict], writes: Sequence[Write] = ()) -> str:
    """Number, what the site is, its first result, what it became, and why; parts set apart.

    Where a rule took what others declined, the first such line tells their reasons.
    """
    owner = scopes(graph)
    told: set[Verdict] = set()
    settled = {write.node: write for write in writes}
    rows = []
    for number, node in enumerate(sites(graph)):
        verdict = verdicts.get(node) or ADDED[site_name(node)]
        became, why = _margin(node, verdict)
        if verdict.rule is not None and verdict not in told and (reasons := _reasons(verdict)):
            why += f"; {reasons}"
            told.add(verdict)
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
        with_bias = site_name(node) == "linear" and len(node.args) == 3
        torch_name = site_name(node) + (" with bias" if with_bias else "")
        return verdict.rule, call.page if call else torch_name
    if primitive_of(node):
        return LEFT, "; ".join(verdict.reasons)
    return "torch", "; ".join(verdict.reasons)


def _reasons(verdict: Verdict) -> str:
    """Why rules whose pattern was there declined."""
    return "; ".join(told for told in verdict.reasons if not told.endswith(OTHER_PATTERN))


def report(verdicts: dict[Node, Verdict]) -> str:
    """How often each rule fired, and each site left, with the reasons of rules that declined."""
    applied = {id(verdict): (node, verdict) for node, verdict in verdicts.items()}
    fired: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for node, verdict in applied.values():
        reasons = _reasons(verdict)
        why = f" ({reasons})" if reasons else ""
        if verdict.rule is not None:
            fired[f"{verdict.site}: {verdict.rule}{why}"] += 1
        elif primitive_of(node):
            left[f"{verdict.site}: {LEFT}{why}"] += 1
    rows = [*sorted(fired.items()), *sorted(left.items())]
    return "\n".join(f"{count:5}  {told}" for told, count in rows)
