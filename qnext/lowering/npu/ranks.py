"""Experts that ranks share, as the NPU targets lower them: with one expert more.

Its second matrix is zero, and choices of other ranks' experts go there. So a rank's part of the sum
takes the launches of the whole sum, one for the table that sends choices away, and the collective.
Where a rule takes the mixture as a whole, the shared expert is added by the rank that holds the
first of the others.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import linear

from qnext.lowering.graph import site_name, value
from qnext.lowering.npu import calls
from qnext.lowering.npu.collective import all_reduce
from qnext.lowering.npu.patterns import (
    argument,
    narrowest,
    only_user,
    past_casts,
    result,
    shared_expert,
    uncast,
)
from qnext.lowering.rules import Match


class Choice(NamedTuple):
    """How a rank's experts are chosen: the routing, and the number of the first that it holds."""

    route: Node
    first: int


def choice_of(experts: Node) -> Choice | None:
    """Of experts that are chosen by their place among a rank's, others beyond the last of these."""
    chosen: Any = argument(experts, "expert")
    if site_name(chosen) != "where" or len(chosen.users) != 1:
        return None
    inside, place, otherwise = chosen.args
    count = value(argument(experts, "gate_up")).shape[0]
    limits = {(site_name(side), side.args) for side in inside.all_input_nodes}
    both = site_name(inside) == "__and__" and otherwise == count
    if not both or limits != {("ge", (place, 0)), ("lt", (place, count))}:
        return None
    expert = place.args[0] if site_name(place) == "sub" else None
    if not isinstance(expert, Node) or site_name(expert) != "getitem" or len(expert.users) != 1:
        return None
    route: Any = expert.args[0]
    weight = uncast(argument(experts, "weight"))
    good = site_name(route) == "route" and weight in route.users and weight is not expert
    return Choice(route, place.args[1]) if good else None


def held_experts(node: Node) -> Match | None:
    """A rank's experts, float or int8, with the routing that chooses them."""
    choice = choice_of(node)
    if choice is None:
        return None
    route, first = choice
    inputs = {k: v for k, v in node.kwargs.items() if k not in ("expert", "weight")}
    inputs |= {"logits": narrowest(argument(route, "logits")), "first": first}
    inputs |= {"topk": argument(route, "topk"), "renormalise": argument(route, "renormalise")}
    return Match(inputs, (node,), (route,))


def held_mixture(
    node: Node,
    name: str = "experts",
    weights: Sequence[str] = ("gate_up", "down"),
    shared_of: Callable[[Node, Node, Any], dict[str, Any] | None] = shared_expert,
) -> Match | None:
    """From the router's projection to the sum of shared and routed experts, of all ranks.

    name, weights: of the experts' primitive. shared_of: finds the weights of the shared expert.
    """
    x, route = argument(node, 0), only_user(past_casts(node) or node, "route")
    experts = None if route is None else _weighted(route, name)
    choice = None if experts is None else choice_of(experts)
    reduced = None if experts is None else only_user(experts, "all_reduce")
    total = None if reduced is None else only_user(reduced, "add")
    if experts is None or choice is None or reduced is None or total is None:
        return None
    shared = shared_of(total, reduced, x)
    if choice.route is not route or argument(experts, "x") is not x or shared is None:
        return None
    inputs = {
        "x": x,
        "router": argument(node, 1),
        "topk": argument(choice.route, "topk"),
        "renormalise": argument(choice.route, "renormalise"),
        "first": choice.first,
        "group": argument(reduced, "group"),
        "size": argument(reduced, "size"),
        **{weight: argument(experts, weight) for weight in weights},
        **shared,
    }
    return Match(inputs, (total,), (choice.route, experts))


def _weighted(route: Node, name: str) -> Node | None:
    """The experts that a routing's weights go to."""
    end = past_casts(result(route, 0))
    return None if end is None else only_user(end, name)


def sent(expert: Tensor, experts: int, first: int, own: int, further: int = 0) -> Tensor:
    """Choices by their group: the rank's `own` experts from the `first` of all `experts` on, then
    `further` ones, whose numbers follow theirs. The rest is the last group."""
    away = torch.full((experts + further,), own + further, dtype=torch.int32, device=expert.device)
    here = torch.arange(own + further, dtype=torch.int32, device=expert.device)
    table = torch.cat([away[:first], here[:own], away[first + own : experts], here[own:]])
    return table.index_select(0, expert.flatten()).view_as(expert)


def with_nobody(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of experts, and of one more whose results are zero."""
    return torch.cat([up, up[:1]]), torch.cat([down, torch.zeros_like(down[:1])])


def experts_held(
    *,
    x: Tensor,
    logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk: int,
    renormalise: bool,
    first: int,
) -> Tensor:
    """Seven launches, routing included."""
    weight, expert = calls.npu_gating(logits=logits, topk=topk, renormalise=renormalise)
    groups = sent(expert, logits.shape[1], first, gate_up.shape[0])
    return _sum(x, weight, groups, gate_up, down)


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
    """Eleven launches and a collective; eight where the shared expert is another rank's."""
    choices = chosen(x, router, shared_gate, gate_up.shape[0], topk, renormalise, first)
    if first == 0:
        gate_up = torch.cat([gate_up, shared_gate_up[None]])
        down = torch.cat([down, shared_down[None]])
    return all_reduce(x=_sum(x, *choices, gate_up, down), group=group, size=size)


def chosen(
    x: Tensor,
    router: Tensor,
    shared_gate: Tensor,
    own: int,
    topk: int,
    renormalise: bool,
    first: int,
) -> tuple[Tensor, Tensor]:
    """(weights, groups) of each token's choices, with the first rank's shared expert among them."""
    count = router.shape[0]
    if first:
        weight, expert = calls.npu_gating(
            logits=linear(x, router), topk=topk, renormalise=renormalise
        )
        return weight, sent(expert, count, first, own)
    logits = linear(x, torch.cat([router, shared_gate]))
    weight, expert = calls.npu_gating(logits=logits[:, :count], topk=topk, renormalise=renormalise)
    weight = torch.cat([weight, logits[:, count:].sigmoid()], dim=-1)
    always = torch.full((x.shape[0], 1), count, dtype=torch.int32, device=x.device)
    return weight, sent(torch.cat([expert, always], dim=-1), count, first, own, further=1)


def _sum(x: Tensor, weight: Tensor, groups: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Five launches: tokens sorted by group, both products, and each token's weighted sum."""
    up, out = with_nobody(gate_up, down)
    rows, where, counts = calls.npu_init_routing(x=x, expert=groups, experts=up.shape[0])
    inner = calls.npu_grouped_matmul(x=rows, weight=up.mT.contiguous(), counts=counts)
    inner = calls.npu_swiglu(x=inner)
    outer = calls.npu_grouped_matmul(x=inner, weight=out.mT.contiguous(), counts=counts)
    return calls.npu_finalize_routing(rows=outer, weight=weight, where=where)
