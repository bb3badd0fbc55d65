"""What one card's step costs at a reference's serving point, on paper.

Costs come from `cost_analysis` of steps lowered on specs. What is assumed, or was measured by
others, is a constant here, and docs/serving_points.md tells where each is from. Nothing was
measured on an NPU by us.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import qnext as qn
from qnext.functional.config import DELTA
from qnext.functional.params import MoeParams
from qnext.functional.state import Delta
from qnext.lowering.target import LAUNCH_SECONDS, resolve

# The runs of SGLang pull request 14391; seconds.
CARDS, GROUPS, REQUESTS, PROMPT, OUTPUT = 16, 4, 24, 3500, 1500
ROUNDS = REQUESTS // GROUPS  # of prefill: a group takes its prompts one after another
CAPTURED = 24  # rows a group of the only graph that was captured
TOKEN = {"fused rule off": 53.05e-3, "fused rule on": 44.30e-3}  # per output token
FIRST = {"fused rule off": 6.5, "fused rule on": 6.363}  # to the first token
THEIR_LAUNCHES = 1950  # of a decode step, counted in their code; some 96 of them are collectives

# Assumed; seconds, bytes a second. The page gives results for other values.
LAUNCH_COSTS = (1e-6, 2e-6, 3e-6, 5e-6, 10e-6)
LATENCIES = (10e-6, 20e-6, 50e-6)  # of a collective, apart from its bytes
LATENCY = LATENCIES[1]
LINK = 100e9  # DeepEP-Ascend reports 107 and 103 GB/s for large messages among 16
# The dear case: DeepEP-Ascend's report for 128 tokens of 7168, where a card here has two of 2048.
DEAR_LAUNCH, DEAR_LATENCY = 5e-6, LATENCIES[2]
DEAR = {"dispatch": 139e-6, "combine": 135e-6}

TARGET = "npu:a3"
WHOLE = qn.Config.from_hf({"model_type": "qwen3_next"})  # the 80B architecture
WHOLE = WHOLE.with_precision(compute=torch.bfloat16, state=torch.bfloat16)
TOPK, EXPERTS, LAYERS = WHOLE.num_experts_per_tok, WHOLE.num_experts, WHOLE.num_hidden_layers
BLOCK = 4  # layers until the pattern repeats: three delta nets, one attention
CAPACITY = PROMPT + OUTPUT  # 5,120 in pages

Costs = dict[str, dict[str, float]]  # by site, and the sum of all sites as "total"
SITES = {  # the heavy ones of a decode step, and what they read
    "npu_grouped_matmul": "experts",
    "linear": "projections, router, head",
    "npu_fused_attention": "keys and values",
    "npu_recurrent_gated_delta_rule": "recurrent states",
}


@dataclass(frozen=True, eq=False)
class Card:
    """A card's share of the model, as the sizes in which it differs from the whole."""

    name: str
    rows: int  # requests in its attention and delta nets
    group: int  # cards that share these
    holders: int  # cards over which whole experts are dealt; 1: each has a part of every expert
    sizes: dict[str, Any]


# Attention in 4 groups of 4 cards, whole experts on 16. 24 tokens choose 10 experts, so 15 rows
# reach a card; its 6 rows choosing 3 of its 32 make 18, the least whole number above.
DEALT = Card(
    name="TP16/DP4, as run",
    rows=REQUESTS // GROUPS,
    group=CARDS // GROUPS,
    holders=CARDS,
    sizes={
        "num_attention_heads": 4,
        "num_key_value_heads": 1,  # 2 heads on 4 cards: each is there twice
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "vocab_size": WHOLE.vocab_size // 4,
        "num_experts": EXPERTS // CARDS,
        "num_experts_per_tok": 3,
    },
)
# Everything cut in 16, each expert too; one config says it exactly.
CUT = Card(
    name="TP16, no groups",
    rows=REQUESTS,
    group=CARDS,
    holders=1,
    sizes={
        "num_attention_heads": 1,
        "num_key_value_heads": 1,  # 2 heads on 16 cards: each is there eight times
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "vocab_size": WHOLE.vocab_size // 16,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
)


def config_of(card: Card, layers: int = LAYERS) -> qn.Config:
    """The config whose step is the card's share of the whole model's step."""
    kinds = WHOLE.layer_types[:layers]
    return replace(WHOLE, num_hidden_layers=layers, layer_types=kinds, **card.sizes)


@cache
def lowered(
    card: Card, layers: int, capacity: int, prompt: int | None, target: str = TARGET
) -> Costs:
    """Costs of a decode step, or of the prefill of one prompt a group, summed by site."""
    function, rows = (qn.decode, card.rows) if prompt is None else (qn.prefill, 1)
    specs = qn.specs(config_of(card, layers), rows, capacity, seq=prompt)
    analysis = qn.jit(function, donate="state").trace(*specs).lower(target).cost_analysis()
    costs: Costs = {}
    for row in analysis["by_site"]:
        row = row | {"seconds": row["seconds_at_roofline"]}
        for name in ("total", row["site"]):
            site = costs.setdefault(name, {})
            for what in ("flops", "bytes", "launches", "seconds"):
                site[what] = site.get(what, 0) + row[what]
    return costs


def step(
    card: Card, capacity: int = CAPACITY, prompt: int | None = None, layers: int = LAYERS
) -> Costs:
    """`lowered`, from 4 and 8 layers: further blocks cost what the second does.

    Lowering all 48 takes several times as long; a test compares the two.
    """
    one, two = (lowered(card, n * BLOCK, capacity, prompt) for n in (1, 2))
    more = layers // BLOCK - 1
    return {
        site: {what: one[site][what] + more * (cost[what] - one[site][what]) for what in cost}
        for site, cost in two.items()
    }


def distinct(rows: int, topk: int, experts: int) -> float:
    """The expected number of experts that some of `rows` choose, all experts equally likely."""
    return float(experts * (1 - (1 - topk / experts) ** rows))


@cache
def fullest(draws: int = 1000) -> float:
    """The expected number of chosen experts on the card that has most; likely as in `distinct`."""
    generator = torch.Generator().manual_seed(0)
    most = 0
    for _ in range(draws):
        scores = torch.rand(REQUESTS, EXPERTS, generator=generator)
        chosen = torch.zeros(EXPERTS).index_fill(0, scores.topk(TOPK).indices.flatten(), 1)
        most += int(chosen.view(CARDS, -1).sum(1).max())
    return most / draws


def counted(card: Card) -> int:
    """Experts a layer that `cost_analysis` counts as read, the shared one among them."""
    config = config_of(card)
    return min(card.rows * (config.num_experts_per_tok + 1), config.num_experts + 1)


def moe_of(config: qn.Config) -> MoeParams:
    layer = qn.specs(config, 1, 1)[0].layers[0].ffn
    assert isinstance(layer, MoeParams)
    return layer


def expert_bytes(card: Card) -> int:
    """Bytes of one expert's weights on a card."""
    moe = moe_of(config_of(card, 1))
    assert isinstance(moe.gate_up, Tensor)
    assert isinstance(moe.down, Tensor)
    return moe.gate_up[0].nbytes + moe.down[0].nbytes


def bandwidth() -> float:
    chip = resolve(TARGET).chip
    assert chip is not None
    return chip.bytes_per_second


def roofline(card: Card) -> dict[str, float]:
    """Seconds of a decode step: as counted, what must be added to that, and the sum."""
    read = distinct(REQUESTS, TOPK, EXPERTS) / card.holders + 1
    most = fullest() + 1 if card.holders > 1 else read
    expert = LAYERS * expert_bytes(card) / bandwidth()
    uncut, cut = moe_of(config_of(CUT, 1)).router, moe_of(config_of(card, 1)).router
    assert isinstance(uncut, Tensor)
    assert isinstance(cut, Tensor)
    router = uncut.nbytes - cut.nbytes
    parts = {
        "as counted": step(card)["total"]["seconds"],
        "experts": (read - counted(card)) * expert,
        "fullest card": (most - read) * expert,
        "router": LAYERS * router / bandwidth(),
    }
    return parts | {"sum": sum(parts.values())}


def captured() -> dict[str, float]:
    """Seconds to add for their graph: idle rows' states, and lengths in place of the bound.

    Their attention reads real lengths: the mean of the first and the last token's.
    """
    state = qn.specs(config_of(DEALT, 1), 1, 1)[1].layers[0]
    assert isinstance(state, Delta)
    idle = (CAPTURED - DEALT.rows) * 2 * state.recurrent[0].nbytes  # read and written
    nets = WHOLE.layer_types.count(DELTA)
    blocks = [lowered(DEALT, BLOCK, capacity, None) for capacity in (PROMPT, CAPACITY)]
    first, last = (LAYERS / BLOCK * costs["npu_fused_attention"]["seconds"] for costs in blocks)
    return {"idle rows": nets * idle / bandwidth(), "lengths": (first - last) / 2}


def collectives(card: Card, tokens: int) -> dict[str, tuple[int, float]]:
    """How many of each a step has, and the bytes that each moves over a card's link.

    `tokens` are those of a group. A gather or a scatter among n moves (n - 1) / n of the whole.
    """
    part = (card.group - 1) / card.group
    hidden = tokens * WHOLE.hidden_size * 2 * part
    logits = card.rows * WHOLE.vocab_size * 4 * part
    ends = {"embedding, all-reduce": (1, 2 * hidden), "logits, all-gather": (1, logits)}
    if card.holders == 1:
        return {"all-reduce": (2 * LAYERS, 2 * hidden)} | ends
    # each card routes its part of the group's tokens; one in 16 rows stays
    rows = tokens / card.group * TOPK * (card.holders - 1) / card.holders
    routed = rows * WHOLE.hidden_size * 2
    return {
        "reduce-scatter": (LAYERS, hidden),
        "dispatch": (LAYERS, routed),
        "combine": (LAYERS, routed),
        "all-gather": (LAYERS, hidden),
    } | ends


def moving(card: Card, tokens: int, latency: float = LATENCY, dear: bool = False) -> float:
    """Seconds of a step's collectives, with nothing hidden behind other work."""
    special = DEAR if dear else {}
    return sum(
        count * (special.get(name, latency) + size / LINK)
        for name, (count, size) in collectives(card, tokens).items()
    )


def waiting(first: float) -> float:
    """Seconds a token spent on others' prompts, in a mean time per output token.

    Where a group decodes once its six prompts are done, the mean first token takes 3.5 rounds, and
    a request then waits 2.5 rounds on average.
    """
    return first * (ROUNDS - 1) / (ROUNDS + 1) / (OUTPUT - 1)


def predicted(card: Card) -> dict[str, float]:
    """Seconds of this project's step by the assumed costs: a floor."""
    parts = {
        "roofline": roofline(card)["sum"],
        "launches": step(card)["total"]["launches"] * LAUNCH_SECONDS,
        "collectives": moving(card, card.rows),
    }
    return parts | {"sum": sum(parts.values())}


def account(run: str, dear: bool = False) -> dict[str, float]:
    """Where their time per output token goes, in seconds; nothing explains the "rest".

    `enough` is what one launch would have to cost to leave no rest.
    """
    launch, latency = (DEAR_LAUNCH, DEAR_LATENCY) if dear else (LAUNCH_SECONDS, LATENCY)
    parts = {
        "roofline": roofline(DEALT)["sum"] + sum(captured().values()),
        "launches": THEIR_LAUNCHES * launch,
        "collectives": moving(DEALT, DEALT.rows, latency, dear),
        "others' prompts": waiting(FIRST[run]),
    }
    rest = TOKEN[run] - sum(parts.values())
    return parts | {"rest": rest, "enough": launch + rest / THEIR_LAUNCHES}


def first_token() -> dict[str, float]:
    """Seconds of a round of prefill, one prompt in each group, and of the mean first token."""
    total = step(DEALT, capacity=PROMPT, prompt=PROMPT)["total"]
    parts = {
        "roofline": total["seconds"],
        "launches": total["launches"] * LAUNCH_SECONDS,
        "collectives": moving(DEALT, PROMPT),
    }
    rounds, mean = sum(parts.values()), (ROUNDS + 1) / 2
    theirs = FIRST["fused rule on"]
    return parts | {"round": rounds, "mean": mean * rounds, "their round": theirs / mean}


@cache
def study() -> dict[str, Any]:
    """All numbers of the page."""
    cards = {
        card.name: {
            "rows": card.rows,
            "costs": {site: step(card)[site] for site in ("total", *SITES)},
            "roofline": roofline(card),
            "predicted": predicted(card),
            "experts counted": counted(card),
            "experts expected": distinct(REQUESTS, TOPK, EXPERTS) / card.holders + 1,
            "collectives": {
                name: {"count": count, "bytes": size}
                for name, (count, size) in collectives(card, card.rows).items()
            },
            "moving": [moving(card, card.rows, latency) for latency in LATENCIES],
        }
        for card in (DEALT, CUT)
    }
    runs = [("fused rule on", False), ("fused rule on", True), ("fused rule off", False)]
    return {
        "cards": cards,
        "fullest card": fullest(),
        "captured": captured(),
        "accounts": {run + ", dear" * dear: account(run, dear) for run, dear in runs},
        "first token": first_token(),
    }
