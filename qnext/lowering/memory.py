"""How much memory a step needs, from shapes and lifetimes alone."""

from collections import defaultdict
from collections.abc import Collection
from typing import Any

from torch.fx import Graph, Node

from qnext.lowering.graph import argument_of, is_view, tensors, value
from qnext.lowering.trace import Trace


def memory(graph: Graph, trace: Trace, donate: Collection[str]) -> dict[str, Any]:
    """Bytes: `arguments` by name, `results`, `donated`, `temporaries` (the peak of what lives only
    between arguments and results, each tensor freed after its last use)."""
    arguments: dict[str, int] = defaultdict(int)
    for leaf in trace.leaves:
        arguments[argument_of(leaf.path)] += leaf.nbytes
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    returned = set(output.all_input_nodes)
    results = sum(t.nbytes for node in returned for t in tensors(value(node)))
    return {
        "arguments": dict(arguments),
        "results": results,
        "donated": sum(arguments[name] for name in donate),
        "temporaries": _peak(graph, returned),
    }


def _peak(graph: Graph, returned: set[Node]) -> int:
    last_use: dict[Node, int] = {}
    owner: dict[Node, Node] = {}  # whose memory a view looks at
    order = list(graph.nodes)
    for at, node in enumerate(order):
        for parent in node.all_input_nodes:
            last_use[owner.get(parent, parent)] = at
        if is_view(node) and node.all_input_nodes:
            first = node.all_input_nodes[0]
            owner[node] = owner.get(first, first)
    kept = {owner.get(node, node) for node in returned}
    live = peak = 0
    ends: dict[int, int] = defaultdict(int)
    for at, node in enumerate(order):
        if node.op == "call_function" and node not in owner and node not in kept:
            size = sum(t.nbytes for t in tensors(value(node)))
            live += size
            ends[last_use.get(node, at)] += size
        peak = max(peak, live)
        live -= ends[at]
    return peak
