"""Experts that other groups' tokens travel to, as the NPU targets lower them: match, guard, emit.

The fused calls sort what comes by expert, so the products follow at once. They take so many tokens
and no more; of a longer prompt runs of tokens travel one after another. Where the calls do not
apply, as with fewer ranks than an A2 wants, every rank gets all tokens, computes its experts' part
of their sums, and the parts are added up and scattered: as many collectives, more operations.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import linear

from qnext.lowering.graph import site_name
from qnext.lowering.npu import calls, ranks
from qnext.lowering.npu import dispatch_calls as travel
from qnext.lowering.npu.collective import all_gather, reduce_scatter
from qnext.lowering.npu.patterns import (
    argument,
    only_user,
    past_casts,
    result,
    uncast,
)
from qnext.lowering.npu.w8a8 import calls as int8_calls
from qnext.lowering.npu.w8a8 import emit as w8a8
from qnext.lowering.rules import Match, Rule
from qnext.lowering.simplify import static_of
from qnext.lowering.target import Target

DIRECT, RELAYED = "direct", "relayed"
BESIDE = "beside"  # inputs of a match that are projected as well
CALLS = ("npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2")
TOKENS = {DIRECT: 512, RELAYED: 256}  # that one call takes
CHOICES = 16  # of a token
FEWEST, MOST = 2, 384  # ranks of an A3
RELAYS = (16, 32, 64)  # ranks of an A2
WIDTHS = {DIRECT: (1024, 7168), RELAYED: (32, 7168)}
SUMMED = 512  # experts that `combine` takes; newer releases: 1024

Guard = Callable[..., str | None]
Computed = Callable[..., tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]


def rules(int8: bool, products: str, guard: Guard) -> tuple[Rule, ...]:
    """The fused calls, a rule a kind of chip, then the gather that every chip has.

    products: the calls that compute float or int8 experts. guard: theirs.
    """
    prefix = "int8_experts" if int8 else "experts"
    fused = (
        Rule(
            f"{prefix}_{kind}",
            "linear",
            sender(kind, int8),
            f"npu_moe_distribute_dispatch_v2, {products}, npu_moe_distribute_combine_v2",
            guard_of(kind, guard),
            sent_experts,
        )
        for kind in TOKENS
    )
    gathered = Rule(
        f"{prefix}_gathered",
        "linear",
        gatherer(int8),
        f"HcclAllGather, npu_moe_init_routing_v2, {products}, HcclReduceScatter",
        guard,
        gathered_experts,
    )
    return *fused, gathered


def gathered_experts(node: Node) -> Match | None:
    """From the router's projection to the sum that comes back of rows that were dispatched."""
    route = only_user(past_casts(node) or node, "route")
    expert = route and result(route, 1)
    sender = expert and only_user(expert, "dispatch")
    rows = sender and result(sender, 0)
    made = rows and (only_user(rows, "experts") or only_user(rows, "int8_experts"))
    total = made and only_user(made, "combine")
    if not route or not expert or not sender or not made or not total:
        return None
    same = argument(total, "expert") is expert and argument(total, "sent") is result(sender, 2)
    routed = uncast(argument(total, "weight")) is result(route, 0)
    apart = set(expert.users) == {sender, total} and argument(sender, "x") is argument(node, 0)
    if not same or not routed or not apart or not _as_it_came(made, sender):
        return None
    inputs = {k: v for k, v in made.kwargs.items() if k not in ("x", "expert", "weight")}
    inputs |= {"x": argument(node, 0), "router": argument(node, 1)}
    inputs |= {name: argument(route, name) for name in ("topk", "renormalise")}
    inputs |= {name: argument(sender, name) for name in ("group", "size", "rank", "experts")}
    return Match(inputs, (total,), (route, sender, made))


def sent_experts(node: Node) -> Match | None:
    """The same with what else is projected from these tokens: one product makes all of it."""
    found = gathered_experts(node)
    if found is None:
        return None
    users = found.inputs["x"].users
    beside = [u for u in users if site_name(u) == "linear" and len(u.args) == 2 and u is not node]
    weights = {f"{BESIDE}{i}": argument(other, 1) for i, other in enumerate(beside)}
    return Match(dict(found.inputs) | weights, (*found.outputs, *beside), found.covers)


def _as_it_came(experts: Node, sender: Node) -> bool:
    """Whether experts take each row that came once, at its place, as it is."""
    place, ones = argument(experts, "expert"), argument(experts, "weight")
    as_placed = site_name(place) == "unsqueeze" and place.args == (result(sender, 1), 1)
    known = static_of(ones)  # of many rows values are not noted
    return as_placed and (
        site_name(ones) == "ones_like" if known is None else bool((known == 1).all())
    )


def guard_of(kind: str, inner: Guard) -> Guard:
    """The guard of the fused calls as a chip has them, and of the experts between."""

    def guard(
        target: Target,
        *,
        x: Tensor,
        size: int,
        experts: int,
        topk: int,
        **given: Any,
    ) -> str | None:
        if target.facts.dispatch != kind:
            return f"the target's dispatch is {target.facts.dispatch}"
        if experts % size:
            return f"{experts} experts on {size} ranks, the call wants as many on each"
        if kind == RELAYED and size not in RELAYS:
            return f"{size} ranks, the call takes 16, 32 or 64"
        if not FEWEST <= size <= MOST:
            return f"{size} ranks, the call takes {FEWEST} to {MOST}"
        if topk > CHOICES or experts > SUMMED:
            return f"{topk} of {experts} experts, the call takes {CHOICES} of {SUMMED}"
        least, most = WIDTHS[kind]
        width = x.shape[1]
        if not least <= width <= most or width % 32:
            return f"tokens of {width}: must be a multiple of 32 from {least} to {most}"
        lacking = next((why for page in CALLS if (why := target.lacks(page))), None)
        return lacking or inner(target, x=x, topk=topk, **given)

    return guard


def sender(kind: str, int8: bool) -> Callable[..., tuple[Tensor, ...]]:
    """What the rule of a chip's calls emits, for float or for int8 experts."""
    computed = _int8_computed if int8 else _computed

    def emit(
        *, x: Tensor, router: Tensor, topk: int, renormalise: bool, **given: Any
    ) -> tuple[Tensor, ...]:
        """Three launches, then five a run of tokens, two of which are collectives."""
        beside = [given.pop(name) for name in list(given) if name.startswith(BESIDE)]
        weights = {k: given.pop(k) for k in list(given) if isinstance(given[k], Tensor)}
        where = given | {"relayed": kind == RELAYED}
        packed = torch.cat([router, *beside]) if beside else router
        rows = [part.shape[0] for part in (router, *beside)]
        logits, *others = linear(x, packed).split(rows, dim=-1)
        weight, expert = calls.npu_gating(logits=logits, topk=topk, renormalise=renormalise)
        whole = (x, expert, weight.float())
        runs = zip(*(each.split(TOKENS[kind]) for each in whole), strict=True)
        sums = [_summed(a, b, c, where, weights, computed) for a, b, c in runs]
        return sums[0] if len(sums) == 1 else torch.cat(sums), *others

    return emit


def _summed(
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    where: dict[str, Any],
    weights: dict[str, Tensor],
    computed: Computed,
) -> Tensor:
    """A run of tokens to their experts and back."""
    given = {"x": x, "expert": expert, "weight": weight, **where}
    rows, (info, received, scales) = computed(given, **weights)
    return travel.npu_combine(
        rows=rows,
        expert=expert,
        weight=weight,
        info=info,
        received=received,
        scales=scales,
        **where,
    )


def _computed(
    given: dict[str, Any], gate_up: Tensor, down: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    rows, counts, *notes = travel.npu_dispatch(**given)
    inner = calls.npu_grouped_matmul(x=rows, weight=gate_up.mT.contiguous(), counts=counts)
    inner = calls.npu_swiglu(x=inner)
    outer = calls.npu_grouped_matmul(x=inner, weight=down.mT.contiguous(), counts=counts)
    return outer, tuple(notes)


def _int8_computed(
    given: dict[str, Any],
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    rows, scale, counts, *notes = travel.npu_dispatch_quant(**given)
    inner, inner_scale = int8_calls.npu_grouped_matmul_swiglu_quant(
        x=rows, x_scale=scale, weight=w8a8.nz(gate_up), scale=gate_up_scale, counts=counts
    )
    outer = int8_calls.npu_grouped_matmul_quant(
        x=inner,
        x_scale=inner_scale,
        weight=w8a8.nz(down),
        scale=down_scale.to(torch.bfloat16),
        counts=counts,
    )
    return outer, tuple(notes)


def gatherer(int8: bool) -> Callable[..., Tensor]:
    """What the rule emits that has every rank compute its part for all tokens."""
    held = w8a8.experts_held if int8 else ranks.experts_held

    def emit(
        *,
        x: Tensor,
        router: Tensor,
        group: str,
        size: int,
        rank: int,
        experts: int,
        **given: Any,
    ) -> Tensor:
        """Ten launches, two of which are collectives; nine with int8."""
        every = all_gather(x=x.contiguous(), group=group, size=size).flatten(0, 1)
        scores = linear(every, router)
        part = held(x=every, logits=scores, first=experts * rank // size, **given)
        return reduce_scatter(x=part, group=group, size=size)

    return emit
