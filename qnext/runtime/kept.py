"""One sequence's state taken out of the pools, as a value: to be cached, swapped, saved or sent.

What it holds does not depend on where it lay: slots, rows and offsets are gone, windows have the
`width - 1` inputs that matter. So it can be put back into other pools, of other sizes and with room
for another number of drafts.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qnext.functional.config import PAGE, Config
from qnext.functional.state import KV, Delta, Mtp, State, init_state, pages_of
from qnext.functional.tree import leaves, rebuild


class Kept(NamedTuple):
    """Keys and values [count, 128, hkv, hd] of some pages, and what comes one to a sequence.

    Recurrent states are [1, hv, dv, dk], windows [1, width - 1, conv], hidden states [1, 1, d];
    of a model that drafts nothing `mtp` is empty.
    """

    layers: tuple[KV | Delta, ...]
    mtp: tuple[Mtp, ...]

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in leaves(self))


def take(state: State, row: int, pages: Sequence[int]) -> Kept:
    """A copy of what one row of a state needs to go on, with the keys and values of these pages."""
    index = torch.tensor(pages, dtype=torch.long, device=state.lengths.device)
    seen = _seen(state, row)
    copies = [pool[index] if is_paged else pool.clone() for pool, is_paged in _parts(seen)]
    kept: Kept = rebuild(seen, copies)
    return kept


def take_into(
    into: Kept, state: State, row: int, pages: Sequence[int], states: bool = True
) -> Kept:
    """What `take` does, into tensors that are there; returns these. Others of the row's pages than
    they have room for are left out. Without `states` keys and values are all that is copied.
    """
    for (pool, is_paged), target in zip(_parts(_seen(state, row)), leaves(into), strict=True):
        if is_paged:
            for place, page in zip(target, pages, strict=False):
                copy_alone(place, pool[page])
        elif states:
            copy_alone(target, pool)
    return into


def copy_alone(into: Tensor, source: Tensor) -> None:
    """Copy a tensor, in this thread alone where both lie in the host's memory.

    torch would share it out among its threads, which wait for each other, and steps are using
    these (measured: 8 ms a tensor, not 0.1, on two cores that something else keeps busy).
    """
    if into.device.type == "cpu" == source.device.type:
        np.copyto(into.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
    else:
        into.copy_(source)


def _seen(state: State, row: int) -> Kept:
    """A row's value where it lies, in the pools themselves; of keys and values all pages."""
    slot, place = int(state.slots[row, 0]), int(state.rows[row])
    begin = int(state.accepted[row])
    more = state.slots.shape[1] - 1

    def layer(pool: KV | Delta) -> KV | Delta:
        if isinstance(pool, KV):
            return pool
        window = pool.window[place][begin : pool.window.shape[1] - more + begin]
        return Delta(pool.recurrent[slot][None], window[None])

    def module(pool: Mtp) -> Mtp:
        return pool._replace(hidden=pool.hidden[place, begin][None, None])

    follows = state.mtp if more else ()
    return Kept(tuple(map(layer, state.layers)), tuple(map(module, follows)))


def _parts(kept: Kept) -> Iterator[tuple[Tensor, bool]]:
    """A value's leaves in their order, and whether they have a part for each page of tokens."""
    for layer in kept.layers:
        yield from ((leaf, isinstance(layer, KV)) for leaf in layer)
    for module in kept.mtp:
        yield from ((module.key, True), (module.value, True), (module.hidden, False))


def completed(state: State, pages: Sequence[int], kept: Kept) -> Kept:
    """A value that has the keys and values of these pages of the pools before its own."""
    return after(of_pages(state, pages), kept)


def of_pages(state: State, pages: Sequence[int]) -> Kept:
    """The keys and values of these pages of the pools, of no sequence's state."""
    index = torch.tensor(pages, dtype=torch.long, device=state.lengths.device)
    whole = Kept(state.layers, state.mtp if state.slots.shape[1] > 1 else ())
    made = [pool[index] if is_paged else pool[:0] for pool, is_paged in _parts(whole)]
    kept: Kept = rebuild(whole, made)
    return kept


def after(before: Kept, kept: Kept) -> Kept:
    """A value whose pages come after others."""
    if not kept.mtp:
        before = before._replace(mtp=())
    pairs = zip(_parts(before), leaves(kept), strict=True)
    made = [torch.cat([first, own]) if is_paged else own for (first, is_paged), own in pairs]
    joined: Kept = rebuild(kept, made)
    return joined


def count_of_pages(kept: Kept) -> int:
    """How many pages a value has; 0 for one of a model without attention."""
    return next((leaf.shape[0] for leaf, is_paged in _parts(kept) if is_paged), 0)


def put(state: State, row: int, pages: Sequence[int], kept: Kept | None) -> None:
    """Write a value into the pools, in place, for a row whose tables begin anew there.

    The row's window must begin at offset 0. None is a sequence that has consumed nothing. A value
    without an MTP module's part leaves the module nothing to go on from, which costs guesses only.
    """
    index = torch.tensor(pages, dtype=torch.long, device=state.lengths.device)
    slot, place = state.slots[row, 0].long(), state.rows[row].long()
    for at, pool in enumerate(state.layers):
        if isinstance(pool, KV):
            if kept is not None and pages:
                _fill(pool, index, kept.layers[at])
            continue
        if kept is None:
            pool.window[place] = 0
            pool.recurrent[slot] = 0
            continue
        value = kept.layers[at]
        assert isinstance(value, Delta)
        pool.recurrent[slot] = value.recurrent[0]
        pool.window[place, : value.window.shape[1]] = value.window[0]
        pool.window[place, value.window.shape[1] :] = 0
    for at, module in enumerate(state.mtp):
        module.hidden[place] = 0
        if kept is not None and kept.mtp:
            if pages:
                _fill(module, index, kept.mtp[at])
            module.hidden[place, :1] = kept.mtp[at].hidden[0]


def _fill(pool: KV | Mtp, index: Tensor, value: KV | Delta | Mtp) -> None:
    assert isinstance(value, KV | Mtp)
    pool.key[index] = value.key.to(pool.key)
    pool.value[index] = value.value.to(pool.value)


def wipe(state: State, row: int, pages: Sequence[int]) -> None:
    """Zero what a row leaves behind, in place: its slots, its window, and these pages.

    Needed where it may hold a NaN: a fused call may multiply by zero what nobody looks at.
    """
    index = torch.tensor(pages, dtype=torch.long, device=state.lengths.device)
    slots, place = state.slots[row].long(), state.rows[row].long()
    for pool in (*state.layers, *state.mtp):
        if isinstance(pool, Delta):
            pool.recurrent[slots] = 0
            pool.window[place] = 0
            continue
        pool.key[index] = 0
        pool.value[index] = 0
        if isinstance(pool, Mtp):
            pool.hidden[place] = 0


def as_state(config: Config, kept: Kept, length: int) -> State:
    """The value as a state of its own with one sequence; it must hold all pages of `length`."""
    first = kept.layers[0]
    like = first.key if isinstance(first, KV) else first.window
    pages = pages_of(length)
    draft = int(bool(kept.mtp))
    room = max(pages, 1) * PAGE
    state = init_state(config, 1, room, dtype=like.dtype, device=like.device, draft=draft)
    put(state, 0, range(1, pages + 1), kept)
    lengths = torch.full_like(state.lengths, length)
    return state._replace(lengths=lengths, mtp_lengths=(lengths - 1).clamp(min=0) * draft)


def of_state(state: State) -> Kept:
    """`as_state` undone: the first sequence of a state, with all its pages."""
    pages = pages_of(int(state.lengths[0]))
    return take(state, 0, state.block_table[0, :pages].tolist())
