"""The compiled kernels as Python sees them: the C structures, and lists of calls to run."""

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
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
CALL = 4  # addresses in the kernels' `struct Call`: kernel, tensors, numbers, fault
OPENMP = ("libgomp*.so*", "libomp*.so*", "libomp*.dylib")
ADDRESS = "Q"  # an array's type
Library: TypeAlias = ctypes.CDLL
if TYPE_CHECKING:
    Integers: TypeAlias = array[int]
    Numbers: TypeAlias = array[float]
else:
    Integers = Numbers = array  # takes no type before Python 3.12
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


class Code(NamedTuple):
    """Instructions in the kernels' own form, but for what depends on where things lie."""

    kernels: tuple[str, ...]
    begins: tuple[tuple[int, int], ...]  # of each instruction, among tensors and among numbers
    tensors: bytes  # structures that point to nothing
    memory: Integers  # of each tensor
    offset: Integers
    numbers: Numbers


def encode(instructions: Sequence[Instruction]) -> Code:
    """Instructions as the kernels will see them."""
    operands = [operand for each in instructions for operand in each.operands]
    counts = [(len(each.operands), len(each.numbers)) for each in instructions]
    tensors, numbers = (accumulate(c, initial=0) for c in zip(*counts, strict=True))
    return Code(
        kernels=tuple(each.kernel for each in instructions),
        begins=tuple(zip(tensors, numbers, strict=True))[:-1],
        tensors=bytes((_Tensor * len(operands))(*map(_tensor, operands))),
        memory=Integers("q", (operand.memory for operand in operands)),
        offset=Integers("q", (operand.offset for operand in operands)),
        numbers=Numbers("d", (number for each in instructions for number in each.numbers)),
    )


def _tensor(operand: Operand) -> _Tensor:
    # a number is a row of one
    size, stride = (operand.size, operand.stride) if operand.size else ((1,), (1,))
    return _Tensor(None, KINDS[operand.dtype], len(size), _Axes(*size), _Axes(*stride))


class Program:
    """Code that is run by one call into the library."""

    def __init__(self, code: Code, library: Library) -> None:
        self._library, self._code, self._fault = library, code, ctypes.c_ssize_t(0)
        self._tensors = (_Tensor * len(code.memory)).from_buffer_copy(code.tensors)
        tensors, numbers = ctypes.addressof(self._tensors), code.numbers.buffer_info()[0]
        known = {name: library.qnext_kernel(name.encode()) for name in set(code.kernels)}
        assert all(known.values()), f"the library lacks a kernel: {known}"
        self._calls = Integers(ADDRESS)  # CALL each
        for kernel, (tensor, number) in zip(code.kernels, code.begins, strict=True):
            first = tensors + tensor * ctypes.sizeof(_Tensor)
            rest = (numbers + number * code.numbers.itemsize, ctypes.addressof(self._fault))
            self._calls.extend((known[kernel], first, *rest))
        self._lock = Lock()  # addresses are written into the tensors: one run at a time

    def run(self, memory: Integers, threads: int) -> None:
        """Run on pieces of memory, given by the addresses of their first elements.

        Raises InputError where an index (a token's id) points to nothing; what would have followed
        is not computed.
        """
        code, calls = self._code, self._calls.buffer_info()[0]
        with self._lock:
            self._fault.value = 0
            self._library.qnext_run(
                *(calls, len(code.kernels), self._tensors, len(self._tensors)),
                *(code.memory.buffer_info()[0], code.offset.buffer_info()[0]),
                *(memory.buffer_info()[0], threads),
            )
            fault = self._fault.value
        if fault:
            number = (fault - calls) // (CALL * self._calls.itemsize)
            table = self._tensors[code.begins[number][0]]
            raise InputError(
                f"an index is out of range: call {number} of the program, {code.kernels[number]!r},"
                f" looks it up in a tensor of shape {list(table.size[: table.dims])}. A token's id "
                "must be within the vocabulary"
            )


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
