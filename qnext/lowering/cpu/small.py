"""The cpu target's rules for torch's operations on little data: lengths, tables, tokens.

Kernels take integers and bools; of floats they copy and compare rows. A number becomes a constant
of the step, so that one kernel serves numbers and tensors.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qnext.lowering.cpu.calls import OPS
from qnext.lowering.cpu.library import FLOATS, is_readable, short
from qnext.lowering.graph import is_view, site_name, value
from qnext.lowering.rules import Match, Rule

WHOLE = (torch.int32, torch.int64, torch.bool)
MOST = 1 << 14  # numbers that are computed one by one; torch is faster with more
# torch's operations on two operands, by ours
NAMES = {
    "bitwise_and": "and",
    "logical_and": "and",
    "__and__": "and",
    "bitwise_or": "or",
    "logical_or": "or",
    "__or__": "or",
    **{name: name for name in ("add", "sub", "mul", "floor_divide", "remainder")},
    **{name: name for name in ("minimum", "maximum", "lt", "le", "gt", "ge", "eq", "ne")},
}
DIVISIONS = ("floor_divide", "remainder")


def _tensor(part: Any) -> Tensor | None:
    """The fake value of a node that is a tensor which kernels can read."""
    made = value(part) if isinstance(part, Node) else None
    return made if is_readable(made) else None


def _is_whole(part: Any) -> bool:
    """Whether an operand is of integers or bools, or an integer."""
    made = _tensor(part)
    return made.dtype in WHOLE if made is not None else type(part) is int


def _holds(like: Tensor, number: Any) -> bool:
    """Whether a dtype has a number, so that it can stand beside such a tensor as one."""
    if like.dtype == torch.bool:
        return False
    limits = torch.iinfo(like.dtype)
    return bool(limits.min <= number <= limits.max)


def _operands(node: Node, count: int, *keywords: str) -> tuple[Any, ...] | None:
    """A node's arguments, where it has so many and no other keywords than these."""
    fits = len(node.args) == count and not node.kwargs.keys() - set(keywords)
    return node.args if fits else None


def _is_little(node: Node) -> bool:
    made = _tensor(node)
    return made is not None and made.dtype in WHOLE and made.numel() <= MOST


def _constant(part: Any, dtype: torch.dtype) -> Tensor:
    return part if isinstance(part, Tensor) else torch.full((), part, dtype=dtype)


# ---- matches, and what they become


def _binary(node: Node) -> Match | None:
    given = _operands(node, 2, "alpha")
    if given is None or not _is_little(node):
        return None
    (a, b), first = given, _tensor(given[0])
    if first is None or not (_is_whole(a) and _is_whole(b)):
        return None
    if not isinstance(b, Node) and not _holds(first, b):
        return None
    if site_name(node) in DIVISIONS and (isinstance(b, Node) or b in (0, -1)):
        return None  # what has no quotient is torch's to refuse
    return Match({"a": a, "b": b, "alpha": node.kwargs.get("alpha", 1)}, (node,))


def _compute(operation: str, *, a: Tensor, b: Any, alpha: int) -> Tensor:
    b = _constant(b, a.dtype)
    if alpha != 1:
        b = OPS["compute"](a=b, b=_constant(alpha, b.dtype), operation="mul")
    made: Tensor = OPS["compute"](a=a, b=b, operation=operation)
    return made


def _not(node: Node) -> Match | None:
    given = _operands(node, 1)
    if given is None or not _is_little(node) or value(node).dtype != torch.bool:
        return None
    return Match({"x": given[0]}, (node,)) if _is_whole(given[0]) else None


def _negated(*, x: Tensor) -> Tensor:
    made: Tensor = OPS["compute"](a=x, b=_constant(0, x.dtype), operation="eq")
    return made


def _clamp(node: Node) -> Match | None:
    x, low, high = (*node.args, None, None)[:3]
    made, bounds = _tensor(x), [bound for bound in (low, high) if bound is not None]
    if node.kwargs or made is None or not (_is_little(node) and all(map(_is_whole, bounds))):
        return None
    if any(isinstance(bound, Node) or not _holds(made, bound) for bound in bounds):
        return None
    return Match({"x": x, "low": low, "high": high}, (node,))


def _clamped(*, x: Tensor, low: int | None, high: int | None) -> Tensor:
    for bound, operation in ((low, "maximum"), (high, "minimum")):
        if bound is not None:
            x = OPS["compute"](a=x, b=_constant(bound, x.dtype), operation=operation)
    return x


def _where(node: Node) -> Match | None:
    given = _operands(node, 3)
    if given is None or not _is_little(node):
        return None
    condition, x, other = given
    if _tensor(condition) is None or not (_is_whole(x) and _is_whole(other)):
        return None
    dtype = value(node).dtype
    return Match({"condition": condition, "x": x, "other": other, "dtype": dtype}, (node,))


def _chosen(*, condition: Tensor, x: Any, other: Any, dtype: torch.dtype) -> Tensor:
    x, other = _constant(x, dtype), _constant(other, dtype)
    made: Tensor = OPS["choose"](condition=condition, x=x, other=other)
    return made


def _to(node: Node) -> Match | None:
    given = _operands(node, 2)
    if given is None or not isinstance(given[1], torch.dtype) or not _is_little(node):
        return None
    if not _is_whole(given[0]):
        return None
    return Match({"x": given[0], "dtype": short(value(node).dtype)}, (node,))


def _sum(node: Node) -> Match | None:
    given = _operands(node, 2, "dtype")
    if given is None or not isinstance(given[1], list | tuple) or len(given[1]) != 1:
        return None
    return _added(node, given[0], given[1][0], running=False)


def _cumsum(node: Node) -> Match | None:
    given = _operands(node, 2)
    return None if given is None else _added(node, given[0], given[1], running=True)


def _added(node: Node, x: Any, axis: int, running: bool) -> Match | None:
    summed = _tensor(x)
    if summed is None or not (_is_little(node) and _is_whole(x)) or summed.numel() > MOST:
        return None
    how = {"axis": axis % summed.ndim, "running": running, "dtype": short(value(node).dtype)}
    return Match({"x": x, **how}, (node,))


def _argmax(node: Node) -> Match | None:
    given = _operands(node, 2)
    return Match({"x": given[0]}, (node,)) if given and _is_row(*given) else None


def _all_finite(node: Node) -> Match | None:
    given = _operands(node, 2)
    if given is None or site_name(given[0]) != "isfinite" or len(given[0].users) > 1:
        return None
    (x,) = given[0].args
    return Match({"x": x}, (node,)) if _is_row(x, given[1]) else None


def _is_row(x: Any, axis: int) -> bool:
    """Whether an axis is the last one, of floats that lie together."""
    made = _tensor(x)
    if made is None or made.dtype not in FLOATS or not made.ndim or not made.shape[-1]:
        return False
    return axis % made.ndim == made.ndim - 1 and made.stride(-1) == 1


def _clone(node: Node) -> Match | None:
    given = _operands(node, 1)
    if given is None or _tensor(node) is None or not value(node).ndim:
        return None
    return Match({"x": given[0]}, (node,))


def _flatten(node: Node) -> Match | None:
    if is_view(node) or _tensor(node) is None or _tensor(node.args[0]) is None:
        return None
    return Match({"x": node.args[0], "shape": list(value(node).shape)}, (node,))


def _flattened(*, x: Tensor, shape: list[int]) -> Tensor:
    made: Tensor = OPS["copy"](x=x)
    return made.view(shape)


def _cat(node: Node) -> Match | None:
    return _put_together(node, rank=value(node).ndim)


def _stack(node: Node) -> Match | None:
    return _put_together(node, rank=value(node).ndim - 1)


def _put_together(node: Node, rank: int) -> Match | None:
    """Tensors of so many axes, along an axis of the result; their names keep their order."""
    parts: Any = node.args[0]
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    made, some = _tensor(node), isinstance(parts, list | tuple) and len(parts) > 0
    if made is None or not some or node.kwargs or not made.numel():
        return None
    each = [_tensor(part) for part in parts]
    if any(part is None or (part.dtype, part.ndim) != (made.dtype, rank) for part in each):
        return None
    named = {f"part_{i}": part for i, part in enumerate(parts)}
    return Match({"axis": axis % made.ndim, **named}, (node,))


def _joined(*, axis: int, **parts: Tensor) -> Tensor:
    whole, *rest = parts.values()
    for part in rest:
        whole = OPS["join"](a=whole, b=part, axis=axis)
    return whole if rest else OPS["copy"](x=whole)


def _stacked(*, axis: int, **parts: Tensor) -> Tensor:
    return _joined(axis=axis, **{name: part.unsqueeze(axis) for name, part in parts.items()})


def _embedding(node: Node) -> Match | None:
    given = _operands(node, 2)
    return None if given is None else _looked_up(node, *given)


def _index_select(node: Node) -> Match | None:
    given = _operands(node, 3)
    if given is None or given[1] != 0:
        return None
    return _looked_up(node, given[0], given[2])


def _looked_up(node: Node, x: Any, index: Any) -> Match | None:
    table, made = _tensor(x), _tensor(node)
    if table is None or made is None or not _is_index(index) or not made.numel():
        return None
    return Match({"x": x, "index": index}, (node,)) if table.ndim == 2 else None


def _is_index(part: Any) -> bool:
    made = _tensor(part)
    return made is not None and made.dtype in (torch.int32, torch.int64)


def _gather(node: Node) -> Match | None:
    given = _operands(node, 3)
    return None if given is None else _picked(node, given[0], given[2], given[1])


def _take_along(node: Node) -> Match | None:
    given = _operands(node, 3)
    return None if given is None else _picked(node, *given)


def _picked(node: Node, x: Any, index: Any, axis: Any) -> Match | None:
    """Numbers of x by their places on one axis; on the others an index is spread over x's."""
    table, made = _tensor(x), _tensor(node)
    if table is None or made is None or not _is_index(index) or axis is None or not made.numel():
        return None
    axis %= made.ndim
    others = [table.shape[d] >= made.shape[d] for d in range(made.ndim) if d != axis]
    if table.ndim != made.ndim or not all(others):
        return None
    return Match({"x": x, "index": index, "axis": axis, "shape": list(made.shape)}, (node,))


def _pick(*, x: Tensor, index: Tensor, axis: int, shape: list[int]) -> Tensor:
    for other, size in enumerate(shape):  # of which `gather` takes the first ones
        if other != axis and size != x.shape[other]:
            x = x.narrow(other, 0, size)
    made: Tensor = OPS["pick"](x=x, index=index, axis=axis)
    return made


def _index_put(node: Node) -> Match | None:
    given = _operands(node, 3)
    if given is None or not isinstance(given[1], list | tuple) or len(given[1]) != 1:
        return None
    pool, (index,), values = given
    made, put = _tensor(node), _tensor(values)
    if made is None or put is None or not _is_index(index) or value(index).ndim != 1:
        return None
    rows = (len(value(index)), *made.shape[1:])
    if tuple(put.shape) != rows or put.ndim < 2 or put.dtype != made.dtype or not put.numel():
        return None
    return Match({"pool": pool, "index": index, "values": values}, (node,))


def _rule(
    name: str, site: str, emit: Callable[..., Any], match: Callable[[Node], Match | None]
) -> Rule:
    return Rule(name, site, emit, f"kernel {name}", match=match)


SMALL_RULES = (
    *(_rule("compute", site, partial(_compute, ours), _binary) for site, ours in NAMES.items()),
    _rule("compute", "clamp", _clamped, _clamp),
    _rule("compute", "bitwise_not", _negated, _not),
    _rule("compute", "logical_not", _negated, _not),
    _rule("choose", "where", _chosen, _where),
    _rule("convert", "to", OPS["convert"], _to),
    _rule("add_up", "sum", OPS["add_up"], _sum),
    _rule("add_up", "cumsum", OPS["add_up"], _cumsum),
    _rule("largest", "argmax", OPS["largest"], _argmax),
    _rule("finite", "all", OPS["finite"], _all_finite),
    _rule("copy", "clone", OPS["copy"], _clone),
    _rule("copy", "flatten", _flattened, _flatten),
    _rule("join", "cat", _joined, _cat),
    _rule("join", "stack", _stacked, _stack),
    _rule("rows", "embedding", OPS["rows"], _embedding),
    _rule("rows", "index_select", OPS["rows"], _index_select),
    _rule("pick", "gather", _pick, _gather),
    _rule("pick", "take_along_dim", _pick, _take_along),
    _rule("put_rows", "index_put", OPS["put_rows"], _index_put),
)
