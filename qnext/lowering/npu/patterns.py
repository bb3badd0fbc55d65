"""What rules recognise beyond a single primitive: where in the graph, and what belongs together."""

from operator import getitem
from typing import Any

from torch.fx import Node

from qnext.lowering.graph import site_name, value
from qnext.lowering.rules import Match, whole
from qnext.lowering.simplify import static_of

PASSING = {"to", "alias", "view_as", "view", "flatten.using_ints", "unflatten.int"}


def argument(node: Node, at: int | str) -> Any:
    """A node's argument, by place or by name."""
    return node.args[at] if isinstance(at, int) else node.kwargs[at]


def only_user(node: Node, name: str) -> Node | None:
    """The one user of a node of that name, if there is exactly one."""
    found = [user for user in node.users if site_name(user) == name]
    return found[0] if len(found) == 1 else None


def result(node: Node, index: int) -> Node | None:
    """The node that takes one of several results."""
    found = [user for user in node.users if user.target is getitem and argument(user, 1) == index]
    return found[0] if len(found) == 1 else None


def past_casts(node: Node | None) -> Node | None:
    """The end of a chain of casts that starts at a node and has no other users."""
    while node is not None and len(node.users) == 1:
        user = next(iter(node.users))
        if site_name(user) not in ("to", "alias"):
            break
        node = user
    return node


def uncast(node: Any) -> Any:
    """What a chain of casts was made of."""
    while isinstance(node, Node) and site_name(node) in ("to", "alias"):
        node = node.args[0]
    return node


def narrowest(node: Node) -> Node:
    """Of a chain of casts and what it begins with, the one with the fewest bits."""
    chain = [node]
    while site_name(chain[-1]) in ("to", "alias"):
        chain.append(chain[-1].all_input_nodes[0])
    return min(chain, key=lambda each: value(each).itemsize)


def added_norm(node: Node) -> Match | None:
    """rms_norm(x + residual), where the sum is used on its own as well."""
    total = argument(node, "x")
    if not isinstance(total, Node) or site_name(total) != "add" or len(total.args) != 2:
        return None
    x, residual = total.args
    if not isinstance(x, Node) or not isinstance(residual, Node):
        return None
    inputs = {
        "x": x,
        "residual": residual,
        "weight": argument(node, "weight"),
        "eps": argument(node, "eps"),
    }
    return Match(inputs, (node, total))


def joined_linears(node: Node) -> Match | None:
    """All projections without bias of one input, the first of them being `node`."""
    x = argument(node, 0)
    assert isinstance(x, Node)
    siblings = [u for u in x.users if site_name(u) == "linear" and len(u.args) == 2]
    if len(siblings) < 2 or siblings[0] is not node:
        return None
    weights = {f"weight{i}": argument(sibling, 1) for i, sibling in enumerate(siblings)}
    return Match({"x": x, **weights}, tuple(siblings))


def stacked_norms(node: Node) -> Match | None:
    """l2_norm of query and key heads that lie side by side in one tensor."""
    piece = _piece(node)
    if piece is None:
        return None
    source, at, split = piece
    for user in (u for other in split.users for view in other.users for u in view.users):
        if site_name(user) == "l2_norm" and user is not node and (found := _piece(user)):
            same = found[0] is source and argument(user, "eps") == argument(node, "eps")
            if same and found[1] == at + 1 and value(user).shape == value(node).shape:
                start = sum(argument(split, 1)[:at])
                inputs = {"x": source, "start": start, "heads": value(node).shape[-2]}
                inputs |= {"width": value(node).shape[-1], "eps": argument(node, "eps")}
                return Match(inputs, (node, user))
    return None


def _piece(norm: Node) -> tuple[Node, int, Node] | None:
    """(whole, index, split node) where x = unflatten(split(whole, ...)[index])."""
    heads = argument(norm, "x")
    if not isinstance(heads, Node) or not heads.all_input_nodes:
        return None
    item = heads.all_input_nodes[0]
    if item.target is not getitem or site_name(argument(item, 0)) != "split_with_sizes":
        return None
    split = argument(item, 0)
    return argument(split, 0), argument(item, 1), split


def convolution(node: Node) -> Match | None:
    """A short convolution; `start` is 1 where shapes say that each row's window moves by one."""
    known = static_of(argument(node, "start"))
    moves_by_one = known is not None and bool((known == 1).all())
    match = whole(node)
    return Match({**match.inputs, "moves_by_one": moves_by_one}, match.outputs)


def rotary(node: Node) -> Match:
    """A rotation; `bound` is what the attention that sees the query has pages for, or 0."""
    match = whole(node)
    query = match.outputs[0]
    attention = None if query is None else only_user(query, "attention")
    bound = 0
    if attention is not None:
        table, pool = value(argument(attention, "block_table")), argument(attention, "key_pool")
        bound = table.shape[1] * value(pool).shape[1]
    return Match({**match.inputs, "bound": bound}, match.outputs)


def attention(node: Node) -> Match:
    """Attention; `padded` tells whether some query may be invalid, as far as shapes tell."""
    match = whole(node)
    context, position = argument(node, "context"), argument(node, "position")
    return Match({**match.inputs, "padded": not _covers(context, position)}, match.outputs)


def _covers(context: Node, position: Node) -> bool:
    """Whether context is the first position plus one for each of a row's: context = past + seq."""
    if site_name(context) != "add":
        return False
    known = [static_of(arg) for arg in context.args]
    taken = next((k for k in known if k is not None), None)
    return taken is not None and bool((taken == value(position).shape[1]).all())


def gates(node: Node) -> Match | None:
    """The gates; `padded` tells whether some position may be invalid."""
    known = static_of(argument(node, "valid"))
    match = whole(node)
    padded = known is None or not bool(known.all())
    return Match({**match.inputs, "padded": padded}, match.outputs)


def gated_linear_unit(node: Node) -> Match | None:
    """silu(first half) * second half."""
    first = argument(node, 0)
    product = only_user(node, "mul")
    if not isinstance(first, Node) or first.target is not getitem or product is None:
        return None
    halves = argument(first, 0)
    if site_name(halves) != "chunk" or argument(first, 1) != 0 or len(node.users) != 1:
        return None
    if result(halves, 1) not in product.args:
        return None
    return Match({"x": argument(halves, 0)}, (product,))


def mixture(node: Node) -> Match | None:
    """From the router's projection to the sum of routed and shared experts."""
    x = argument(node, 0)
    route = only_user(past_casts(node) or node, "route")
    if route is None:
        return None
    weight, expert = past_casts(result(route, 0)), result(route, 1)
    experts = None if expert is None else only_user(expert, "experts")
    if (
        experts is None
        or argument(experts, "weight") is not weight
        or argument(experts, "x") is not x
    ):
        return None
    total = only_user(experts, "add")
    shared = None if total is None else shared_expert(total, experts, x)
    if total is None or shared is None:
        return None
    inputs: dict[str, Any] = {
        "x": x,
        "router": argument(node, 1),
        "topk": argument(route, "topk"),
        "renormalise": argument(route, "renormalise"),
        "gate_up": argument(experts, "gate_up"),
        "down": argument(experts, "down"),
        **shared,
    }
    return Match(inputs, (total,), covers=(route, experts))


def shared_expert(total: Node, experts: Node, x: Any) -> dict[str, Node] | None:
    """The weights of sigmoid(x gate) * down(swiglu(gate_up x)), the other summand."""
    product = next((arg for arg in total.args if arg is not experts), None)
    if not isinstance(product, Node) or site_name(product) != "mul":
        return None
    parts = {site_name(arg): arg for arg in product.args if isinstance(arg, Node)}
    if parts.keys() != {"sigmoid", "linear"}:
        return None
    gate, down = argument(parts["sigmoid"], 0), parts["linear"]
    unit = argument(down, 0)
    if site_name(unit) != "mul":
        return None
    silu = next((arg for arg in unit.args if site_name(arg) == "silu"), None)
    found = None if silu is None else gated_linear_unit(silu)
    if found is None or site_name(gate) != "linear" or argument(gate, 0) is not x:
        return None
    up = found.inputs["x"]
    if site_name(up) != "linear" or argument(up, 0) is not x:
        return None
    return {
        "shared_gate": argument(gate, 1),
        "shared_gate_up": argument(up, 1),
        "shared_down": argument(down, 1),
    }


def written_rows(node: Node) -> Match | None:
    """index_put of whole rows: pool[index] = values, index of one axis, nothing accumulated."""
    pool, places, values = node.args[:3]
    accumulates = len(node.args) > 3 and bool(node.args[3])
    if not isinstance(places, list | tuple) or len(places) != 1 or accumulates:
        return None
    return Match({"pool": pool, "index": places[0], "values": values}, (node,))
