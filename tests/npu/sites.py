"""Every site of a step by itself: what its rule makes of the reference's inputs on the device."""

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

import qnext as qn
from qnext.functional.ops import PRIMITIVES
from qnext.functional.ops.tolerance import SUMS
from qnext.functional.tree import map_leaves
from qnext.lowering.graph import site_name, sites
from qnext.lowering.npu.table import RULES
from qnext.lowering.rules import Match, Rule, _values, whole
from qnext.lowering.simplify import find_static, fold, merge_equal
from qnext.lowering.target import Target
from tests.samples import relative_rms


class Found(NamedTuple):
    """One result of one rule beside the reference's."""

    rule: str
    node: Node
    match: Match
    got: Tensor
    want: Tensor
    tolerance: float
    values: dict[Node, Any]  # of every node, on the host

    @property
    def site(self) -> str:
        return site_name(self.node)

    @property
    def error(self) -> float:
        return relative_rms(self.got, self.want)


def examine(function: Any, arguments: tuple[Any, ...], target: Target) -> list[Found]:
    """Run a step on the host, and beside it each site on the device with the same inputs."""
    module = deepcopy(qn.jit(function).trace(*arguments).trace.graph)
    find_static(module.graph)
    fold(module.graph)
    merge_equal(module.graph)
    module.recompile()
    host = Interpreter(module, garbage_collect_values=False)
    leaves = [leaf for tree in arguments for leaf in qn.functional.tree.leaves(tree)]
    with torch.no_grad():
        host.run(*leaves)
        return [found for node in sites(module.graph) for found in _site(node, host.env, target)]


def _site(node: Node, values: dict[Node, Any], target: Target) -> list[Found]:
    for rule in (rule for rule in RULES if rule.site == site_name(node)):
        match = whole(node) if rule.match is None else rule.match(node)
        if match is None or rule.guard(target, **_values(match.inputs)) is not None:
            continue
        given = {k: _there(v, values) for k, v in match.inputs.items()}
        made = rule.emit(**given)
        made = made if isinstance(made, tuple | list) else (made,)
        pairs = zip(match.outputs, made, strict=True)
        return [_found(rule, node, match, out, got, values) for out, got in pairs if out]
    return []


def _there(part: Any, values: dict[Node, Any]) -> Any:
    """A node's value on the device, in memory of its own, as calls write in place."""
    if not isinstance(part, Node):
        return part
    return map_leaves(lambda t: t.to("npu") if isinstance(t, Tensor) else t, values[part])


def _found(
    rule: Rule, node: Node, match: Match, out: Node, got: Tensor, values: dict[Node, Any]
) -> Found:
    want, got = values[out], got.cpu()
    if _is_pool(out, want):  # row 0 is scratch
        got, want = got[1:], want[1:]
    if site_name(node) == "attention":  # what padded queries see means nothing
        position, context = (values[node.kwargs[name]] for name in ("position", "context"))
        valid = position < context[:, None]
        got, want = got[valid], want[valid]
    known = PRIMITIVES.get(site_name(node))
    tolerance = (known.tolerance if known else SUMS)[torch.bfloat16].relative_rms
    return Found(rule.name, node, match, got, want, tolerance, values)


def _is_pool(out: Node, value: Tensor) -> bool:
    """Whether a result replaces a leaf of the state."""
    return any(user.op == "output" for user in out.users) and value.ndim > 2
