"""The gated delta rule as plain torch operations, for sites that the fused calls decline.

`delta_scan` is the definition, `delta_theorem` the chunked theorem about it (functional/ops/
delta_rule.py), both in float32 with shapes fixed and nothing read on the host. Operands of products
are laid out so that no product copies; what depends on shapes alone leaves the step.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from qnext.functional.ops.delta_rule import CHUNK
from qnext.lowering.npu import calls
from qnext.lowering.npu.composed import WIDE, dense


def delta_scan(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Token by token: four launches a token and eight around them, nine around several.

    Two more cast a bf16 state; the index of its slots is made once a step. Value heads of one key
    head are rows of one matrix, so that no key is repeated for them.
    """
    (batch, seq, hk, dk), (hv, dv) = query.shape, value.shape[2:]
    q = query * torch.full((1,), scale, dtype=WIDE, device=query.device)
    # tokens first: each token's operands are dense
    k, v = dense(key.transpose(0, 1)), dense(value.transpose(0, 1))
    decay = g.exp()
    memory = state.index_select(0, slots[:, 0]).to(WIDE)
    steps = []
    for t in range(seq):
        kept = (memory * decay[:, t, :, None, None]).view(batch * hk, -1, dk)
        column = k[t].view(batch * hk, dk, 1)
        error = torch.baddbmm(v[t].view(batch * hk, -1, 1), kept, column, alpha=-1)
        write = error.view(batch, hv, dv, 1) * beta[:, t, :, None, None]
        memory = torch.baddbmm(kept, write.view(batch * hk, -1, 1), column.mT)
        memory = memory.view(batch, hv, dv, dk)
        steps.append(memory)
    states = steps[0] if seq == 1 else torch.stack(steps, dim=1)
    out = torch.bmm(states.view(batch * seq * hk, -1, dk), q.view(-1, dk, 1))
    written = states.view(-1, hv, dv, dk) if slots.shape[1] > 1 else memory
    pool = calls.npu_index_put(
        pool=state, index=slots.flatten().long(), values=written.to(state.dtype)
    )
    return out.view_as(value).to(value.dtype), pool


def delta_theorem(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """All chunks at once: 38 launches, 1 a chunk, 1 more for several, 5 where they must be filled.

    Two more cast a bf16 state; the index of its slots is made once a step.
    """
    batch, seq, hv, dv = value.shape
    chunks = -(-seq // CHUNK)
    size = -(-seq // chunks)
    both, v, g, beta = (
        in_chunks(x, chunks, size, query.shape[2])
        for x in (torch.stack([key, query], dim=3), value, g, beta)
    )
    part = transform(dense(both), dense(v), dense(g), beta, scale)
    slot = slots[:, 0]
    first = state.index_select(0, slot).to(WIDE).view(batch * hv, dv, -1)
    start, last = carry(part, first, chunks)
    writes = torch.baddbmm(part.u, part.w, start.mT, alpha=-1)
    out = torch.baddbmm(torch.bmm(part.scores, writes), part.q_since, start.mT, alpha=scale)
    # chunks, batch, hk, group, size, dv -> batch, chunks, size, hk, group, dv
    out = dense(out.view(*v.shape).permute(1, 0, 4, 2, 3, 5), value.dtype)
    out = out.view(batch, -1, hv, dv)
    out = out if chunks * size == seq else out[:, :seq].contiguous()
    last = last.view(-1, *state.shape[1:]).to(state.dtype)
    return out, calls.npu_index_put(pool=state, index=slot.long(), values=last)


def in_chunks(x: Tensor, chunks: int, size: int, hk: int) -> Tensor:
    """[batch, seq, hk * n, ...] -> [chunks, batch, hk, n, size, ...], chunks first to be dense.

    Also [batch, seq, hk, n, dk]. What fills the last chunk are zeros: identity updates.
    """
    if fill := chunks * size - x.shape[1]:
        x = pad(x, (0, 0) * (x.dim() - 2) + (0, fill))
    x = x.unflatten(1, (chunks, size))
    x = x if x.dim() == 6 else x.unflatten(3, (hk, -1))
    return x.permute(1, 0, 3, 4, 2, *range(5, x.dim()))


class Part(NamedTuple):
    """What chunks contribute, before any state is known; every head of every chunk is a matrix."""

    u: Tensor  # [heads, size, dv]; writes are u - w S^T,
    w: Tensor  # [heads, size, dk]
    scores: Tensor  # [heads, size, size], scaled; outputs are scores writes + scale q_since S^T
    q_since: Tensor  # [heads, size, dk], decayed from the chunk's start
    k_end: Tensor  # [heads, size, dk], decayed to its end
    kept: Tensor  # [heads, 1, 1], the decay of all of it


def transform(both: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> Part:
    """The UT transform of chunks: both [chunks, batch, hk, 2, size, dk] holds keys and queries."""
    *outer, _, size, dk = both.shape
    heads, group = g.numel() // size, g.shape[3]
    k, q = both[:, :, :, :1], both[:, :, :, 1:]
    rows = both.view(-1, 2 * size, dk)
    keys = rows[:, :size]

    since, within = decays(g)
    place = torch.arange(size, device=g.device)
    before, until = place[:, None] > place, place[:, None] >= place
    seen = torch.cat([before.to(WIDE), until.to(WIDE) * scale])
    # products of keys and of queries with keys come of one
    products = (torch.bmm(rows, keys.mT) * seen).view(*outer, 1, 2, size, size)
    products = products * within.unsqueeze(4)
    lower, scores = products[..., 0, :, :], products.view(heads, 2, size, size)[:, 1]

    inverse = unit_inverse((lower * beta[..., None]).view(heads, size, size))
    inverse = inverse.view(*outer, group, size, size) * beta[..., None, :]
    # value heads that share a key are rows of one product
    w = torch.bmm((inverse * since.mT).view(-1, group * size, size), keys)
    return Part(
        u=torch.bmm(inverse.view(heads, size, size), v.view(heads, size, -1)),
        w=w.view(heads, size, dk),
        scores=scores,
        q_since=(q * since).view(heads, size, dk),
        k_end=(k * within[..., -1, :, None]).view(heads, size, dk),
        kept=since[..., -1:, :].reshape(heads, 1, 1),
    )


def carry(part: Part, first: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """States [heads, dv, dk] at the start of every chunk, and the last [batch * hv, dv, dk].

    A chunk maps S to S (kept I - w^T k_end) + u^T k_end: the matrix is ready before any state is.
    """
    place = torch.arange(first.shape[-1], device=first.device)
    eye = (place[:, None] == place).to(WIDE)
    turn = torch.baddbmm(part.kept * eye, part.w.mT, part.k_end, alpha=-1)
    gain = torch.bmm(part.u.mT, part.k_end)
    turn, gain = (x.unflatten(0, (chunks, -1)) for x in (turn, gain))
    states = [first]
    for n in range(chunks):
        states.append(torch.baddbmm(gain[n], states[-1], turn[n]))
    starts = torch.stack(states[:-1]).flatten(0, 1) if chunks > 1 else first
    return starts, states[-1]


def decays(g: Tensor) -> tuple[Tensor, Tensor]:
    """exp(g_1 + ... + g_i) [.., size, 1] and exp(g_{j+1} + ... + g_i) [.., size, size].

    Each is its own sum: a difference of two would lose small decays behind a large one. Where j > i
    the latter is 1 and to be masked.
    """
    size = g.shape[-1]
    after = torch.arange(size + 1, device=g.device)
    summed = after[:size, None] >= after  # what column j sums: tokens at or after it
    zero = torch.zeros((), dtype=g.dtype, device=g.device)
    made = torch.where(summed, g[..., None], zero).cumsum(-2).exp()
    return made[..., :1], made[..., 1:]


def unit_inverse(lower: Tensor) -> Tensor:
    """(I + N)^-1 of a strictly lower N [batch, size, size], by blocks of the diagonal that double.

    X - X C X inverts a block from X, which inverts its two halves, and C, what N has between them.
    The product (I - N)(I + N^2)(I + N^4)... is as short and useless: powers of N grow as binomials
    before they vanish (docs/precision.md).
    """
    size = lower.shape[-1]
    levels = max((size - 1).bit_length(), 1)
    place, level = (torch.arange(n, device=lower.device) for n in (size, levels))
    eye = (place[:, None] == place).to(lower.dtype)
    # row and column lie in the two halves of one block of 2^(level + 1)
    block = place.expand(levels, size) >> level[:, None]
    below = (block[:, :, None] ^ block[:, None, :] == 1) & (place[:, None] > place)
    parts = lower * below.to(lower.dtype)[:, None]
    inverse = eye - parts[0]
    for n in range(1, parts.shape[0]):
        inverse = torch.baddbmm(inverse, inverse, torch.bmm(parts[n], inverse), alpha=-1)
    return inverse
