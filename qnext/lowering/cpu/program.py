"""Programs: the kernels of a step that follow one another, run without Python in between.

What torch computes between them (lengths, indices) and does not wait for them goes before; what
waits for them ends a program. Where every tensor lies is settled here: results that nobody outside
sees share one piece of memory, each for as long as somebody reads it.
"""

from collections.abc import Collection, Sequence
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qnext.errors import LoweringError
from qnext.lowering.calls import call_of
from qnext.lowering.constants import FREE, PACKED
from qnext.lowering.cpu.calls import KERNELS, OPS, in_order, kernel_of, numbers
from qnext.lowering.cpu.library import Instruction, Operand, encode, is_readable
from qnext.lowering.cpu.step import Frame, Step
from qnext.lowering.graph import argument_of, arguments, is_view, storage_of, tensors, value

ALIGNMENT = 64  # bytes: a cache line


def fuse(module: GraphModule, weights: Collection[str], isa: str) -> None:
    """Replace the kernels of a graph by programs; `weights` names arguments that stay the same."""
    graph = module.graph
    _take_over(graph)
    fixed = {node for node in graph.nodes if _is_fixed(node, weights)}
    for number, group in enumerate(_groups(graph)):
        _replace(module, f"program_{number}", group, fixed, isa)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()


def _take_over(graph: Graph) -> None:
    """What donation added are kernels too: copies of pools, and values carried back to them.

    What does nothing goes.
    """
    for node in graph.nodes:
        found, fits = call_of(node), node.op == "call_function" and is_readable(value(node))
        if node.target is torch.ops.aten.to.dtype and _is_idle(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif fits and found and found.name == "write_back":
            node.target = OPS["write_back"]
        elif fits and node.target is torch.ops.aten.clone.default and len(node.args) == 1:
            node.target, node.args, node.kwargs = OPS["copy"], (), {"x": node.args[0]}


def _is_idle(node: Node) -> bool:
    """Whether a change of dtype changes nothing: it returns what it was given."""
    if len(node.args) != 2 or node.kwargs or not isinstance(node.args[0], Node):
        return False
    return bool(value(node.args[0]).dtype == node.args[1])


def _is_fixed(node: Node, weights: Collection[str]) -> bool:
    """Whether a node is an input that depends on weights alone."""
    if node.op != "placeholder":
        return False
    return argument_of(node.meta["path"]) in {*weights, PACKED, FREE}


def _groups(graph: Graph) -> list[list[Node]]:
    """Kernels that can run together, in order."""
    groups: list[list[Node]] = []
    group: list[Node] = []
    inside: set[Node] = set()  # the group, and views of its results
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        waits = not inside.isdisjoint(node.all_input_nodes)
        if kernel_of(node):
            group.append(node)
            inside.add(node)
        elif is_view(node):
            inside |= {node} if waits else set()
        elif group and (waits or _writes(node)):
            groups.append(group)
            group, inside = [], set()
    return [*groups, group] if group else groups


def _writes(node: Node) -> bool:
    call = call_of(node)
    return bool(call and call.writes)


class _Piece(NamedTuple):
    """A tensor's place: a piece of memory, and bytes from its beginning."""

    memory: int
    offset: int


class _Layout:
    """Where the tensors of a group lie: memory 0 is the arena, then inputs, then results."""

    def __init__(self, group: Sequence[Node], last_use: dict[int, int], kept: set[int]) -> None:
        self.inputs: list[Node] = []
        self.outputs: list[Tensor] = []  # fake
        self.results: dict[int, int] = {}  # fake storage -> input i, or output ~i
        self.arena = 0  # bytes
        self._last_use, self._kept = last_use, kept
        self._pieces: dict[int, _Piece] = {}  # of what lies within this program, by fake storage
        self._inputs: dict[Node, int] = {}
        self._busy: list[tuple[int, int, int]] = []  # bytes of the arena from, to, until which use
        self.instructions = [self._instruction(at, node) for at, node in enumerate(group)]

    def _instruction(self, at: int, node: Node) -> Instruction:
        name = kernel_of(node)
        assert name is not None
        kernel, given = KERNELS[name], in_order(node.target, node.kwargs)
        operands = {key: self._operand(v) for key, v in given.items() if isinstance(v, Node)}
        fresh = tensors(value(node))
        written = fresh[len(fresh) - len(kernel.writes) :]
        fresh = fresh[: len(fresh) - len(kernel.writes)]
        for key, result in zip(kernel.writes, written, strict=True):
            self._overwrite(node, operands[key], result)
        made = [self._result(at, result) for result in fresh]
        if kernel.workspace:
            size = kernel.workspace(**arguments(node))
            made.append(Operand(0, self._room(at, at, size), (size,), (1,), torch.uint8))
        rest = (v for v in given.values() if not isinstance(v, Node))
        return Instruction(name, (*operands.values(), *made), numbers(rest))

    def _operand(self, node: Node) -> Operand:
        """An argument: in a piece known already, or an input of the program."""
        tensor, stride = value(node), value(node).stride()
        if storage_of(tensor) not in self._pieces:
            root = _root(node)
            if not _is_whole(value(root)):
                root, stride = node, _contiguous(tensor.shape)
                return _at(_Piece(self._input(root), 0), tensor, stride)
            self._pieces[storage_of(tensor)] = _Piece(self._input(root), 0)
        piece = self._pieces[storage_of(tensor)]
        offset = piece.offset + tensor.storage_offset() * tensor.itemsize
        return _at(_Piece(piece.memory, offset), tensor, stride)

    def _input(self, node: Node) -> int:
        if node not in self._inputs:
            self._inputs[node] = len(self.inputs)
            self.inputs.append(node)
        return 1 + self._inputs[node]

    def _overwrite(self, node: Node, operand: Operand, result: Tensor) -> None:
        """A pool that is written in place is its own result."""
        if operand.size != tuple(result.shape) or operand.stride != _contiguous(operand.size):
            raise LoweringError(f"{node.name} writes into part of a tensor: a rule's fault")
        self._pieces[storage_of(result)] = _Piece(operand.memory, operand.offset)
        # memory of a result counts from -1 downwards, as ~0, ~1, ... do
        self.results[storage_of(result)] = operand.memory - (operand.memory > 0)

    def _result(self, at: int, tensor: Tensor) -> Operand:
        storage = storage_of(tensor)
        if storage in self._kept:
            self.outputs.append(tensor)
            self.results[storage] = ~(len(self.outputs) - 1)
            piece = _Piece(-len(self.outputs), 0)  # counted from the end, see Step.run
        else:
            size = tensor.untyped_storage().nbytes()
            piece = _Piece(0, self._room(at, self._last_use.get(storage, at), size))
        self._pieces[storage] = piece
        return _at(piece, tensor, tensor.stride())

    def _room(self, at: int, until: int, size: int) -> int:
        """The first free bytes of the arena from call `at` to call `until`."""
        self._busy = sorted(taken for taken in self._busy if taken[2] >= at)
        size = -(-size // ALIGNMENT) * ALIGNMENT
        offset = 0
        for begin, end, _ in self._busy:
            if begin - offset >= size:
                break
            offset = max(offset, end)
        self._busy.append((offset, offset + size, until))
        self.arena = max(self.arena, offset + size)
        return offset


def _at(piece: _Piece, tensor: Tensor, stride: Sequence[int]) -> Operand:
    return Operand(*piece, tuple(tensor.shape), tuple(stride), tensor.dtype)


def _contiguous(size: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(tuple(size), device="meta").stride()


def _root(node: Node) -> Node:
    """Whose memory a node looks at."""
    while is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_whole(tensor: Any) -> bool:
    """Whether a tensor is all of its memory, in order."""
    if not isinstance(tensor, Tensor):
        return False
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


def _framed(layout: _Layout, results: Sequence[int], fixed: Sequence[bool]) -> Frame:
    """With the results' memory counted from the beginning, now that their number is known."""
    pieces = 1 + len(layout.inputs) + len(layout.outputs)

    def settled(instruction: Instruction) -> Instruction:
        operands = (o._replace(memory=o.memory % pieces) for o in instruction.operands)
        return instruction._replace(operands=tuple(operands))

    outputs = ((tuple(t.shape), t.stride(), t.dtype) for t in layout.outputs)
    code = encode([settled(instruction) for instruction in layout.instructions])
    return Frame(layout.arena, tuple(results), tuple(outputs), tuple(fixed), code)


def _replace(
    module: GraphModule, name: str, group: list[Node], fixed: Collection[Node], isa: str
) -> None:
    """Put a program in the place of a group, after the last of it."""
    graph = module.graph
    inside = _inside(graph, group)
    last_use, kept = _uses(graph, group, inside)
    layout = _Layout(group, last_use, kept)
    order = [storage for storage in layout.results if storage in kept]
    results = [layout.results[storage] for storage in order]
    frame = _framed(layout, results, [node in fixed for node in layout.inputs])
    module.add_submodule(name, Step(frame, isa))
    with graph.inserting_after(group[-1]):
        step = graph.call_module(name, tuple(layout.inputs))
    step.meta["val"] = ()  # what it returns is known of its items
    new = _taken(graph, step, order, group, inside)
    stays = {*group, *inside}
    for old, fresh in new.items():
        old.replace_all_uses_with(fresh, delete_user_cb=lambda user: user not in stays)
    for node in reversed(graph.nodes):
        if node in stays:
            graph.erase_node(node)


def _taken(
    graph: Graph, step: Node, order: Sequence[int], group: list[Node], inside: list[Node]
) -> dict[Node, Node]:
    """What stands after a program for a group's results, and for views of them."""
    new: dict[Node, Node] = {}
    last = step
    stays = {*group, *inside}
    for node in [node for node in graph.nodes if node in stays]:
        parents = [parent for parent in node.all_input_nodes if parent in new]
        whole = isinstance(value(node), Tensor) and storage_of(value(node)) in order
        with graph.inserting_after(last):
            if whole and (node in group or (node.target is getitem and not parents)):
                last = graph.call_function(getitem, (step, order.index(storage_of(value(node)))))
                last.meta["val"] = value(node)
            elif parents and node not in group:
                last = graph.node_copy(node, lambda n: new.get(n, n))
            else:
                continue
        new[node] = last
    return new


def _inside(graph: Graph, group: list[Node]) -> list[Node]:
    """The views of a group's results, in order."""
    found: dict[Node, None] = {}
    known = set(group)
    for node in graph.nodes:
        seen = (parent for parent in node.all_input_nodes if parent in known)
        fits = node.op == "call_function" and node not in known and is_view(node)
        if fits and any(_shows(node, parent) for parent in seen):
            found[node] = None
            known.add(node)
    return list(found)


def _shows(node: Node, parent: Node) -> bool:
    """Whether a view looks at the memory of this input of its; another may tell the shape alone."""
    if "val" not in node.meta:
        return True
    mine, theirs = ({storage_of(t) for t in tensors(value(n))} for n in (node, parent))
    return not mine.isdisjoint(theirs)


def _uses(graph: Graph, group: list[Node], inside: list[Node]) -> tuple[dict[int, int], set[int]]:
    """Of each result of a group: the last call of it that reads it; and those read outside."""
    at, views, base = {node: i for i, node in enumerate(group)}, set(inside), _bases(group)
    last: dict[int, int] = {}
    kept: set[int] = set()
    for node in graph.nodes:
        if node in views:
            continue
        for parent in node.all_input_nodes:
            for storage in {storage_of(t) for t in tensors(value(parent))} & base.keys():
                if node in at:
                    last[base[storage]] = at[node]
                else:
                    kept |= {storage, base[storage]}
    return last, kept


def _bases(group: list[Node]) -> dict[int, int]:
    """The memory of each result: its own, or that of the pool which became it."""
    base: dict[int, int] = {}
    for node in group:
        results = tensors(value(node))
        base |= {storage_of(t): storage_of(t) for t in results}
        writes = KERNELS[str(kernel_of(node))].writes
        for key, result in zip(writes, results[len(results) - len(writes) :], strict=True):
            argument = node.kwargs[key]
            assert isinstance(argument, Node)
            pool = storage_of(value(argument))
            base[storage_of(result)] = base.get(pool, pool)
    return base
