"""From aclnn's handles to torch CPU tensors that alias device memory, and kernels over them.

`@kernel(name, signature, check=)` makes a function the aclnn call `name`. `check` sees the planned
call (shapes, dtypes, host numbers); what lies in device memory is checked when the kernel runs.
Either raises `Refused` through `need`, which is printed and returned as CANN's code 161002.
"""

import atexit
import ctypes
import itertools
import math
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

PARAMETER_INVALID = 161002  # ACLNN_ERR_PARAM_INVALID
DIMS = 12
NZ, ROWS, BLOCK_BYTES = 29, 16, 32  # FRACTAL_NZ and its blocks
DTYPES = {
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    9: torch.int64,
    11: torch.float64,
    12: torch.bool,
    27: torch.bfloat16,
}


KIND_NAMES = {0x5A01: "tensor", 0x5A02: "list", 0x5A03: "scalar"}
TENSOR, LIST, SCALAR = KIND_NAMES


class Refused(Exception):
    """A call that breaks its documented contract."""


class Counters(NamedTuple):
    """What the device did since the process began."""

    launches: int
    h2h: int
    h2d: int
    d2h: int
    d2d: int
    synchronizations: int
    bytes: int


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("shape", ctypes.c_int64 * DIMS),
        ("strides", ctypes.c_int64 * DIMS),
        ("offset", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("data", ctypes.c_void_p),
    )


class _List(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int64), ("count", ctypes.c_int64), ("items", ctypes.c_void_p))


class _Scalar(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("raw", ctypes.c_char * 16),
    )


_opapi = ctypes.CDLL("libopapi.so", mode=ctypes.RTLD_GLOBAL)
_runtime = ctypes.CDLL("libascendcl.so", mode=ctypes.RTLD_GLOBAL)
_runtime.softnpu_option.restype = ctypes.c_char_p
_opapi.softnpu_executor.restype = ctypes.c_void_p
_opapi.softnpu_executor.argtypes = [ctypes.c_int64, ctypes.c_char_p]
_opapi.softnpu_execute.argtypes = [
    *(ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p)
]
_COUNT = ctypes.c_int64.in_dll(_opapi, "softnpu_count").value
_TABLE = (ctypes.c_void_p * _COUNT).in_dll(_opapi, "softnpu_table")
_SLOTS = {
    name.decode(): slot
    for slot, name in enumerate((ctypes.c_char_p * _COUNT).in_dll(_opapi, "softnpu_names"))
}
# what a later CANN can and the documented one cannot; a test may switch one on
CAPABILITIES = {
    "attention_tnd_256": False,
    "state_float32": False,
    # rather an incapability: the chunked delta rule divides exponentials, as its first kernel did
    "chunk_divides": False,
    # fewer ranks than an A2 wants dispatch to each other, so that a test may
    "few_relays": False,
}


def counters() -> Counters:
    return Counters(*(ctypes.c_uint64 * len(Counters._fields)).in_dll(_runtime, "softnpu_counters"))


def option(name: str) -> str:
    """What the device was built as: `soc`, `cann`."""
    return str(_runtime.softnpu_option(name.encode()).decode())


def need(holds: Any, rule: str, value: Any = "") -> None:
    """Refuse the call unless the rule holds; the value is the offending one."""
    if not bool(holds):
        raise Refused(f"{rule}; got {value}")


def need_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    need(tensor.dtype in dtypes, f"{name} must be of {' or '.join(map(str, dtypes))}", tensor.dtype)


def need_shape(name: str, tensor: torch.Tensor, *shape: int) -> None:
    need(tuple(tensor.shape) == shape, f"{name} must be {list(shape)}", list(tensor.shape))


def need_absent(**arguments: Any) -> None:
    """Arguments whose meaning no kernel here has; a tensor without elements is none."""
    for name, value in arguments.items():
        empty = value.numel() == 0 if isinstance(value, torch.Tensor) else not value
        need(empty, f"{name} must be absent", value)


def poison(*tensors: torch.Tensor) -> None:
    """Make what the call does not define look like nothing: NaN, or an integer far out."""
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
        elif tensor.dtype != torch.bool:
            tensor.fill_(torch.iinfo(tensor.dtype).min + 0x25)


def _need_handle(handle: int, kind: int) -> None:
    """A wrong signature shows here, before memory is read that is none of ours."""
    good = handle > 1 << 16 and ctypes.c_int64.from_address(handle).value == kind
    need(good, f"the kernel's signature wants a {KIND_NAMES[kind]}", hex(handle))


def _tensor(handle: int | None) -> torch.Tensor | None:
    if not handle:
        return None
    _need_handle(handle, TENSOR)
    it = _Tensor.from_address(handle)
    if it.dtype not in DTYPES:
        raise Refused(f"no dtype of number {it.dtype} here")
    shape, strides = it.shape[: it.rank], it.strides[: it.rank]
    if it.format == NZ and it.data:
        return _from_blocks(it.data, DTYPES[it.dtype], shape, strides)
    return over(it.data, DTYPES[it.dtype], shape, strides, it.offset)


def _from_blocks(
    data: int, dtype: torch.dtype, shape: list[int], strides: list[int]
) -> torch.Tensor:
    """A copy, rows in order, of matrices stored as FRACTAL_NZ; see formats.cpp."""
    turned = len(shape) > 1 and strides[-2] == 1 and strides[-1] != 1
    *matrices, rows, columns = [*shape[:-2], shape[-1], shape[-2]] if turned else shape
    width = BLOCK_BYTES // dtype.itemsize
    blocks = (-(-columns // width), -(-rows // ROWS), ROWS, width)
    size = math.prod(matrices) * math.prod(blocks)
    stored = over(data, dtype, [size], [1], 0).view(-1, *blocks)
    plain = stored.permute(0, 2, 3, 1, 4).flatten(1, 2).flatten(2, 3)[:, :rows, :columns]
    plain = plain.reshape(*matrices, rows, columns).contiguous()
    plain = plain.mT if turned else plain
    need(strides == list(plain.stride()), "a view into FRACTAL_NZ is no matrix", strides)
    return plain


def over(
    data: int | None, dtype: torch.dtype, shape: list[int], strides: list[int], offset: int
) -> torch.Tensor:
    if 0 in shape or not data:
        return torch.zeros(shape, dtype=dtype)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    raw = (ctypes.c_char * ((last + 1) * dtype.itemsize)).from_address(data)
    return torch.frombuffer(raw, dtype=dtype).as_strided(shape, strides, offset)


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the device memory of an NPU tensor, which it does not keep alive."""
    shape, strides = list(tensor.shape), list(tensor.stride())
    data = tensor.untyped_storage().data_ptr()
    return over(data, tensor.dtype, shape, strides, int(tensor.storage_offset()))


def _scalar(handle: int | None) -> Any:
    if not handle:
        return None
    _need_handle(handle, SCALAR)
    dtype = DTYPES[_Scalar.from_address(handle).dtype]
    raw = ctypes.string_at(handle + _Scalar.raw.offset, dtype.itemsize)
    return torch.frombuffer(bytearray(raw), dtype=dtype)[0].item()


def _list(item: Any) -> Callable[[int | None], list[Any] | None]:
    def read(handle: int | None) -> list[Any] | None:
        if not handle:
            return None
        _need_handle(handle, LIST)
        it = _List.from_address(handle)
        return list((item * it.count).from_address(it.items)) if it.count else []

    return read


def _tensors(handle: int | None) -> list[Any] | None:
    handles = _list(ctypes.c_void_p)(handle)
    return None if handles is None else [_tensor(each) for each in handles]


# a letter of a signature -> the argument in C, and how it reaches the kernel
KINDS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "t": (ctypes.c_void_p, _tensor),
    "L": (ctypes.c_void_p, _tensors),
    "S": (ctypes.c_void_p, _scalar),
    "I": (ctypes.c_void_p, _list(ctypes.c_int64)),
    "F": (ctypes.c_void_p, _list(ctypes.c_float)),
    "B": (ctypes.c_void_p, _list(ctypes.c_bool)),
    "i": (ctypes.c_int64, int),
    "j": (ctypes.c_int32, int),
    "c": (ctypes.c_int8, int),
    "b": (ctypes.c_bool, bool),
    "f": (ctypes.c_float, float),
    "d": (ctypes.c_double, float),
    "s": (ctypes.c_char_p, lambda raw: raw.decode() if raw else ""),
}
_planned: dict[int, tuple[str, Callable[..., Any], list[Any]]] = {}
_numbers = itertools.count(1)
_alive: list[Any] = []  # what C holds a pointer to


def kernel(
    name: str, signature: str, check: Callable[..., None] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function the kernel of an aclnn call whose arguments are of these KINDS."""
    if name not in _SLOTS:
        return lambda function: function  # a call that this wheel does not know

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        types = [KINDS[letter][0] for letter in signature]

        def plan(*arguments: Any) -> int:
            *given, workspace, executor = arguments
            try:
                need(
                    min(workspace or 0, executor or 0) > 1 << 16, "too short a signature", signature
                )
                pairs = zip(signature, given, strict=True)
                values = [KINDS[letter][1](value) for letter, value in pairs]
                if check is not None:
                    check(*values)
            except Exception as error:
                return _report(name, error)
            number = next(_numbers)
            _planned[number] = (name, function, values)
            ctypes.c_uint64.from_address(workspace).value = 0
            made = _opapi.softnpu_executor(number, name.encode())
            ctypes.c_void_p.from_address(executor).value = made
            return 0

        pointer = ctypes.CFUNCTYPE(ctypes.c_int, *types, ctypes.c_void_p, ctypes.c_void_p)(plan)
        _alive.append(pointer)
        _TABLE[_SLOTS[name]] = ctypes.cast(pointer, ctypes.c_void_p).value
        return function

    return register


def issue(name: str, stream: int, function: Callable[..., Any], *values: Any) -> None:
    """Make a call that is none of aclnn's one task of a stream; RuntimeError when it fails."""
    number = next(_numbers)
    _planned[number] = (name, function, list(values))
    code = _opapi.softnpu_execute(None, 0, _opapi.softnpu_executor(number, name.encode()), stream)
    if code:
        raise RuntimeError(f"call {name} failed, error code is {code}: see the lines of softnpu")


def kernels() -> list[str]:
    """The aclnn calls that have a kernel."""
    missing = _TABLE[_SLOTS["aclnnLSTM"]]  # nobody writes that one
    return [name for name, slot in _SLOTS.items() if _TABLE[slot] != missing]


def _report(name: str, error: Exception) -> int:
    if isinstance(error, Refused):
        print(f"softnpu: {name} refused: {error}", file=sys.stderr, flush=True)
    else:
        print(f"softnpu: {name} failed in its kernel", file=sys.stderr)
        traceback.print_exception(error)
    return PARAMETER_INVALID


def _run(number: int) -> int:
    name, function, values = _planned[number]
    try:
        with torch.no_grad():
            function(*values)
    except Exception as error:
        return _report(name, error)
    return 0


def _drop(number: int) -> None:
    _planned.pop(number, None)


def _connect(symbol: str, function: Any) -> None:
    _alive.append(function)
    slot = ctypes.c_void_p.in_dll(_opapi, symbol)
    slot.value = ctypes.cast(function, ctypes.c_void_p).value if function else None


_connect("softnpu_run", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64)(_run))
_connect("softnpu_drop", ctypes.CFUNCTYPE(None, ctypes.c_int64)(_drop))
# graphs may outlive the interpreter
atexit.register(_connect, "softnpu_drop", None)
atexit.register(_connect, "softnpu_run", None)
