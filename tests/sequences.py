"""Sequences of the odd models: states made, read through their tables, compared, displaced."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import qnext as qn
from qnext.functional.config import PAGE
from qnext.functional.state import KV, Delta
from qnext.functional.tree import leaves_with_paths, map_leaves, rebuild
from tests.samples import BASE, relative_rms

CLOSE = 1e-5  # float32 products of other shapes, scan or chunks: sums in another order
HARSH = 1e-4  # a row that is forgotten at once leaves small sums, which the gated norm blows up
BATCH, VOCAB = 5, 211  # no axis of a tested model has size 5


def model(
    compute: torch.dtype = torch.float32, state: torch.dtype = torch.float32, **changes: Any
) -> qn.Params:
    """Random params of an odd model in which every norm, decay and expert matters."""
    config = qn.Config.from_hf(BASE | changes).with_precision(compute=compute, state=state)
    plain = qn.init_params(config, seed=1)
    generator = torch.Generator().manual_seed(2)

    def shaken(path: str, leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=generator)
        if path.endswith("A_log"):
            return leaf.clone().uniform_(0.05, 8, generator=generator).log_()
        size = {"norm": 0.3, "router": 0.3, "embed": 1.0, "conv": 0.5, "bias": 1.0}
        return leaf + (size.get(path.rpartition(".")[2].rpartition("_")[2], 0) * noise).to(leaf)

    return rebuild(plain, [shaken(path, leaf) for path, leaf in leaves_with_paths(plain)])


def words(seq: int, batch: int = BATCH, seed: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def started(params: qn.Params, draft: int = 0) -> qn.State:
    """Sequences that have consumed 0, 2, 31, 127 and 130 tokens; room for 290, three pages."""
    counts = torch.tensor([31, 127, 0, 130, 2])
    state = qn.init_state(params.config, BATCH, 290, draft=draft)
    return qn.forward(params, state, words(130, seed=5), counts)[1]


def used(params: qn.Params, draft: int = 0, dtype: torch.dtype | None = None) -> qn.State:
    """Rows said to have consumed 40, 0, 3, 127 and 130 tokens, on pools of random values.

    bfloat16 can hold them, whatever the pools' dtypes, and no transpose leaves them as they are.
    """
    state = qn.init_state(params.config, BATCH, 300, draft=draft, dtype=dtype)
    generator = torch.Generator().manual_seed(7)

    def fill(pool: Tensor) -> Tensor:
        return torch.randn(pool.shape, generator=generator).to(torch.bfloat16).to(pool.dtype)

    lengths = torch.tensor([40, 0, 3, 127, 130], dtype=torch.int32)
    return state._replace(lengths=lengths, layers=map_leaves(fill, state.layers))


def cells(state: qn.State, row: int) -> Tensor:
    """Rows of the flattened page pools that hold a sequence's keys and values."""
    first = state.block_table[row].long()[:, None] * PAGE
    return (first + torch.arange(PAGE)).flatten()[: int(state.lengths[row])]


def content(params: qn.Params, state: qn.State, row: int) -> dict[str, Tensor]:
    """Everything a sequence remembers, read through its tables."""
    window = int(state.accepted[row]) + torch.arange(params.config.linear_conv_kernel_dim - 1)
    found = {"lengths": state.lengths[row], "capacity": state.capacity[row]}
    for i, part in enumerate(state.layers):
        if isinstance(part, KV):
            at = cells(state, row)
            found |= {f"{i}.{n}": p.flatten(0, 1)[at] for n, p in part._asdict().items()}
        else:
            found[f"{i}.recurrent"] = part.recurrent[int(state.slots[row, 0])]
            found[f"{i}.window"] = part.window[int(state.rows[row])][window]
    return found


class Result(NamedTuple):
    """Valid logits of each row, and what each row remembers."""

    logits: list[Tensor]
    memory: list[dict[str, Tensor]]


def result(params: qn.Params, logits: Tensor, state: qn.State, lengths: list[int]) -> Result:
    memory = [content(params, state, row) for row in range(len(lengths))]
    return Result([logits[row, :count] for row, count in enumerate(lengths)], memory)


def run(params: qn.Params, state: qn.State, tokens: Tensor, lengths: list[int]) -> Result:
    logits, state = qn.forward(params, state, tokens, torch.tensor(lengths))
    return result(params, logits, state, lengths)


def step_by_step(params: qn.Params, state: qn.State, tokens: Tensor) -> Result:
    logits = []
    for token in tokens.unbind(1):
        out, state = qn.decode(params, state, token)
        logits.append(out)
    return result(params, torch.stack(logits, 1), state, [tokens.shape[1]] * BATCH)


def check_same(got: Result, want: Result) -> None:
    for a, b in zip(got.logits, want.logits, strict=True):
        assert torch.equal(a, b)
    for mine, other in zip(got.memory, want.memory, strict=True):
        check_memory(mine, other)


def check_memory(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


def check_close(got: Result, want: Result, tolerance: float = CLOSE) -> None:
    for a, b in zip(got.logits, want.logits, strict=True):
        assert a.shape == b.shape and (a.numel() == 0 or relative_rms(a, b) < tolerance)
    for mine, other in zip(got.memory, want.memory, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            if mine[name].is_floating_point() and other[name].any():
                assert relative_rms(mine[name], other[name]) < tolerance, name
            else:
                assert torch.equal(mine[name], other[name]), name


def spoil(params: qn.Params, state: qn.State) -> qn.State:
    """The same sequences, with NaN in whatever is none of their content."""

    def keep(pool: Tensor, index: tuple[Tensor, ...]) -> Tensor:
        return torch.full_like(pool, torch.nan).index_put(index, pool[index])

    at = torch.cat([cells(state, row) for row in range(state.batch)])
    past = torch.arange(params.config.linear_conv_kernel_dim - 1)
    window = (state.rows[:, None].long(), state.accepted[:, None] + past)

    def part(p: KV | Delta) -> KV | Delta:
        if isinstance(p, KV):
            return KV(*(keep(pool.flatten(0, 1), (at,)).view_as(pool) for pool in p))
        return Delta(keep(p.recurrent, (state.slots[:, 0].long(),)), keep(p.window, window))

    return state._replace(layers=tuple(map(part, state.layers)))


def turned(state: qn.State) -> qn.State:
    """The state with key and value axes of the recurrent states changed over."""
    return state._replace(
        layers=tuple(
            p if isinstance(p, KV) else p._replace(recurrent=p.recurrent.mT.contiguous())
            for p in state.layers
        )
    )


def relocate(state: qn.State, extra: int = 3) -> qn.State:
    """The same sequences at other places of larger pools; NaN where nobody lives."""
    generator = torch.Generator().manual_seed(11)

    def places(table: Tensor) -> Tensor:
        count = table.numel()
        shuffled = torch.randperm(count + extra, generator=generator)[:count] + 1
        return torch.cat([torch.zeros(1, dtype=torch.int64), shuffled])

    def moved(pool: Tensor, place: Tensor) -> Tensor:
        blank = pool.new_full((pool.shape[0] + extra, *pool.shape[1:]), torch.nan)
        return blank.index_put((place,), pool)

    page, slot, row = places(state.block_table), places(state.slots), places(state.rows)
    return state._replace(
        block_table=page[state.block_table.long()].int(),
        slots=slot[state.slots.long()].int(),
        rows=row[state.rows.long()].int(),
        layers=tuple(
            KV(*(moved(pool, page) for pool in p))
            if isinstance(p, KV)
            else Delta(moved(p.recurrent, slot), moved(p.window, row))
            for p in state.layers
        ),
    )
