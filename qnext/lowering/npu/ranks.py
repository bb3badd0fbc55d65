"""Experts that ranks share, as the NPU targets lower them: `mixture` with one expert more.

That expert has weights of zero: choices of other ranks' experts go there. So a rank's part of the
sum takes the launches of the whole sum, one for the table that sends choices away, and the
collective. The shared expert is added by the rank that holds the first of the others.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import linear

from qnext.functional import ops
from qnext.lowering.graph import site_name, value
from qnext.lowering.npu import calls
from qnext.lowering.npu.patterns import argument, only_user, past_casts, result, shared_expert
from qnext.lowering.rules import Match


def held_mixture(node: Node) -> Match | None:
    """From the router's projection to the sum of shared and routed experts, of all ranks."""
    x = argument(node, 0)
    route = only_user(past_casts(node) or node, "route")
    if route is None:
        return None
    weight, expert = past_casts(result(route, 0)), result(route, 1)
    experts = None if expert is None else _experts_here(expert)
    if experts is None or argument(experts, "weight") is not weight:
        return None
    reduced = only_user(experts, "all_reduce")
    total = None if reduced is None else only_user(reduced, "add")
    if expert is None or reduced is None or total is None or argument(experts, "x") is not x:
        return None
    shared = shared_expert(total, reduced, x)
    place = only_user(expert, "sub")
    if shared is None or place is None:
        return None
    inputs: dict[str, Any] = {
        "x": x,
        "router": argument(node, 1),
        "topk": argument(route, "topk"),
        "renormalise": argument(route, "renormalise"),
        "gate_up": argument(experts, "gate_up"),
        "down": argument(experts, "down"),
        "first": argument(place, 1),
        "group": argument(reduced, "group"),
        "size": argument(reduced, "size"),
        **shared,
    }
    return Match(inputs, (total,), covers=(route, experts))


def _experts_here(expert: Node) -> Node | None:
    """The experts of a rank that are chosen by their place among these, others beyond the last."""
    place = only_user(expert, "sub")
    chosen = None if place is None else only_user(place, "where")
    experts = None if chosen is None else only_user(chosen, "experts")
    if place is None or chosen is None or experts is None or len(expert.users) != 1:
        return None
    count = value(argument(experts, "gate_up")).shape[0]
    inside, kept, otherwise = chosen.args
    limits = {(site_name(side), side.args) for side in getattr(inside, "args", ())}
    wanted = {("ge", (place, 0)), ("lt", (place, count))}
    fits = limits == wanted and kept is place and otherwise == count
    return experts if fits and argument(experts, "expert") is chosen else None


def mixture_held(
    *,
    x: Tensor,
    router: Tensor,
    shared_gate: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared_gate_up: Tensor,
    shared_down: Tensor,
    topk: int,
    renormalise: bool,
    first: int,
    group: str,
    size: int,
) -> Tensor:
    """Eleven launches and a collective; ten where the shared expert is another rank's."""
    experts, count = router.shape[0], gate_up.shape[0]
    leads = first == 0
    logits = linear(x, torch.cat([router, shared_gate]) if leads else router)
    weight, expert = calls.npu_gating(
        logits=logits[:, :experts], topk=topk, renormalise=renormalise
    )
    up, out = [gate_up], [down]
    if leads:
        weight = torch.cat([weight, logits[:, experts:].sigmoid()], dim=-1)
        always = torch.full((x.shape[0], 1), experts, dtype=torch.int32, device=x.device)
        expert = torch.cat([expert, always], dim=-1)
        up, out = [*up, shared_gate_up[None]], [*out, shared_down[None]]
    groups = count + leads + 1
    places = torch.full((experts + leads,), groups - 1, dtype=torch.int32, device=x.device)
    own = torch.arange(count, dtype=torch.int32, device=x.device)
    table = torch.cat([places[:first], own, places[first + count : experts]])
    if leads:
        table = torch.cat([table, places.new_full((1,), count)])
    rows, where, counts = calls.npu_init_routing(
        x=x, expert=table.index_select(0, expert.flatten()).view_as(expert), experts=groups
    )
    one = torch.cat([*up, torch.zeros_like(gate_up[:1])]).mT.contiguous()
    two = torch.cat([*out, torch.zeros_like(down[:1])]).mT.contiguous()
    inner = calls.npu_swiglu(x=calls.npu_grouped_matmul(x=rows, weight=one, counts=counts))
    outer = calls.npu_grouped_matmul(x=inner, weight=two, counts=counts)
    part = calls.npu_finalize_routing(rows=outer, weight=weight, where=where)
    return ops.all_reduce(x=part, group=group, size=size)
