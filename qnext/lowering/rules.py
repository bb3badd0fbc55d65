"""Rules: rewrites of sites into other calls, as data; what fired and what declined, and why."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qnext.errors import LoweringError
from qnext.functional.tree import fake_mode_of, map_leaves, record_call
from qnext.lowering.calls import call_of
from qnext.lowering.graph import (
    evaluate,
    is_view,
    primitive_of,
    site_name,
    sites,
    storage_of,
    tensors,
    value,
)
from qnext.lowering.target import Target

COLLECTIVE = "collective"  # is what it is on every target: a call of torch.distributed
OTHER_PATTERN = "another pattern"  # the reason of a rule whose pattern does not end at a site


class Match(NamedTuple):
    """What a rule takes: nodes by the names `emit` knows them by, and the nodes it replaces."""

    inputs: Mapping[str, Any]
    outputs: tuple[Node | None, ...]  # what each result of emit replaces; None: nobody uses it
    covers: tuple[Node, ...] = ()  # other sites that go with the pattern, and share its reasons


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    `site` names the primitive (or torch operation) it is asked at. `match` finds the pattern that
    ends there. `guard` returns the reason why the rule does not apply, or None; it reads shapes,
    dtypes and facts of the target, never values. `emit` computes the same from the matched inputs
    with the target's calls; it only marshals. `contract` names the pages of the calls, or the
    torch operations, that it emits.
    """

    name: str
    site: str
    emit: Callable[..., Any]
    contract: str
    guard: Callable[..., str | None] = lambda target, **_: None
    match: Callable[[Node], Match | None] | None = None


class Verdict(NamedTuple):
    """What became of one site."""

    site: str  # what it was: rms_norm
    rule: str | None  # what took it, or None: left on the reference
    reasons: tuple[str, ...]  # of each candidate that declined, `rule: reason`


def whole(node: Node) -> Match:
    """The match of a primitive by itself."""
    results = [user for user in node.users if site_name(user) == "getitem"]
    outputs: tuple[Node | None, ...]
    if isinstance(value(node), tuple | list):
        by_index = {user.args[1]: user for user in results}
        outputs = tuple(by_index.get(i) for i in range(len(value(node))))
    else:
        outputs = (node,)
    return Match(dict(node.kwargs), outputs)


def rewrite(graph: Graph, rules: Sequence[Rule], target: Target) -> dict[Node, Verdict]:
    """Apply to each site the first rule that matches; returns the verdict for every site left.

    A verdict hangs on the nodes that the graph has afterwards. Nothing falls back in silence: a
    primitive without a rule, and one whose rules all declined, have verdicts that say so.
    """
    verdicts: dict[Node, Verdict] = {}
    shared: dict[Node, list[str]] = defaultdict(list)
    bodies: dict[Any, GraphModule] = {}
    for node in list(sites(graph)):
        if not node.users:  # an earlier match took it
            continue
        name, reasons = site_name(node), list(shared[node])
        for rule in (rule for rule in rules if rule.site == name):
            match = whole(node) if rule.match is None else rule.match(node)
            if match is None:
                reasons.append(f"{rule.name}: {OTHER_PATTERN}")
                continue
            reason = rule.guard(target, **_values(match.inputs))
            if reason is None:
                body = _body(match, rule, bodies)
                reason = _lacking(body, target)
            if reason is None:
                verdict = Verdict(name, rule.name, tuple(reasons))  # one for all that it made
                verdicts |= dict.fromkeys(_inline(graph, node, match, rule, body), verdict)
                break
            reasons.append(f"{rule.name}: {reason}")
            for other in match.covers:
                shared[other].append(reasons[-1])
        else:
            known = primitive_of(node)
            if not reasons and known:
                reasons = ["no rule" if rules else f"{target.name} has no rules"]
            if known and known.collective:
                verdicts[node] = Verdict(name, COLLECTIVE, ())
            else:
                verdicts[node] = Verdict(name, None, tuple(reasons))
    graph.eliminate_dead_code()
    alive = set(graph.nodes)
    return {node: verdict for node, verdict in verdicts.items() if node in alive}


def _values(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return map_leaves(lambda v: value(v) if isinstance(v, Node) else v, dict(inputs))


def _body(match: Match, rule: Rule, bodies: dict[Any, GraphModule]) -> GraphModule:
    """What `emit` does with the matched inputs, as a graph of its own.

    Recording takes milliseconds: what another layer asked for already is among `bodies`.
    """
    given = {k: value(v) for k, v in match.inputs.items() if isinstance(v, Node)}
    fixed = {k: v for k, v in match.inputs.items() if not isinstance(v, Node)}
    key = (rule, tuple(given), _described(list(given.values())), repr(fixed))
    if key not in bodies:
        bodies[key] = record_call(rule.emit, given, fixed)
    return bodies[key]


def _described(given: Sequence[Tensor]) -> tuple[Any, ...]:
    """All that a recording can depend on: shapes, places, and which tensors are the same."""
    storages, objects = [storage_of(t) for t in given], [id(t) for t in given]
    return tuple(
        (
            *(t.shape, t.stride(), t.storage_offset(), t.dtype, t.device),
            *(storages.index(storage), objects.index(one)),
        )
        for t, storage, one in zip(given, storages, objects, strict=True)
    )


def _lacking(body: GraphModule, target: Target) -> str | None:
    """Why the target cannot make some call of a body: the installed package has no such call."""
    pages = (found.page for node in body.graph.nodes if (found := call_of(node)))
    return next((reason for page in pages if (reason := target.lacks(page))), None)


def _inline(graph: Graph, root: Node, match: Match, rule: Rule, body: GraphModule) -> list[Node]:
    """Put the body in place of the matched nodes; returns the new sites."""
    inputs = [v for v in match.inputs.values() if isinstance(v, Node)]
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    known: dict[Node, Node] = dict(zip(placeholders, inputs, strict=True))
    with graph.inserting_before(root):
        results = graph.graph_copy(body.graph, known)  # fills `known`: node of the body -> copy
    made = [known[n] for n in body.graph.nodes if n.op == "call_function"]
    mode = fake_mode_of([v for n in inputs for v in tensors(value(n))]) if made else None
    for node in made:  # memory of its own, whoever else has such a body
        evaluate(node, mode)
    results = results if isinstance(results, tuple | list) else (results,)
    if len(results) != len(match.outputs):
        raise LoweringError(f"rule {rule.name} yields {len(results)}, not {len(match.outputs)}")
    for old, new in zip(match.outputs, results, strict=True):
        if old is not None:
            _check_same(rule, old, new)
            old.replace_all_uses_with(new)
    return [node for node in made if not is_view(node)]


def _check_same(rule: Rule, old: Node, new: Node) -> None:
    for was, now in zip(tensors(value(old)), tensors(value(new)), strict=False):
        if (was.shape, was.dtype) != (now.shape, now.dtype):
            raise LoweringError(
                f"rule {rule.name} turns {list(was.shape)} {was.dtype} into "
                f"{list(now.shape)} {now.dtype}"
            )
