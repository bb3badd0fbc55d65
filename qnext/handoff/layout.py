"""A sequence's value as bytes: what lies where, the same for who sends it and who gets it.

One region of a pool holds one value: its tensors one after the other, as `Kept` counts them. Keys
and values of page i of a tensor are its i-th part, so that pages can go ahead of the states.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from qnext.functional.state import KV, Delta, Mtp, State
from qnext.functional.tree import leaves_with_paths, rebuild
from qnext.runtime.kept import Kept

BLOCK = 256 << 10  # bytes that a core keeps close
ALIGNMENT = 64  # bytes: a cache line, and more than any dtype
PAGED = ("key", "value")  # tensors of which a page of tokens has a part


class Entry(NamedTuple):
    """A tensor of a value: its path, `layers[3].key`, and its bytes from the region's beginning."""

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.begin + self.nbytes

    @property
    def is_paged(self) -> bool:
        return self.path.rpartition(".")[2] in PAGED

    def part(self, first: int, count: int) -> tuple[int, int]:
        """(where some of its pages begin, their bytes); of others than keys and values all."""
        if not self.is_paged:
            return self.begin, self.nbytes
        each = self.nbytes // self.shape[0]
        return self.begin + first * each, count * each


class Layout(NamedTuple):
    """Where all tensors of a value lie."""

    specs: Kept  # on "meta"
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        return aligned(self.entries[-1].end) if self.entries else 0

    def only(self, paths: Collection[str]) -> "Layout":
        """The same places without the module's part, unless its paths are among these."""
        entries = tuple(entry for entry in self.entries if entry.path in paths)
        whole = len(entries) == len(self.entries)
        return Layout(self.specs if whole else self.specs._replace(mtp=()), entries)


def layout_of(state: State, pages: int) -> Layout:
    """The layout of values with so many pages, of a row of this state."""
    return laid_out(_taken(state, pages))


def laid_out(specs: Kept) -> Layout:
    """The layout of values like these specs."""
    entries, begin = list[Entry](), 0
    for path, leaf in leaves_with_paths(specs):
        entries.append(Entry(path.removeprefix("."), tuple(leaf.shape), leaf.dtype, begin))
        begin = aligned(entries[-1].end)
    return Layout(specs, tuple(entries))


def _taken(state: State, pages: int) -> Kept:
    """What `take` yields of a row with so many pages, as specs."""
    more = state.slots.shape[1] - 1  # inputs that windows have room for beside those that matter

    def like(pool: Tensor, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=pool.dtype, device="meta")

    def pool_pages(pool: Tensor) -> Tensor:
        return like(pool, pages, *pool.shape[1:])

    def layer(pool: KV | Delta) -> KV | Delta:
        if isinstance(pool, KV):
            return KV(pool_pages(pool.key), pool_pages(pool.value))
        return Delta(
            like(pool.recurrent, 1, *pool.recurrent.shape[1:]),
            like(pool.window, 1, pool.window.shape[1] - more, pool.window.shape[2]),
        )

    def module(pool: Mtp) -> Mtp:
        hidden = like(pool.hidden, 1, 1, pool.hidden.shape[2])
        return Mtp(pool_pages(pool.key), pool_pages(pool.value), hidden)

    follows = state.mtp if more else ()
    return Kept(tuple(map(layer, state.layers)), tuple(map(module, follows)))


def places(layout: Layout, region: Tensor, first: int = 0, count: int | None = None) -> Kept:
    """A value whose tensors are a region's own bytes.

    Of its pages so many from the `first` on (default: all).
    """

    def tensor(entry: Entry) -> Tensor:
        shape, begin, end = entry.shape, entry.begin, entry.end
        if entry.is_paged and count is not None:
            begin, nbytes = entry.part(first, count)
            shape, end = (count, *shape[1:]), begin + nbytes
        return region[begin:end].view(entry.dtype).view(shape)

    kept: Kept = rebuild(layout.specs, list(map(tensor, layout.entries)))
    return kept


def checksums(entries: Iterable[Entry], region: Tensor) -> dict[str, int]:
    """Checksums of the bytes of tensors in a region, by path."""
    return {entry.path: checksum(region[entry.begin : entry.end]) for entry in entries}


def checksum(data: Tensor) -> int:
    """XXH3 of bytes, 64 bits: a fifth of the time of a CRC-32 (measured: 34 and 7 GB/s)."""
    return xxhash.xxh3_64_intdigest(data.cpu().numpy().data)


def copy_summed(into: Tensor, source: Tensor) -> int:
    """Copy bytes [n]; the checksum of the copy, reckoned while its blocks are in the cache."""
    if not into.device.type == "cpu" == source.device.type:
        into.copy_(source)
        return checksum(into)
    state, to, found = xxhash.xxh3_64(), into.numpy(), source.numpy()
    for at in range(0, into.numel(), BLOCK):
        np.copyto(to[at : at + BLOCK], found[at : at + BLOCK])
        state.update(to[at : at + BLOCK].data)
    return state.intdigest()


def together(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges (begin, bytes), those that follow one another as one, with the gap of alignment."""
    joined = list[tuple[int, int]]()
    for begin, nbytes in sorted(ranges):
        if joined and begin - sum(joined[-1]) < ALIGNMENT:
            joined[-1] = joined[-1][0], begin + nbytes - joined[-1][0]
        else:
            joined.append((begin, nbytes))
    return joined


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
