"""The compiled kernels as Python sees them: the C structures, and lists of calls to run."""

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from qnext.errors import InputError, TargetError
from qnext.lowering.cpu import build

MAX_DIMS = 5
KINDS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.int8: 2,
    torch.uint8: 2,  # a workspace, whose bytes are the kernel's own affair
    torch.int32: 3,
    torch.int64: 4,
    torch.bool: 5,
}
FLOATS = (torch.float32, torch.bfloat16)
OPENMP = ("libgomp*.so*", "libomp*.so*", "libomp*.dylib")
ADDRESS = "Q"  # an array's type
Library: TypeAlias = ctypes.CDLL
if TYPE_CHECKING:
    Addresses: TypeAlias = array[int]
else:
    Addresses = array  # takes no type before Python 3.12
_Axes = ctypes.c_int64 * MAX_DIMS


def short(dtype: torch.dtype) -> str:
    """A dtype's name, as kernels' types have it: `int64`."""
    return str(dtype).removeprefix("torch.")


def is_readable(made: object) -> bool:
    """Whether something is a tensor that kernels can be given."""
    return isinstance(made, Tensor) and made.dtype in KINDS and made.ndim <= MAX_DIMS


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("kind", ctypes.c_int64),
        ("dims", ctypes.c_int64),
        ("size", _Axes),
        ("stride", _Axes),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("tensors", ctypes.c_void_p),
        ("numbers", ctypes.POINTER(ctypes.c_double)),
        ("fault", ctypes.POINTER(ctypes.c_ssize_t)),
    )


class Operand(NamedTuple):
    """A tensor of a call: so many bytes into one of the pieces of memory that a list is run on."""

    memory: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]  # in elements
    dtype: torch.dtype


class Instruction(NamedTuple):
    """A kernel, its tensors (arguments, results, workspace) and its numbers."""

    kernel: str
    operands: tuple[Operand, ...]
    numbers: tuple[float, ...]


class Program:
    """Instructions in the kernels' own form, run by one call into the library."""

    def __init__(self, instructions: Sequence[Instruction], library: Library) -> None:
        self._library = library
        operands = [operand for each in instructions for operand in each.operands]
        self._tensors = (_Tensor * len(operands))(*map(_tensor, operands))
        self._memory = (ctypes.c_int64 * len(operands))(*(o.memory for o in operands))
        self._offset = (ctypes.c_int64 * len(operands))(*(o.offset for o in operands))
        self._calls = (_Call * len(instructions))()
        self._numbers = []  # the calls point to them
        self._instructions, self._fault = instructions, ctypes.c_ssize_t(0)
        at = ctypes.addressof(self._tensors)
        for call, each in zip(self._calls, instructions, strict=True):
            self._numbers.append((ctypes.c_double * len(each.numbers))(*each.numbers))
            call.kernel = self._library.qnext_kernel(each.kernel.encode())
            call.tensors, call.numbers = at, self._numbers[-1]
            call.fault = ctypes.pointer(self._fault)
            at += len(each.operands) * ctypes.sizeof(_Tensor)
            assert call.kernel, f"the library has no kernel {each.kernel}"
        self._lock = Lock()  # addresses are written into the tensors: one run at a time

    def run(self, memory: Addresses, threads: int) -> None:
        """Run on pieces of memory, given by the addresses of their first elements.

        Raises InputError where an index (a token's id) points to nothing; what would have followed
        is not computed.
        """
        with self._lock:
            self._fault.value = 0
            self._library.qnext_run(
                *(self._calls, len(self._calls), self._tensors, len(self._tensors)),
                *(self._memory, self._offset, memory.buffer_info()[0], threads),
            )
            fault = self._fault.value
        if fault:
            number = (fault - ctypes.addressof(self._calls)) // ctypes.sizeof(_Call)
            raise InputError(_out_of_range(number, self._instructions[number]))


def _out_of_range(number: int, call: Instruction) -> str:
    size = list(call.operands[0].size)
    return (
        f"an index is out of range: call {number} of the program, {call.kernel!r}, looks it up in "
        f"a tensor of shape {size}. A token's id must be within the vocabulary"
    )


def _tensor(operand: Operand) -> _Tensor:
    # a number is a row of one
    size, stride = (operand.size, operand.stride) if operand.size else ((1,), (1,))
    return _Tensor(None, KINDS[operand.dtype], len(size), _Axes(*size), _Axes(*stride))


@cache  # asking the compiler what the machine can do takes as long as a step
def load(isa: str) -> Library:
    """The library for some instructions, compiled if need be; TargetError if that cannot be."""
    path = build.library(isa)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise TargetError(f"the compiled kernels cannot be loaded: {error}") from None
    library.qnext_kernel.restype, library.qnext_kernel.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.qnext_run.restype = None
    library.qnext_run.argtypes = [
        *(pointer, integer, pointer, integer),
        *(pointer, pointer, pointer, integer),
    ]
    if runtime := _openmp():
        threads = ctypes.CDLL(str(runtime))
        library.qnext_use(threads.GOMP_parallel)
    return library


def _openmp() -> Path | None:
    """The OpenMP runtime that torch brings along: another would be another pool of threads.

    Without it kernels run on one thread.
    """
    home = Path(torch.__file__).parent
    places = (home / "lib", home.parent / "torch.libs", home / ".dylibs")
    found = [file for place in places for name in OPENMP for file in place.glob(name)]
    return found[0] if found else None
