"""Everything a model remembers between calls, as one value.

Keys and values live in pages, delta-net states in slots, convolution windows in rows: pools that
many sequences share, found through the per-sequence tables. Row 0 of every pool is scratch:
padding writes there and nobody reads it. A notebook's state has contiguous pages; a server's has
them wherever they were free. The functions of the model cannot tell the difference.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn.functional import pad

from qnext.errors import InputError
from qnext.functional.config import ATTENTION, PAGE, Config
from qnext.functional.tree import is_concrete
from qnext.shapes import LeafHint, allocate


class KV(NamedTuple):
    """Keys and values of one attention layer, in pages of 128 tokens; page 0 is scratch."""

    key: Float[Tensor, "pages page hkv hd"]
    value: Float[Tensor, "pages page hkv hd"]


class Delta(NamedTuple):
    """One delta-net layer: recurrent states, value-first, and the convolution's last inputs."""

    recurrent: Float[Tensor, "slots hv dv dk"]
    window: Float[Tensor, "rows window conv"]  # width - 1 + draft inputs


class Mtp(NamedTuple):
    """An MTP module: its own keys and values, in the layers' pages, and what it goes on from.

    `hidden` are the model's hidden states after the last call's tokens, the present one at
    `accepted`, as windows begin there. Kept where the state has room for drafts.
    """

    key: Float[Tensor, "pages page hkv hd"]
    value: Float[Tensor, "pages page hkv hd"]
    hidden: Float[Tensor, "rows drafts d"]


LayerState: TypeAlias = KV | Delta


class State(NamedTuple):
    """What `batch` sequences have consumed so far. Values beyond `lengths` mean nothing."""

    lengths: Int32[Tensor, " batch"]  # tokens consumed
    capacity: Int32[Tensor, " batch"]  # tokens there is room for
    block_table: Int32[Tensor, "batch max_pages"]  # page of each 128 positions
    slots: Int32[Tensor, "batch drafts"]  # slots[:, 0] holds the present recurrent state
    rows: Int32[Tensor, " batch"]  # row of the window pools
    # offset of the present window in its row; minus the tokens that wait for `commit`
    accepted: Int32[Tensor, " batch"]
    layers: tuple[LayerState, ...]
    mtp_lengths: Int32[Tensor, " batch"]  # (hidden, next token) pairs the MTP modules consumed
    mtp: tuple[Mtp, ...]

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]


def init_state(
    config: Config,
    batch: int,
    capacity: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    draft: int = 0,
    pages: int | None = None,
) -> State:
    """The state of `batch` empty sequences with room for `capacity` tokens each.

    `dtype` is that of keys, values and windows (default: the config's compute dtype); recurrent
    states have the config's state dtype. `draft` is the number of tokens that may be drafted ahead
    for speculation: it buys `draft` further slots a sequence, and the MTP module, where there is
    one, then follows whatever the state consumes. With `pages` the pools have so many, scratch not
    counted, and no sequence has any yet: a server hands them out. On device "meta" the result is
    specs.
    """
    for name, number, least in (
        ("batch", batch, 1),
        ("capacity", capacity, 1),
        ("draft", draft, 0),
        ("pages", 0 if pages is None else pages, 0),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise InputError(f"{name} must be an integer >= {least}, got {number!r}")
    precision = config.precision
    max_pages = pages_of(capacity)
    drafts = draft + 1
    sizes = config.axes | {
        "pages": 1 + (batch * max_pages if pages is None else pages),
        "slots": 1 + batch * drafts,
        "rows": 1 + batch,
        "drafts": drafts,
        "window": config.linear_conv_kernel_dim - 1 + draft,
    }

    def zeros(shape: tuple[int, ...], hint: LeafHint) -> Tensor:
        kind = precision.state if "slots" in hint.axes else dtype or precision.compute
        return torch.zeros(shape, dtype=kind, device=device)

    def counts(value: int) -> Tensor:
        return torch.full((batch,), value, dtype=torch.int32, device=device)

    table = _numbers((batch, max_pages), device)
    kinds: list[Callable[..., LayerState]] = [
        KV if kind == ATTENTION else Delta for kind in config.layer_types
    ]
    return State(
        lengths=counts(0),
        capacity=counts(capacity),
        block_table=table if pages is None else torch.zeros_like(table),
        slots=_numbers((batch, drafts), device),
        rows=_numbers((batch,), device),
        accepted=counts(0),
        layers=tuple(allocate(kind, sizes, zeros) for kind in kinds),
        mtp_lengths=counts(0),
        mtp=tuple(allocate(Mtp, sizes, zeros) for _ in range(config.mtp_layers)),
    )


def pages_of(length: int) -> int:
    """Pages that so many tokens fill or begin."""
    return -(-length // PAGE)


def fork(state: State) -> State:
    """A second future of the same past. Free: a state is a value and no function changes it.

    It exists to be said aloud; keeping the variable does the same. Only donation (`jit(...,
    donate=...)`) gives a state up, and then for both futures.
    """
    return state


def select(state: State, rows: Tensor | list[int]) -> State:
    """A state of its own for the given rows of the batch, in that order; rows may repeat.

    Copies the pages, slots and windows of those rows into contiguous pools of the same capacity.
    """
    index = _index(state, rows)

    def gather(pool: Tensor, table: Tensor) -> Tensor:
        scratch = torch.zeros_like(pool[:1])
        return torch.cat([scratch, pool[table[index].flatten().long()]])

    def renumber(table: Tensor) -> Tensor:
        fresh = table[index]
        return torch.arange(1, 1 + fresh.numel(), dtype=torch.int32, device=table.device).view_as(
            fresh
        )

    return _pools(state, gather)._replace(
        lengths=state.lengths[index],
        capacity=state.capacity[index],
        block_table=renumber(state.block_table),
        slots=renumber(state.slots),
        rows=renumber(state.rows),
        accepted=state.accepted[index],
        mtp_lengths=state.mtp_lengths[index],
    )


def clear(state: State, rows: Tensor | list[int]) -> State:
    """The state with the given rows empty again, for other sequences: nothing of the old is left.

    Zeroes their pages, slots and windows as well as their lengths. What is beyond a sequence's
    length is never looked at by the definitions, but a fused call may multiply it by zero, and zero
    times a NaN that somebody left there is NaN.
    """
    index = _index(state, rows)

    def zeroed(pool: Tensor, table: Tensor) -> Tensor:
        return pool.index_put((table[index].flatten().long(),), pool.new_zeros(()))

    return _pools(state, zeroed)._replace(
        lengths=state.lengths.index_fill(0, index, 0),
        accepted=state.accepted.index_fill(0, index, 0),
        mtp_lengths=state.mtp_lengths.index_fill(0, index, 0),
    )


def _pools(state: State, change: Callable[[Tensor, Tensor], Tensor]) -> State:
    """The state with every pool changed, given also the table by which sequences find theirs."""

    def layer(p: LayerState) -> LayerState:
        if isinstance(p, KV):
            return KV(*(change(pool, state.block_table) for pool in p))
        return Delta(change(p.recurrent, state.slots), change(p.window, state.rows))

    def module(p: Mtp) -> Mtp:
        key, value = (change(pool, state.block_table) for pool in (p.key, p.value))
        return Mtp(key, value, change(p.hidden, state.rows))

    return state._replace(layers=tuple(map(layer, state.layers)), mtp=tuple(map(module, state.mtp)))


def _index(state: State, rows: Tensor | list[int]) -> Tensor:
    """Rows of the batch as an index tensor; InputError unless they are rows of this state."""
    if isinstance(rows, Tensor) and not is_concrete(rows):
        return rows.long()
    chosen = rows.tolist() if isinstance(rows, Tensor) else rows
    if (
        not isinstance(chosen, list | tuple)
        or not chosen
        or not all(type(row) is int and 0 <= row < state.batch for row in chosen)
    ):
        raise InputError(f"rows must list indices within 0..{state.batch - 1}, got {chosen}")
    return torch.tensor(chosen, device=state.lengths.device)


def widen(state: State, batch: int) -> State:
    """The state with rows added up to `batch`, which live on scratch: nothing they do is kept.

    Pools are shared, not copied. Raises InputError where the state has more rows already.
    """
    more = batch - state.batch
    if more < 0:
        raise InputError(f"the state has {state.batch} rows, they do not fit {batch}")
    if not more:
        return state
    wider = _tables(state, lambda table: pad(table, (0, 0) * (table.ndim - 1) + (0, more)))
    return wider._replace(capacity=pad(state.capacity, (0, more), value=PAGE))


def narrow(state: State, batch: int) -> State:
    """The first `batch` rows of a state, in the same pools: `widen` undone."""
    if not 1 <= batch <= state.batch:
        raise InputError(f"batch must lie in 1..{state.batch}, the state's rows, got {batch}")
    return _tables(state, lambda table: table[:batch])


def view(state: State, index: Tensor) -> State:
    """The given rows [batch], an index, of a state, in the same pools; what they do is theirs."""
    return _tables(state, lambda table: table.index_select(0, index))


def _tables(state: State, change: Callable[[Tensor], Tensor]) -> State:
    """The state with what it holds of each sequence changed; pools stay the same."""
    return state._replace(
        lengths=change(state.lengths),
        capacity=change(state.capacity),
        block_table=change(state.block_table),
        slots=change(state.slots),
        rows=change(state.rows),
        accepted=change(state.accepted),
        mtp_lengths=change(state.mtp_lengths),
    )


def _numbers(shape: tuple[int, ...], device: torch.device | str | None) -> Tensor:
    """1, 2, ...: the pool rows of each sequence, 0 being scratch."""
    count = torch.Size(shape).numel()
    return torch.arange(1, 1 + count, dtype=torch.int32, device=device).view(shape)
