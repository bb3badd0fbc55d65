"""What a rank's step costs, from its lowering: a layer of each kind is lowered, and multiplied.

A cost analysis counts as many experts read, and rows sent to them, as there could be. Here they are
expected values for a router that likes all experts alike: whoever waits, waits for the rank whose
experts are chosen most.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from torch.fx import Node

from qnext.functional.blocks import MANY
from qnext.functional.config import Config
from qnext.lowering.calls import call_of
from qnext.lowering.cost import Cost, cost_of, works_on_int8
from qnext.lowering.graph import primitive_of, scopes, site_name, sites, value
from qnext.lowering.stages import Lowered
from qnext.planner.assumed import Machine

GROUPED = {"npu_grouped_matmul", "npu_grouped_matmul_swiglu_quant", "npu_grouped_matmul_quant"}
KINDS = {  # of sites -> what they read
    **dict.fromkeys(GROUPED, "experts"),
    **dict.fromkeys(("linear", "npu_quant_matmul", "matmul", "addmm"), "other weights"),
    **dict.fromkeys(
        (
            *("npu_fused_attention", "npu_recurrent_gated_delta_rule", "baddbmm", "bmm"),
            *("npu_chunk_gated_delta_rule", "index_select", "npu_index_put"),
        ),
        "states and keys",
    ),
}
REST = "all other sites"


class Move(NamedTuple):
    """A collective: its site, the ranks that make it, and the bytes that come to each of them."""

    site: str
    size: int
    bytes: float

    def seconds(self, machine: Machine) -> float:
        """Peers talk directly: through the links of the island at once with the network beyond."""
        inside, outside = self.split(machine)
        return machine.collective + max(inside / machine.link, outside / machine.network)

    def split(self, machine: Machine) -> tuple[float, float]:
        """Bytes that come from the island, and from other islands."""
        beyond = max(self.size - machine.island, 0) / max(self.size - 1, 1)
        return self.bytes * (1 - beyond), self.bytes * beyond


class StepCost(NamedTuple):
    """A step of one rank. Seconds by kind are the roofline's; collectives are not among them."""

    seconds: dict[str, float]
    launches: int  # nodes of the captured graph, collectives among them
    flops: float
    bytes: float
    moves: Counter[Move]
    temporaries: int  # bytes, the most that lives between arguments and results

    @property
    def collectives(self) -> int:
        return self.moves.total()


def kinds_of(config: Config) -> list[tuple[str, bool]]:
    """For each layer its mixer and whether it has experts."""
    return list(zip(config.layer_types, config.is_moe, strict=True))


def small(config: Config) -> tuple[Config, list[int]]:
    """A config with two layers of each kind, or the only one, and how often each stands for one.

    The first of a kind has with it what a step computes once for all layers.
    """
    counts = Counter(kinds_of(config))
    layers = [kind for kind, count in counts.items() for _ in range(min(count, 2))]
    times: list[int] = []
    for at, kind in enumerate(layers):
        times.append(1 if kind not in layers[:at] else counts[kind] - 1)
    dense = tuple(at for at, (_, moe) in enumerate(layers) if not moe)
    made = replace(
        config,
        num_hidden_layers=len(layers),
        layer_types=tuple(mixer for mixer, _ in layers),
        mlp_only_layers=dense if config.num_experts else (),
        decoder_sparse_step=1,
    )
    return made, times


def weight_of(part: str, times: list[int]) -> int:
    """How many layers a part of a small config's step stands for."""
    inside = part.removeprefix(".layers[")
    return times[int(inside.partition("]")[0])] if inside != part else 1


def step_cost(lowered: Lowered, config: Config, times: list[int]) -> StepCost:
    """The cost of a whole config's step from that of `small`'s."""
    graph, chip = lowered.graph.graph, lowered.target.chip
    assert chip is not None
    owner = scopes(graph)
    seconds: dict[str, float] = defaultdict(float)
    moves: Counter[Move] = Counter()
    launches, flops, moved = 0, 0.0, 0.0
    came = dict(_dispatched(graph))
    for node in sites(graph):
        count = weight_of(owner[node], times)
        cost = _expected(node, cost_of(node), config, came)
        launches += count * cost.launches
        if (move := move_of(node)) is not None:
            moves[move] += count
            continue
        flops, moved = flops + count * cost.flops, moved + count * cost.bytes
        spent = cost.seconds(chip, works_on_int8(node))
        seconds[KINDS.get(site_name(node), REST)] += count * spent
    peak = lowered.memory_analysis()["temporaries"]
    return StepCost(dict(seconds), launches, flops, moved, moves, peak)


def move_of(node: Node) -> Move | None:
    """What a site moves between ranks, if it is a collective. Experts are chosen alike."""
    found = call_of(node) or primitive_of(node)
    if found is None or not found.collective:
        return None
    name, size = site_name(node), node.kwargs["size"]
    assert isinstance(size, int)
    share = (size - 1) / size
    if name.startswith("npu_"):
        expert = value(_given(node, "expert"))
        row = value(_given(node, "rows" if name == "npu_combine" else "x"))[0]
        wide = row.numel() + 4 if name == "npu_dispatch_quant" else row.nbytes
        return Move(name, size, share * expert.numel() * wide)
    nbytes = value(_given(node, "x")).nbytes
    factor = {"all_gather": size - 1, "all_reduce": 2 * share}.get(name, share)
    return Move(name, size, factor * nbytes)


def _given(node: Node, name: str) -> Node:
    found = node.kwargs[name]
    assert isinstance(found, Node)
    return found


def _dispatched(graph: Any) -> Iterator[tuple[int, int]]:
    """Of each dispatch the rows that could come, and how many tokens a rank sends."""
    for node in sites(graph):
        if site_name(node).startswith("npu_dispatch"):
            rows = value(node)[0].shape[0]
            yield rows, value(_given(node, "expert")).shape[0]


def _expected(node: Node, cost: Cost, config: Config, came: dict[int, int]) -> Cost:
    """A site's cost with the experts and rows that are to be expected."""
    name = site_name(node)
    if name not in GROUPED and name != "npu_swiglu":
        return cost
    x = value(_given(node, "x"))
    topk, sent = config.num_experts_per_tok, came.get(x.shape[0])
    share = 1.0 if sent is None else sent * topk / x.shape[0]  # as many come as are sent
    if name == "npu_swiglu":
        return Cost(int(cost.flops * share), int(cost.bytes * share), cost.launches)
    weight = value(_given(node, "weight"))
    mesh, size = config.mesh, config.mesh.divides("experts")
    further = weight.shape[0] - config.axes["own_experts"]  # the shared one, and nobody's
    chosen = topk + (further > (size > 1))
    tokens = x.shape[0] / chosen if sent is None else sent * size
    twice = size > mesh.tp and tokens * mesh.tp < MANY * size  # all ranks of a group send theirs
    tokens /= mesh.tp if twice else 1
    read = fullest(tokens, topk, config.num_experts, size) + further
    one = weight[0].numel() * weight.itemsize
    counted = min(x.shape[0], weight.shape[0]) * one
    passing = (cost.bytes - counted) * share
    return Cost(int(cost.flops * share), int(passing + read * one), cost.launches)


def distinct(tokens: float, topk: int, experts: int) -> float:
    """The expected number of experts that some of so many tokens choose."""
    return experts * (1 - (1 - topk / experts) ** tokens)


def fullest(tokens: float, topk: int, experts: int, ranks: int) -> float:
    """The expected number of chosen experts on the rank that has most of them.

    Each expert is chosen or not by itself, which differs from the truth by little: a token's
    choices are of different experts. The greatest of `ranks` such counts has the distribution
    F(m) ** ranks.
    """
    own = -(-experts // ranks)
    chance = distinct(tokens, topk, experts) / experts
    if ranks == 1:
        return own * chance
    below, total = 0.0, 0.0
    for count in range(own):
        below += math.comb(own, count) * chance**count * (1 - chance) ** (own - count)
        total += 1 - min(below, 1.0) ** ranks
    return total
