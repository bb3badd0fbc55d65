"""A compiled step captured as one NPU graph: replayed without a launch from the host.

A graph knows memory, not arguments. Weights, and pools that the step writes in place, are used
where they are; every other argument has a static copy, rewritten before a replay unless what is
passed is that copy already, as it is for a donated state that goes round. What the step only hands
on, such as pools that it has no part in, the graph never sees. What a caller gets is a value: a
copy, except for donated leaves, whose memory is the caller's from call to call.
"""

import json
import tempfile
import warnings
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from qnext.errors import LoweringError
from qnext.lowering.calls import call_of
from qnext.lowering.donate import IN_PLACE
from qnext.lowering.graph import argument_of, primitive_of, site_name, value
from qnext.lowering.host import checked, updates
from qnext.lowering.npu.probe import first_line, require_torch_npu
from qnext.lowering.trace import bind

if TYPE_CHECKING:
    from qnext.lowering.compiled import Compiled


class Captured:
    """One graph of a compiled step; call it as the step itself.

    `pool` is the graph's memory, to be shared with the next capture.
    """

    def __init__(self, compiled: "Compiled", arguments: dict[str, Any], pool: Any) -> None:
        self.compiled, self.trace = compiled, compiled.trace
        self._npu = require_torch_npu().npu
        given = compiled.take(arguments)
        self._constants = compiled.packed(given)
        fixed = _fixed(compiled)
        self._handed_on = _handed_on(compiled, len(given))
        unread = set(self._handed_on.values())
        self._fixed = {i: leaf for i, leaf in enumerate(given) if i in fixed}
        # zeros: while warming up every row writes to scratch
        self._inputs = [
            leaf if i in fixed | unread else torch.zeros_like(leaf) for i, leaf in enumerate(given)
        ]
        self._host = {a.name: [a.most] * a.rows for a in compiled.made.host}
        self._updates = updates(compiled.graph.graph)
        self._graph = self._npu.NPUGraph()
        self._outputs = self._capture(pool)
        self._copied = [(i, leaf) for i, leaf in enumerate(self._inputs) if i not in fixed | unread]
        self._carried = {leaf.data_ptr() for leaf in self._inputs}
        self.pool = self._graph.pool()

    def _run(self) -> list[Tensor]:
        lists = [self._host[a.name] for a in self.compiled.made.host]
        return list(self.compiled.graph(*self._inputs, *self._constants, *lists))

    def _capture(self, pool: Any) -> list[Tensor]:
        more = {"pool": pool} if pool is not None else {}
        try:
            with torch.no_grad():
                self._run()  # what is made at first use is made outside the graph
                self._npu.synchronize()
                with self._npu.graph(self._graph, auto_dispatch_capture=bool(self._host), **more):
                    return self._run()
        except RuntimeError as error:
            left = {site_name(n) for n in self.compiled.graph.graph.nodes if primitive_of(n)}
            told = f"; left on their reference are {', '.join(sorted(left))}" if left else ""
            raise LoweringError(
                f"{self.trace.name} cannot be captured: {first_line(error)}{told}"
            ) from error

    def __call__(self, *args: Any, host: Any = None, **kwargs: Any) -> Any:
        """Put the arguments where the graph reads them, and replay; returns the step's results."""
        arguments = bind(self.trace.function, args, kwargs)
        self.compiled.check(arguments)
        lists = checked(self.compiled.made.host, host, self.trace.name)
        given = self.compiled.take(arguments)
        self._check_fixed(given)
        for i, static in self._copied:
            if static.data_ptr() != given[i].data_ptr():
                static.copy_(given[i])
        self._update(dict(zip(self._host, lists, strict=True)))
        self.replay()
        results = [
            given[self._handed_on[at]].detach() if at in self._handed_on else self._value(out)
            for at, out in enumerate(self._outputs)
        ]
        return self.compiled.give(arguments, results)

    def replay(self) -> None:
        """Run the graph on what its inputs hold. Nothing is checked, and nothing returned."""
        self._graph.replay()

    def launches(self) -> list[str]:
        """The device's tasks in one replay, by the names in the package's own dump of the graph."""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the dump needs no debug mode
            file = Path(folder) / "graph.json"
            self._graph.debug_dump(str(file))
            dump = json.loads(file.read_text())
        events = dump if isinstance(dump, list) else dump["traceEvents"]
        return [event["name"] for event in events if event.get("ph") == "X"]

    def _check_fixed(self, given: list[Tensor]) -> None:
        for i, bound in self._fixed.items():
            if given[i].data_ptr() != bound.data_ptr():
                path = self.trace.leaves[i].path
                raise LoweringError(
                    f"{path} is other memory than {self.trace.name} was captured with: pass what "
                    "the last call returned, or capture again"
                )

    def _update(self, host: dict[str, list[int]]) -> None:
        """Give the recorded calls their lists; a replay waits for it."""
        if self._updates:
            self._graph.update([{word: host[name]} for name, word in self._updates])

    def _value(self, output: Tensor) -> Tensor:
        return output.detach() if output.data_ptr() in self._carried else output.clone()


def _fixed(compiled: "Compiled") -> set[int]:
    """The inputs that a graph uses where they are: weights, and pools that calls write.

    What lies in one tuple with such a pool stays where it is, too: other steps write it.
    """
    lowered = compiled.lowered
    inputs = [node for node in lowered.graph.graph.nodes if node.op == "placeholder"]
    written = {
        _leaf(write.node.kwargs[write.argument])
        for write in lowered.writes
        if write.verdict == IN_PLACE and site_name(write.node) != "write_back"
    }
    leaves, roots = lowered.trace.leaves, set(lowered.weights)
    tuples = {_tuple_of(leaf.path) for i, leaf in enumerate(leaves) if inputs[i] in written}
    return {
        i
        for i, leaf in enumerate(leaves)
        if _tuple_of(leaf.path) in tuples or argument_of(leaf.path) in roots
    }


def _tuple_of(path: str) -> str:
    """`state.mtp[0]` of `state.mtp[0].key`; an argument that is a tensor is in none, but itself."""
    return path.rpartition(".")[0] or path


def _handed_on(compiled: "Compiled", count: int) -> dict[int, int]:
    """Results that are inputs of which nothing is read, of the first `count`: place by place."""
    nodes = compiled.graph.graph.nodes
    inputs = [node for node in nodes if node.op == "placeholder"][:count]
    unread = {node: i for i, node in enumerate(inputs) if all(u.op == "output" for u in node.users)}
    (results,) = next(node for node in nodes if node.op == "output").args
    return {at: unread[node] for at, node in enumerate(results) if node in unread}


def _leaf(pool: Any) -> Node:
    """The input whose memory a pool has, through views and the writes before."""
    while pool.op == "call_function":
        picked = pool.target is getitem
        maker = pool.all_input_nodes[0] if picked else pool
        if (call := call_of(maker)) and call.writes:  # what it writes are its last results
            results = len(value(maker)) if picked else 1
            place = (pool.args[1] if picked else 0) - results
            pool = maker.kwargs[call.writes[place]]
        else:
            pool = pool.all_input_nodes[0]
    return pool
