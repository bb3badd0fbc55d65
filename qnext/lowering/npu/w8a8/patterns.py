"""Where int8 tokens are made and used, and what of that one call does."""

from typing import Any

from torch.fx import Node

from qnext.lowering.graph import site_name, value
from qnext.lowering.npu import ranks
from qnext.lowering.npu.patterns import (
    argument,
    gated_linear_unit,
    narrowest,
    only_user,
    past_casts,
    result,
    uncast,
)
from qnext.lowering.rules import Match, whole


def normed_tokens(node: Node) -> Match | None:
    """quantize_tokens(rms_norm(x + residual)), where nothing else reads the norm."""
    tokens, total = _only(node, "quantize_tokens"), argument(node, "x")
    if tokens is None or not isinstance(total, Node) or site_name(total) != "add":
        return None
    x, residual = total.args
    if not isinstance(x, Node) or not isinstance(residual, Node):
        return None
    inputs = {
        "x": x,
        "residual": residual,
        "weight": argument(node, "weight"),
        "eps": argument(node, "eps"),
        "rounding": argument(tokens, "rounding"),
    }
    return Match(inputs, (result(tokens, 0), result(tokens, 1), total), (tokens,))


def gated_tokens(node: Node) -> Match | None:
    """quantize_tokens(gated_rms_norm(...).flatten(-2)), where nothing else reads the norm."""
    flat = next(iter(node.users)) if len(node.users) == 1 else None
    if flat is None or site_name(flat) != "flatten" or flat.args[1:] != (-2,):
        return None
    tokens = _only(flat, "quantize_tokens")
    if tokens is None:
        return None
    inputs = whole(node).inputs | {"rounding": argument(tokens, "rounding")}  # type: ignore[operator]
    return Match(inputs, (result(tokens, 0), result(tokens, 1)), (tokens,))


def products(node: Node) -> Match | None:
    """All int8 products of the same tokens, rounded to one dtype at once; `node` is the first."""
    tokens = argument(node, "x")
    siblings = [u for u in tokens.users if site_name(u) == "int8_linear" and rounded(u)]
    if not siblings or siblings[0] is not node:
        return None
    inputs: dict[str, Any] = {"x": tokens, "x_scale": argument(node, "x_scale")}
    for i, sibling in enumerate(siblings):
        inputs |= {f"weight{i}": argument(sibling, "weight")}
        inputs |= {f"scale{i}": argument(sibling, "scale")}
    outputs = tuple(rounded(sibling) for sibling in siblings)
    dtypes = {value(node).dtype for node in outputs if node is not None}
    return Match({**inputs, "dtypes": dtypes}, outputs)


def rounded(product: Node) -> Node | None:
    """The cast to fewer bits that is a product's only user."""
    cast = _only(product, "to")
    narrows = cast is not None and value(cast).itemsize < value(product).itemsize
    return cast if narrows else None


def gated_product(node: Node) -> Match | None:
    """quantize_tokens(swiglu(int8_linear(...))), the tokens between an expert's two products."""
    up = past_casts(node)
    unit = None if up is None else _unit(up)
    tokens = None if unit is None else _only(unit, "quantize_tokens")
    if tokens is None:
        return None
    inputs = dict(node.kwargs) | {"rounding": argument(tokens, "rounding")}
    return Match(inputs, (result(tokens, 0), result(tokens, 1)), (tokens,))


def _unit(up: Node) -> Node | None:
    """silu(first half of up) * second half, the only use of `up`."""
    halves = _only(up, "chunk")
    first = None if halves is None else result(halves, 0)
    silu = None if first is None else only_user(first, "silu")
    found = None if silu is None else gated_linear_unit(silu)
    return None if found is None else found.outputs[0]


def routed(node: Node) -> Match | None:
    """int8_experts with the routing that chooses them."""
    route = _route(node)
    if route is None:
        return None
    inputs = {k: v for k, v in node.kwargs.items() if k not in ("expert", "weight")}
    inputs |= {"logits": narrowest(argument(route, "logits"))}
    inputs |= {"topk": argument(route, "topk"), "renormalise": argument(route, "renormalise")}
    return Match(inputs, (node,), (route,))


def mixture(node: Node) -> Match | None:
    """From the router's projection to the sum of routed and shared experts, all of them int8."""
    x, route = argument(node, 0), only_user(past_casts(node) or node, "route")
    expert = None if route is None else result(route, 1)
    experts = None if expert is None else only_user(expert, "int8_experts")
    if experts is None or argument(experts, "x") is not x or _route(experts) is not route:
        return None
    total = only_user(experts, "add")
    shared = None if total is None else shared_expert(total, experts, x)
    if route is None or shared is None:
        return None
    weights = ("gate_up", "gate_up_scale", "down", "down_scale")
    inputs: dict[str, Any] = {
        "x": x,
        "router": argument(node, 1),
        "topk": argument(route, "topk"),
        "renormalise": argument(route, "renormalise"),
        **{name: argument(experts, name) for name in weights},
        **shared,
    }
    return Match(inputs, (total,), covers=(route, experts))


def shared_expert(total: Node, experts: Node, x: Any) -> dict[str, Any] | None:
    """The weights of sigmoid(x gate) * network(x), the other summand, where the network is int8."""
    product = next((arg for arg in total.args if arg is not experts), None)
    if not isinstance(product, Node) or site_name(product) != "mul":
        return None
    gate, network = (uncast(arg) for arg in product.args)
    gate = gate if site_name(gate) == "sigmoid" else network
    network = next(arg for arg in map(uncast, product.args) if arg is not gate)
    if site_name(gate) != "sigmoid" or site_name(network) != "int8_linear":
        return None
    inner, linear = argument(network, "x").args[0], argument(gate, 0)
    first = next((u for u in _products_of(x) if _leads_to(u, inner)), None)
    if first is None or site_name(linear) != "linear" or argument(linear, 0) is not x:
        return None
    return {
        "shared_gate": argument(linear, 1),
        "shared_gate_up": argument(first, "weight"),
        "shared_gate_up_scale": argument(first, "scale"),
        "shared_down": argument(network, "weight"),
        "shared_down_scale": argument(network, "scale"),
    }


def _products_of(x: Node) -> list[Node]:
    """The int8 products of the tokens made of x."""
    made = [result(tokens, 0) for tokens in x.users if site_name(tokens) == "quantize_tokens"]
    users = [user for q in made if q is not None for user in q.users]
    return [user for user in users if site_name(user) == "int8_linear"]


def _leads_to(product: Node, tokens: Node) -> bool:
    found = gated_product(product)
    return found is not None and found.covers == (tokens,)


def _route(experts: Node) -> Node | None:
    """The routing whose results, and nothing else's, choose the experts."""
    weight, expert = uncast(argument(experts, "weight")), argument(experts, "expert")
    route = expert.args[0] if site_name(expert) == "getitem" else None
    if not isinstance(route, Node) or site_name(route) != "route" or weight not in route.users:
        return None
    return route if only_user(expert, "int8_experts") is experts else None


def _only(node: Node, name: str) -> Node | None:
    """The only user of a node, if it is of that name."""
    return only_user(node, name) if len(node.users) == 1 else None


def held_mixture(node: Node) -> Match | None:
    """`mixture` of a rank that holds some of the experts; to the sum over all ranks."""
    weights = ("gate_up", "gate_up_scale", "down", "down_scale")
    return ranks.held_mixture(node, "int8_experts", weights, shared_expert)
