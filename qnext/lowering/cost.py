"""What a step costs on paper: flops, bytes, launches and roofline seconds, site by site."""

import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from qnext.functional.ops import PRIMITIVES
from qnext.lowering.calls import Call, call_of
from qnext.lowering.graph import arguments, primitive_of, scopes, site_name, sites, tensors, value
from qnext.lowering.target import Chip

PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm"}
ADDED = {"addmm", "baddbmm"}  # their first input is what the product is added to
CREATES = {"full", "arange", "zeros", "ones", "zeros_like", "ones_like", "full_like"}
CREATES |= {"new_zeros", "new_ones", "new_full"}
SELECTS = {"embedding", "gather", "index_select", "index", "take_along_dim"}


class Cost(NamedTuple):
    """One site's work: floating-point operations, bytes moved, kernel launches."""

    flops: int
    bytes: int
    launches: int

    def seconds(self, chip: Chip, int8: bool = False) -> float:
        """The least time on a chip: its arithmetic or its memory, whichever is slower."""
        rate = chip.int8_ops if int8 else chip.bf16_flops
        return max(self.flops / rate, self.bytes / chip.bytes_per_second)


def works_on_int8(node: Node) -> bool:
    """Whether a site's operations are those of int8, counted like floating ones: two a product."""
    return any(t.dtype == torch.int8 for n in node.all_input_nodes for t in tensors(value(n)))


def cost_of(node: Node) -> Cost:
    """The cost of a site. A primitive left on its reference counts as one launch."""
    if found := primitive_of(node):
        given = arguments(node)
        return Cost(found.flops(**given), found.bytes(**given), 1)
    if known := call_of(node):
        given = arguments(node)
        return Cost(known.flops(**given), _moved(node, known, given), known.launches)
    name, outputs = site_name(node), tensors(value(node))
    inputs = [t for n in node.all_input_nodes for t in tensors(value(n))]
    written = sum(t.nbytes for t in outputs)
    if name in CREATES:  # what it is like is not read
        return Cost(0, written, 1)
    if name in SELECTS:  # only the chosen rows move
        return Cost(0, 2 * written + sum(t.nbytes for t in inputs[1:]), 1)
    moved = written + sum(t.nbytes for t in inputs)
    return Cost(_products(name, node, outputs), moved, 1)


def _moved(node: Node, call: Call, given: dict[str, Any]) -> int:
    if call.bytes is not None:
        return call.bytes(**given)
    return sum(t.nbytes for t in (*tensors(list(given.values())), *tensors(value(node))))


def _products(name: str, node: Node, outputs: list[Tensor]) -> int:
    made = sum(t.numel() for t in outputs)
    if name not in PRODUCTS:
        return made
    left = node.args[1 if name in ADDED else 0]
    assert isinstance(left, Node)
    return 2 * made * value(left).shape[-1]


def analyse(graph: Graph, chip: Chip | None) -> dict[str, Any]:
    """`flops`, `bytes`, `launches`, `seconds_at_roofline`, `by_site`, `by_kind`, `by_part`.

    Seconds are None without a chip. The roofline of a step is the sum of its sites': they run one
    after another. `seconds_of_launches` is the floor that launching alone sets.
    """
    owner = scopes(graph)
    by_site = []
    for node in sites(graph):
        cost = cost_of(node)
        by_site.append(
            {
                "node": node.name,
                "site": site_name(node),
                "part": owner[node],
                **cost._asdict(),
                "seconds_at_roofline": cost.seconds(chip, works_on_int8(node)) if chip else None,
            }
        )
    by_part = _grouped(by_site, "part")
    kinds = kinds_of(by_site)
    for site in by_site:
        site["kind"] = kinds[site["part"]]
    by_kind = _grouped(by_site, "kind")
    for kind, total in by_kind.items():
        total["parts"] = sum(k == kind for k in kinds.values())
    total = _total(by_site)
    launching = total["launches"] * chip.launch_seconds if chip else None
    return {
        **total,
        "seconds_of_launches": launching,
        "chip": chip.name if chip else None,
        "by_kind": by_kind,
        "by_part": by_part,
        "by_site": by_site,
    }


def _grouped(rows: list[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return {name: _total(group) for name, group in groups.items()}


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over rows; seconds are summed with fsum, as thousands of tiny ones round."""
    seconds = [row["seconds_at_roofline"] for row in rows]
    return {
        "flops": sum(row["flops"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "launches": sum(row["launches"] for row in rows),
        "seconds_at_roofline": None if None in seconds else math.fsum(seconds),
    }


def kinds_of(by_site: list[dict[str, Any]]) -> dict[str, str]:
    """A name for each part's kind: `delta_rule+short_conv`, `attention+rotary`, `shared`.

    A part is named by the two heaviest sites that some part of its family (`.layers`) lacks, or by
    its heaviest where all are alike; primitives, where there are any, before other operations.
    """
    weight: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in by_site:
        weight[row["part"]][row["site"]] += row["flops"] + row["bytes"]
    family: dict[str, list[set[str]]] = defaultdict(list)
    for part, sites_of_part in weight.items():
        family[part.partition("[")[0]].append(set(sites_of_part))
    common = {name: set.intersection(*parts) for name, parts in family.items()}

    def name(part: str) -> str:
        mine = weight[part]
        own = (mine.keys() - common[part.partition("[")[0]]) or mine.keys()
        own = own & PRIMITIVES.keys() or own
        return "+".join(sorted(own, key=lambda site: (-mine[site], site))[:2])

    return {part: name(part) if part else "shared" for part in weight}
