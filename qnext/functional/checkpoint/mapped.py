"""Leaves that are pages of the checkpoint's files: nothing is copied, and pages are shared.

A leaf's rows may lie in the files in many runs (a tensor an expert, query and gate by head). Where
all of them begin at the same place of a page as they do in the leaf, the system shows those pages
one after the other in memory, copy on write; only the ends of runs within a page are read.
"""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.errors import CheckpointError
from qnext.functional.checkpoint.shards import DTYPES, Stored
from qnext.functional.layout import Piece

PAGE = mmap.PAGESIZE
SMALLEST_LEAF = 1 << 20  # bytes; below, reading costs less than a mapping
SMALLEST_RUN = 64 << 10  # bytes, the mean of a leaf: a mapping each is worth it
MOST_RUNS = 1 << 15  # of a checkpoint: Linux allows a process 65,530 mappings
MAP_FIXED = 0x10  # mmap(2): over what the region had there
POPULATE_READ = 22  # madvise(2): bring the pages in now; since Linux 5.14
UNREADABLE = (errno.EFAULT, errno.EIO)  # else the system only does not know the advice


class Run(NamedTuple):
    """Bytes of a file that are, in this order, bytes of a leaf."""

    file: Path
    begin: int  # in the file
    at: int  # in the leaf
    nbytes: int


def mappable(
    leaves: Iterable[tuple[str, Tensor, tuple[Piece, ...]]], stored: Mapping[str, Stored]
) -> dict[str, list[Run]]:
    """The runs of the leaves (path, spec, pieces) that can be mapped; others must be read."""
    found, left = dict[str, list[Run]](), MOST_RUNS if sys.platform == "linux" else 0
    for path, spec, pieces in leaves:
        as_stored = all(DTYPES.get(stored[piece.name].dtype) == spec.dtype for piece in pieces)
        if spec.nbytes < SMALLEST_LEAF or not as_stored:
            continue
        runs = _joined(sorted(_runs(spec, pieces, stored), key=lambda run: run.at))
        shifts = {_shift(run) for run in runs}
        # a number must begin at a multiple of its size, which the format does not demand
        aligned = len(shifts) == 1 and not shifts.pop() % spec.itemsize
        if aligned and len(runs) <= min(spec.nbytes // SMALLEST_RUN, left):
            found[path], left = runs, left - len(runs)
    return found


class _Shown(NamedTuple):
    """Pages of a file at an address."""

    file: FileIO
    begin: int
    address: int
    nbytes: int


class Pages:
    """Maps leaves, and then brings all their pages in, in the order in which they lie in files.

    That order is what disks and the system's reading ahead are made for; leaf by leaf took a
    quarter longer. Files stay open until then.
    """

    def __init__(self) -> None:
        self._files: dict[Path, FileIO] = {}
        self._shown: list[_Shown] = []
        self._ends: list[_Shown] = []  # of runs, within pages that others share
        self._left = 0  # bytes that come when they are asked for

    def __enter__(self) -> "Pages":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def leaf(self, spec: Tensor, runs: list[Run], by_rows: bool = False) -> Tensor:
        """A tensor like `spec` whose memory is these runs of files; writing to it changes no file.

        With `by_rows` pages come one by one, when a row of theirs is asked for, and those that
        nobody asks for never do. Raises CheckpointError where a file is shorter than its header
        says.
        """
        shift = _shift(runs[0])
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        # goes as a whole, with its tensor
        region = mmap.mmap(-1, shift + spec.nbytes, flags=private)
        leaf = torch.frombuffer(region, dtype=spec.dtype, count=spec.numel(), offset=shift)
        pages = [shown for run in runs if (shown := self._show(run, leaf.data_ptr() + run.at))]
        if by_rows:
            self._left += sum(shown.nbytes for shown in pages)
        else:
            self._shown += pages
        return leaf.view(spec.shape)

    def _show(self, run: Run, address: int) -> _Shown | None:
        """Put the whole pages of a run, if it has any, at their address, and note the rest."""
        file = self._file(run)
        end = address + run.nbytes
        first, last = -(-address // PAGE) * PAGE, end // PAGE * PAGE
        if first >= last:
            self._ends.append(_Shown(file, run.begin, address, run.nbytes))
            return None
        pages = _Shown(file, run.begin + first - address, first, last - first)
        access, how = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_FIXED
        if _libc().mmap(first, pages.nbytes, access, how, file.fileno(), pages.begin) != first:
            raise CheckpointError(f"{run.file} cannot be mapped: {os.strerror(ctypes.get_errno())}")
        self._ends.append(_Shown(file, run.begin, address, first - address))
        self._ends.append(_Shown(file, pages.begin + pages.nbytes, last, end - last))
        return pages

    def _file(self, run: Run) -> FileIO:
        if run.file not in self._files:
            self._files[run.file] = run.file.open("rb", buffering=0)
        file = self._files[run.file]
        if os.fstat(file.fileno()).st_size < run.begin + run.nbytes:
            raise _shorter(run.file)
        return file

    def bring_in(self, told: Callable[[int], object]) -> None:
        """Read all pages but those of rows: later an error would be a signal.

        `told` is given the bytes that are there. Raises CheckpointError for an unreadable or
        shorter file.
        """
        told(self._left)
        order = {file: number for number, file in enumerate(self._files.values())}
        bring = _libc(ctypes.CDLL).madvise
        for file, _, address, nbytes in sorted(self._shown, key=lambda s: (order[s.file], s.begin)):
            if bring(address, nbytes, POPULATE_READ) and ctypes.get_errno() in UNREADABLE:
                raise _unreadable(file)
            told(nbytes)
        for file, begin, address, nbytes in self._ends:
            count = _libc().pread(file.fileno(), address, nbytes, begin)
            if count != nbytes:
                raise _unreadable(file) if count < 0 else _shorter(file.name)
            told(nbytes)


def _runs(spec: Tensor, pieces: tuple[Piece, ...], stored: Mapping[str, Stored]) -> Iterator[Run]:
    for piece in pieces:
        have, count = stored[piece.name], piece.shape[0]
        row = have.nbytes // count
        start = 0 if piece.expert is None else piece.expert * spec.shape[1]
        for part in piece.rows:
            for group in range(part.groups):
                source = group * (count // part.groups) + part.offset
                target = start + part.start + group * part.size
                yield Run(have.file, have.begin + source * row, target * row, part.size * row)


def _joined(runs: list[Run]) -> list[Run]:
    """The same bytes in as few runs as possible."""
    joined = runs[:1]
    for run in runs[1:]:
        last = joined[-1]
        follows = run.begin - last.begin == run.at - last.at == last.nbytes
        if follows and run.file == last.file:
            joined[-1] = last._replace(nbytes=last.nbytes + run.nbytes)
        else:
            joined.append(run)
    return joined


@cache
def _libc(kind: type[ctypes.CDLL] = ctypes.PyDLL) -> ctypes.CDLL:
    """The calls that Python lacks: a mapping at an address, advice on it, reading to an address.

    They hold the interpreter, but for those of a `CDLL`: after each of many short calls a thread
    would wait for the others that read.
    """
    libc = kind(None, use_errno=True)
    libc.mmap.restype, libc.pread.restype = ctypes.c_void_p, ctypes.c_ssize_t
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_int64]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
    return libc


def _shift(run: Run) -> int:
    """How far after the beginning of a page a leaf begins, for this run to lie in pages."""
    return (run.begin - run.at) % PAGE


def _unreadable(file: FileIO) -> CheckpointError:
    why = "an error of its disk, or it became shorter meanwhile"
    return CheckpointError(f"{file.name} cannot be read: {why}")


def _shorter(name: object) -> CheckpointError:
    return CheckpointError(f"{name} ends within a tensor: it became shorter meanwhile")
