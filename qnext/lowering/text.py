"""A lowered step as text: one line a site, with its verdict in the margin."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch.fx import Graph, Node

from qnext.lowering.calls import call_of
from qnext.lowering.donate import Write
from qnext.lowering.graph import primitive_of, scopes, shape_text, site_name, sites, tensors, value
from qnext.lowering.rules import OTHER_PATTERN, Verdict

LEFT = "reference"
WHOLE = "the whole step"  # the part of sites that belong to no layer
ADDED = {
    "clone": Verdict("copy", None, ("so that memory which somebody else may read stays as it is",)),
    "write_back": Verdict("carry", "carry", ()),
}


class Line(NamedTuple):
    """A site: what it is, its first result, what it became, and why; and the part it is of."""

    node: Node
    part: str
    site: str
    shape: str
    became: str
    why: str


def lines_of(
    graph: Graph, verdicts: dict[Node, Verdict], writes: Sequence[Write] = ()
) -> list[Line]:
    """Every site. Where a rule took what others declined, the first such tells their reasons."""
    owner = scopes(graph)
    told: set[Verdict] = set()
    settled = {write.node: write for write in writes}
    lines = []
    for node in sites(graph):
        verdict = verdicts.get(node) or ADDED[site_name(node)]
        became, why = _margin(node, verdict)
        if verdict.rule is not None and verdict not in told and (reasons := _reasons(verdict)):
            why += f"; {reasons}"
            told.add(verdict)
        if write := settled.get(node):
            why += f"; {write.verdict}: {write.reason}"
        shape = shape_text(tensors(value(node))[0])
        lines.append(Line(node, owner[node], verdict.site, shape, became, why))
    return lines


def as_text(graph: Graph, verdicts: dict[Node, Verdict], writes: Sequence[Write] = ()) -> str:
    """`lines_of`, numbered, parts set apart."""
    found = lines_of(graph, verdicts, writes)
    rows = [(str(n), each.site, each.shape, each.became) for n, each in enumerate(found)]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    lines: list[str] = []
    part: str | None = None
    for row, each in zip(rows, found, strict=True):
        if each.part != part:
            part = each.part
            lines.append(f"# {part or WHOLE}")
        number = row[0].rjust(widths[0])
        rest = (text.ljust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join((number, *rest, each.why)).rstrip())
    return "\n".join(lines)


def _margin(node: Node, verdict: Verdict) -> tuple[str, str]:
    if verdict.rule is not None:
        call = call_of(node)
        with_bias = site_name(node) == "linear" and len(node.args) == 3
        torch_name = site_name(node) + (" with bias" if with_bias else "")
        return verdict.rule, call.page if call else torch_name
    if primitive_of(node):
        return LEFT, "; ".join(verdict.reasons)
    return "torch", _reasons(verdict)


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
