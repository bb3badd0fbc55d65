"""The calls of the cpu target: a kernel for each primitive, and for what lies between them.

A kernel is given tensors in the order of its call's arguments, then results, then its workspace;
and numbers in theirs. Types say which dtypes it takes: a letter is float32 or bfloat16, the same
wherever it stands in the call.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from qnext.functional.ops import PRIMITIVES
from qnext.functional.ops.quant import OVER, RECIPROCAL, TIMES
from qnext.lowering.calls import CALLS, Call, call_of, register
from qnext.lowering.cpu.between import BETWEEN, OPERATIONS
from qnext.lowering.cpu.library import (
    ADDRESS,
    KINDS,
    Instruction,
    Operand,
    Program,
    encode,
    load,
    short,
)

PREFIX = "cpu_"
INDEX, BOOL = "index", "bool"
# numbers for words: as kernels/quantize.h, small.cpp and kernel.h have them
CODES: dict[Any, int] = {
    TIMES: 0,
    OVER: 1,
    RECIPROCAL: 2,
    **{name: code for code, name in enumerate(OPERATIONS)},
    **{short(dtype): kind for dtype, kind in KINDS.items()},
}


class Kernel(NamedTuple):
    """What a kernel wants: types of its tensors, those it writes, bytes of its workspace.

    A type is a letter, a dtype's name, `index` (int32 or int64), `whole` (or bool) or `any`.
    """

    tensors: str
    writes: tuple[str, ...] = ()
    workspace: Callable[..., int] | None = None

    @property
    def types(self) -> dict[str, str]:
        """Type by argument."""
        return dict(part.split(":") for part in self.tensors.split())


def _experts_space(*, x: Tensor, expert: Tensor, gate_up: Tensor, **_: Any) -> int:
    """Groups of pairs, then for each pair what lies between its products and what they yield."""
    pairs, (experts, two_ffn) = expert.numel(), gate_up.shape[:2]
    return 4 * (2 + 2 * experts + pairs) + 4 * pairs * (two_ffn // 2 + x.shape[1])


def _int8_experts_space(*, x: Tensor, expert: Tensor, gate_up: Tensor, **_: Any) -> int:
    """And the integers and scales of tokens and of pairs."""
    (tokens, d), pairs, ffn = x.shape, expert.numel(), gate_up.shape[1] // 2
    integers = tokens * d + pairs * ffn
    return _experts_space(x=x, expert=expert, gate_up=gate_up) + 4 * (tokens + pairs) + integers


KERNELS = {
    "rms_norm": Kernel("x:X weight:W"),
    "gated_rms_norm": Kernel("x:X weight:W gate:X"),
    "l2_norm": Kernel("x:X"),
    "rotary": Kernel("query:X key:X position:index frequency:float32"),
    "short_conv": Kernel(
        "x:X weight:W window:X rows:index offset:index start:index", writes=("window",)
    ),
    "delta_gates": Kernel("a:X b:X A_log:float32 dt_bias:float32 valid:bool"),
    "delta_rule": Kernel(
        "query:X key:X value:X g:float32 beta:X state:S slots:index", writes=("state",)
    ),
    "kv_write": Kernel(
        "key_pool:P value_pool:P key:X value:X index:index", writes=("key_pool", "value_pool")
    ),
    "attention": Kernel(
        "query:X key_pool:P value_pool:P block_table:index position:index context:index"
    ),
    "route": Kernel("logits:X"),
    "experts": Kernel("x:X expert:index weight:X gate_up:X down:X", workspace=_experts_space),
    "quantize_tokens": Kernel("x:X"),
    "int8_linear": Kernel("x:int8 x_scale:float32 weight:int8 scale:float32"),
    "int8_experts": Kernel(
        "x:X expert:index weight:X gate_up:int8 gate_up_scale:float32 down:int8 down_scale:float32",
        workspace=_int8_experts_space,
    ),
    "linear": Kernel("x:X weight:X"),
    "swiglu": Kernel("gate:X up:X"),
    "add": Kernel("a:X b:X"),
    "gate": Kernel("x:X gate:X"),
    "cast": Kernel("x:X"),
    "compute": Kernel("a:whole b:whole"),
    "choose": Kernel("condition:bool x:whole other:whole"),
    "convert": Kernel("x:whole"),
    "add_up": Kernel("x:whole"),
    "largest": Kernel("x:X"),
    "finite": Kernel("x:X"),
    "copy": Kernel("x:any"),
    "join": Kernel("a:any b:any"),
    "rows": Kernel("x:any index:index"),
    "pick": Kernel("x:any index:index"),
    "put_rows": Kernel("pool:any index:index values:any", writes=("pool",)),
    "write_back": Kernel("into:any values:any", writes=("into",)),
}


def kernel_of(node: Node) -> str | None:
    """The kernel that a node runs, if it runs one."""
    found = call_of(node)
    known = found is not None and found.name.startswith(PREFIX)
    return found.name.removeprefix(PREFIX) if found and known else None


def in_order(op: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments in the order of an operator's signature."""
    return {argument.name: arguments[argument.name] for argument in op._schema.arguments}


def numbers(arguments: Iterable[Any]) -> tuple[float, ...]:
    """The arguments that are no tensors, as kernels take them."""
    return tuple(float(CODES.get(value, value)) for value in arguments)


def _launch(name: str, shapes: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Run one kernel by itself; a pool that it writes is overwritten and returned."""
    kernel, made = KERNELS[name], shapes(**arguments)
    results = list(made) if isinstance(made, tuple) else [made]
    fresh = results[: len(results) - len(kernel.writes)]
    given = [value for value in arguments.values() if isinstance(value, Tensor)]
    memory = [*given, *fresh]
    if kernel.workspace:
        memory.append(torch.empty(kernel.workspace(**arguments), dtype=torch.uint8))
    operands = (Operand(i, 0, tuple(t.shape), t.stride(), t.dtype) for i, t in enumerate(memory))
    rest = (value for value in arguments.values() if not isinstance(value, Tensor))
    step = Instruction(name, tuple(operands), numbers(rest))
    addresses = array(ADDRESS, (piece.data_ptr() for piece in memory))
    Program(encode([step]), load("native")).run(addresses, torch.get_num_threads())
    results = [*fresh, *(arguments[written] for written in kernel.writes)]
    return tuple(results) if isinstance(made, tuple) else results[0]


def _define(name: str) -> Any:
    """The call of a kernel; shapes and work of a primitive's are the primitive's own."""
    moved: Callable[..., int] | None
    if known := PRIMITIVES.get(name):
        schema = known.schema.removeprefix(name)
        shapes, flops, moved, reference = known.shapes, known.flops, known.bytes, known.reference
    else:
        schema, reference, shapes, flops, moved = BETWEEN[name]

    def run(**arguments: Any) -> Any:
        return _launch(name, shapes, in_order(CALLS[PREFIX + name].op, arguments))

    run.__doc__ = reference.__doc__
    record = Call(
        PREFIX + name, f"kernel {name}", run, shapes, KERNELS[name].writes, flops, moved, 1
    )
    register(record, schema)
    return record.op


OPS = {name: _define(name) for name in KERNELS}
