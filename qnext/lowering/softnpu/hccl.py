"""HCCL between processes that each have a software Ascend: communicators, and the collectives.

A collective is one task of its stream, as on a chip, and what it moves goes through gloo on the
host. All of them are made of one exchange, every rank's bytes to every rank, which is more than
must move. Sums are made in float32 in the order of ranks, and rounded once.
"""

import ctypes
import tempfile
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from qnext.lowering.softnpu.bridge import Refused, issue, need, over

DTYPES = {
    0: torch.int8,
    2: torch.int32,
    3: torch.float16,
    4: torch.float32,
    5: torch.int64,
    7: torch.uint8,
    10: torch.float64,
    11: torch.bfloat16,
}
SUM, MAX, MIN = 0, 2, 3
ROOT_BYTES, NAME_BYTES = 4108, 128
FAILED = 4  # HCCL_E_INTERNAL
PATIENCE = timedelta(seconds=60)


class Communicator:
    """One group of ranks: who is in it, and a way between them."""

    def __init__(self, name: str, ranks: int, rank: int) -> None:
        self.name, self.ranks, self.rank = name, ranks, rank
        store = dist.FileStore(str(Path(tempfile.gettempdir()) / f"softhccl-{name}"), ranks)
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, ranks, PATIENCE)

    def every(self, mine: Tensor) -> list[Tensor]:
        """This rank's numbers and all others', in the order of ranks."""
        bytes_ = mine.contiguous().view(-1).view(torch.uint8)
        parts = [torch.empty_like(bytes_) for _ in range(self.ranks)]
        self._gloo.allgather([parts], [bytes_]).wait()
        return [part.view(mine.dtype).view(mine.shape) for part in parts]


COMMUNICATORS: dict[str, Communicator] = {}
_handles: dict[int, Communicator] = {}


def root(info: int) -> None:
    """A name for a new group, which its first rank tells the others."""
    ctypes.memset(info, 0, ROOT_BYTES)
    ctypes.memmove(info, uuid.uuid4().hex.encode(), 32)


def join(ranks: int, info: int, rank: int, made: int) -> None:
    name = ctypes.string_at(info).decode()
    group = COMMUNICATORS.setdefault(name, Communicator(name, ranks, rank))
    handle = len(_handles) + 1
    _handles[handle] = group
    ctypes.c_void_p.from_address(made).value = handle


def leave(group: int) -> None:
    COMMUNICATORS.pop(_handles.pop(group).name, None)


def name(group: int, into: int) -> None:
    word = _handles[group].name.encode()
    need(len(word) < NAME_BYTES, f"a name of fewer than {NAME_BYTES} bytes", word)
    ctypes.memmove(into, word + b"\0", len(word) + 1)


def _numbers(data: int, count: int, kind: int) -> Tensor:
    need(kind in DTYPES, "a dtype that is known here", kind)
    return over(data, DTYPES[kind], [count], [1], 0)


def _reduced(parts: list[Tensor], how: int) -> Tensor:
    need(how in (SUM, MAX, MIN), "a sum, a maximum or a minimum", how)
    wide = torch.stack([part.float() if part.is_floating_point() else part for part in parts])
    made = wide.sum(0) if how == SUM else wide.amax(0) if how == MAX else wide.amin(0)
    return made.to(parts[0].dtype)


def all_reduce(
    source: int, into: int, count: int, kind: int, how: int, group: int, stream: int
) -> None:
    def task() -> None:
        parts = _handles[group].every(_numbers(source, count, kind))
        _numbers(into, count, kind).copy_(_reduced(parts, how))

    issue("HcclAllReduce", stream, task)


def all_gather(source: int, into: int, count: int, kind: int, group: int, stream: int) -> None:
    def task() -> None:
        parts = _handles[group].every(_numbers(source, count, kind))
        _numbers(into, count * len(parts), kind).copy_(torch.cat(parts))

    issue("HcclAllGather", stream, task)


def reduce_scatter(
    source: int, into: int, count: int, kind: int, how: int, group: int, stream: int
) -> None:
    def task() -> None:
        to = _handles[group]
        parts = to.every(_numbers(source, count * to.ranks, kind))
        mine = [part[to.rank * count :][:count] for part in parts]
        _numbers(into, count, kind).copy_(_reduced(mine, how))

    issue("HcclReduceScatter", stream, task)


def broadcast(data: int, count: int, kind: int, first: int, group: int, stream: int) -> None:
    def task() -> None:
        mine = _numbers(data, count, kind)
        mine.copy_(_handles[group].every(mine)[first])

    issue("HcclBroadcast", stream, task)


def all_to_all(
    source: int, sent: int, kind: int, into: int, came: int, as_: int, group: int, stream: int
) -> None:
    need(sent == came and kind == as_, "as much to each rank as comes from it", (sent, came))

    def task() -> None:
        to = _handles[group]
        parts = to.every(_numbers(source, sent * to.ranks, kind))
        mine = [part[to.rank * sent :][:sent] for part in parts]
        _numbers(into, sent * to.ranks, kind).copy_(torch.cat(mine))

    issue("HcclAlltoAll", stream, task)


def scatter(
    source: int, into: int, count: int, kind: int, first: int, group: int, stream: int
) -> None:
    def task() -> None:
        to = _handles[group]
        whole = torch.zeros(count * to.ranks, dtype=DTYPES[kind])
        if to.rank == first:
            whole = _numbers(source, count * to.ranks, kind)
        _numbers(into, count, kind).copy_(to.every(whole)[first][to.rank * count :][:count])

    issue("HcclScatter", stream, task)


P, N, I = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int
SLOTS: tuple[tuple[Callable[..., None], tuple[Any, ...]], ...] = (
    (root, (P,)),
    (join, (ctypes.c_uint32, P, ctypes.c_uint32, P)),
    (leave, (P,)),
    (name, (P, P)),
    (all_reduce, (P, P, N, I, I, P, P)),
    (all_gather, (P, P, N, I, P, P)),
    (reduce_scatter, (P, P, N, I, I, P, P)),
    (broadcast, (P, N, I, ctypes.c_uint32, P, P)),
    (all_to_all, (P, N, I, P, N, I, P, P)),
    (scatter, (P, P, N, I, ctypes.c_uint32, P, P)),
)
_alive: list[Any] = []  # what C holds a pointer to


def _told(function: Callable[..., None]) -> Callable[..., int]:
    def call(*arguments: Any) -> int:
        try:
            function(*arguments)
        except (Refused, RuntimeError, KeyError) as error:
            print(f"softnpu: Hccl {function.__name__} failed: {error}", flush=True)
            return FAILED
        return 0

    return call


def _connect() -> None:
    library = ctypes.CDLL("libhccl.so", mode=ctypes.RTLD_GLOBAL)
    slots = (ctypes.c_void_p * len(SLOTS)).in_dll(library, "softnpu_hccl")
    for at, (function, types) in enumerate(SLOTS):
        pointer = ctypes.CFUNCTYPE(ctypes.c_int, *types)(_told(function))
        _alive.append(pointer)
        slots[at] = ctypes.cast(pointer, ctypes.c_void_p).value


_connect()
