"""The gated delta rule (op-plugin npu_recurrent_gated_delta_rule, npu_chunk_gated_delta_rule)."""

import torch
from torch import Tensor

from qnext.lowering.softnpu.bridge import (
    CAPABILITIES,
    kernel,
    need,
    need_dtype,
    need_shape,
    poison,
)
from qnext.lowering.softnpu.kernels.index import need_range

BF16 = torch.bfloat16
LONGEST = 8  # tokens a sequence may have in one recurrent call
CHUNK = 64


def heads_check(q: Tensor, k: Tensor, v: Tensor, heads: int, dim: int) -> None:
    for name, tensor in (("query", q), ("key", k), ("value", v)):
        need_dtype(name, tensor, BF16)
        need(tensor.dim() == 3, f"{name} must be [t, heads, dim]", list(tensor.shape))
    need_shape("key", k, *q.shape)
    need(v.shape[0] == q.shape[0], "query and value must have the same tokens", list(v.shape))
    need(v.shape[1] <= heads, f"at most {heads} value heads", v.shape[1])
    need(v.shape[1] % q.shape[1] == 0, "value heads must be a multiple of key heads", v.shape[1])
    need(max(q.shape[2], v.shape[2]) <= dim, f"head dims up to {dim}", (q.shape[2], v.shape[2]))


def row_check(beta: Tensor | None, g: Tensor | None, lengths: Tensor | None, v: Tensor) -> None:
    assert_beta = beta is not None and lengths is not None
    need(assert_beta, "beta and actual_seq_lengths must be given", (beta, lengths))
    if beta is not None and lengths is not None:
        need_dtype("beta", beta, BF16)
        need_shape("beta", beta, *v.shape[:2])
        need_dtype("actual_seq_lengths", lengths, torch.int32)
        need(lengths.dim() == 1, "actual_seq_lengths must be [b]", list(lengths.shape))
    if g is not None:
        need_dtype("g", g, torch.float32)
        need_shape("g", g, *v.shape[:2])


def decay_check(g: Tensor | None, beta: Tensor, used: int) -> None:
    """Of the tokens that the lengths cover; others may hold anything. NaN goes through: it breaks
    no rule of the calls, and a row whose numbers are none must not end the others."""
    if g is not None:
        need(not (g[:used] > 0).any(), "g must be a log decay, at most 0", g[:used].max())
    outside = (beta[:used] < 0) | (beta[:used] > 1)
    need(not outside.any(), "beta must be in 0..1", beta[:used].flatten().tolist()[:8])


def state_check(state: Tensor, v: Tensor, q: Tensor, capability: str) -> None:
    allowed = (BF16, torch.float32) if CAPABILITIES[capability] else (BF16,)
    need_dtype("state", state, *allowed)
    need_shape("state", state, state.shape[0], v.shape[1], v.shape[2], q.shape[2])
    need(state.is_contiguous(), "state must be contiguous", state.stride())


def recurrent_check(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, state: Tensor,
    lengths: Tensor | None, slots: Tensor | None, g: Tensor | None, gk: Tensor | None,
    accepted: Tensor | None, scale: float, out: Tensor,
) -> None:  # fmt: skip
    heads_check(q, k, v, 256, 256)
    row_check(beta, g, lengths, v)
    need(gk is None, "gk must be absent on this CANN", gk)
    state_check(state, v, q, "state_float32")
    need(state.shape[0] >= q.shape[0], "the pool must have a slot a token", state.shape[0])
    need(slots is not None, "ssm_state_indices must be given", slots)
    if slots is not None:
        need_dtype("ssm_state_indices", slots, torch.int32)
        need_shape("ssm_state_indices", slots, q.shape[0])
    if accepted is not None and lengths is not None:
        need_dtype("num_accepted_tokens", accepted, torch.int32)
        need_shape("num_accepted_tokens", accepted, lengths.shape[0])


def recurrent_values(
    lengths: list[int],
    slots: Tensor,
    accepted: list[int],
    g: Tensor | None,
    beta: Tensor,
    pool: int,
) -> None:
    """What the chip gets wrong without a word: the core returns, or slots race."""
    need(all(0 <= n <= LONGEST for n in lengths), f"lengths must be 0..{LONGEST}", lengths)
    used = sum(lengths)
    need(used <= slots.shape[0], f"lengths must sum to at most {slots.shape[0]}", lengths)
    need_range("ssm_state_indices", slots[:used], pool)
    kept = slots[:used][slots[:used] != 0]  # slot 0 is scratch: who wins there does not matter
    distinct = kept.unique().numel() == kept.numel()
    need(distinct, "slots must be distinct but for slot 0", slots[:used].tolist())
    for have, length in zip(accepted, lengths, strict=True):
        need(length == 0 or 1 <= have <= length, f"accepted must be 1..{length}", have)
    decay_check(g, beta, used)


@kernel("aclnnRecurrentGatedDeltaRule", "tttttttttt" + "ft", recurrent_check)
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, lengths: Tensor, slots: Tensor,
    g: Tensor | None, gk: None, accepted: Tensor | None, scale: float, out: Tensor,
) -> None:  # fmt: skip
    """float32 between the tokens of a call, rounded where a slot or the output is written.

    Tokens beyond the lengths are undefined.
    """
    counts = lengths.tolist()
    taken = accepted.tolist() if accepted is not None else [1] * len(counts)
    recurrent_values(counts, slots, taken, g, beta, state.shape[0])
    share = v.shape[1] // q.shape[1]
    query = (q.float() * scale).repeat_interleave(share, 1)
    key = k.float().repeat_interleave(share, 1)
    poison(out)
    first = 0
    for length, have in zip(counts, taken, strict=True):
        if length == 0:
            continue
        memory = state[int(slots[first + have - 1])].float()
        for t in range(first, first + length):
            if g is not None:
                memory = memory * g[t].exp()[:, None, None]
            error = v[t].float() - (memory * key[t][:, None]).sum(-1)
            memory = memory + (error * beta[t].float()[:, None])[..., None] * key[t][:, None]
            out[t] = (memory * query[t][:, None]).sum(-1).to(out.dtype)
            state[int(slots[t])] = memory.to(state.dtype)
        first += length


def chunk_check(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, initial: Tensor | None,
    lengths: Tensor | None, scale: float, g: Tensor | None, out: Tensor, final: Tensor,
) -> None:  # fmt: skip
    heads_check(q, k, v, 64, 128)
    row_check(beta, g, lengths, v)
    need(initial is not None, "initial_state must be given", initial)
    if initial is not None and lengths is not None:
        state_check(initial, v, q, "state_float32")
        need(initial.shape[0] == lengths.shape[0], "a state a sequence", list(initial.shape))


@kernel("aclnnChunkGatedDeltaRule", "tttttt" + "ft" + "tt", chunk_check)
def chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial: Tensor, lengths: Tensor, scale: float,
    g: Tensor | None, out: Tensor, final: Tensor,
) -> None:  # fmt: skip
    """Chunks of 64, every stage rounded to bf16 as the A2 and A3 kernel stores it."""
    counts = lengths.tolist()
    need(all(n >= 0 for n in counts), "lengths must not be negative", counts)
    need(sum(counts) <= q.shape[0], f"lengths must sum to at most {q.shape[0]}", counts)
    decay_check(g, beta, sum(counts))
    decay = g if g is not None else torch.zeros(v.shape[:2])
    share = v.shape[1] // q.shape[1]
    poison(out)
    first = 0
    for row, length in enumerate(counts):
        memory = initial[row].float()
        for start in range(first, first + length, CHUNK):
            span = slice(start, min(start + CHUNK, first + length))
            result, memory = one_chunk(
                q[span].float().repeat_interleave(share, 1).transpose(0, 1),
                k[span].float().repeat_interleave(share, 1).transpose(0, 1),
                v[span].float().transpose(0, 1),
                beta[span].float().t()[..., None],
                decay[span].t().cumsum(1)[..., None],
                memory,
                scale,
            )
            out[span] = result.transpose(0, 1).to(out.dtype)
        final[row] = memory.to(final.dtype)
        first += length


def one_chunk(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, sums: Tensor, memory: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One chunk of every head: q, k, v `[heads, n, dim]`, beta and sums `[heads, n, 1]`."""

    def rounded(x: Tensor) -> Tensor:
        return x.to(BF16).float()

    if CAPABILITIES["chunk_divides"]:  # 0 / 0 once a chunk decays by more than float32 holds
        apart = (sums.exp() / sums.mT.exp()).tril()
    else:
        apart = (sums - sums.mT).tril().exp().tril()
    kk, qk = rounded(k @ k.mT), rounded(q @ k.mT)
    system = torch.eye(q.shape[1]) + (beta * kk * apart).tril(-1)
    inverse = rounded(torch.linalg.inv(system))
    weights = rounded(inverse @ rounded(-beta * sums.exp() * k))
    values = rounded(inverse @ rounded(beta * v))
    query = rounded(q * scale * sums.exp())
    key = rounded(k * (sums[:, -1:] - sums).exp())
    before = rounded(query @ memory.mT)
    fresh = rounded(values + rounded(weights @ memory.mT))
    memory = rounded(rounded(memory * sums[:, -1:].exp()) + fresh.mT @ key)
    return rounded(qk * scale * apart) @ fresh + before, memory
