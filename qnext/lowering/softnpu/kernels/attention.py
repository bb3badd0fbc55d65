"""Attention over dense or paged keys (op-plugin npu_fused_infer_attention_score, _v2).

The layouts BSH, BSND, BNSD and TND are one problem a sequence here.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext.lowering.softnpu.bridge import CAPABILITIES, kernel, need, need_dtype, poison
from qnext.lowering.softnpu.kernels.index import need_range

LOW = (torch.bfloat16, torch.float16)
MASKS = (torch.bool, torch.int8, torch.uint8)
SIDE = 2048  # of the one mask that sparse_mode 3 takes, for any lengths
RANKS = {"BSH": 3, "BSND": 4, "BNSD": 4, "TND": 3}
TND_DIMS = (64, 128, 192)


class Call(NamedTuple):
    """The arguments that qnext's calls differ in."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    q_lengths: list[int] | None
    kv_lengths: list[int] | None
    table: Tensor | None
    heads: int
    scale: float
    layout: str
    kv_heads: int
    sparse_mode: int
    block_size: int
    inner_precise: int
    out: Tensor
    lse: Tensor | None

    @property
    def dim(self) -> int:
        width = self.query.shape[-1]
        return width // self.heads if self.layout == "BSH" else width

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences, and the most queries of one."""
        if self.layout == "TND":
            ends = self.q_lengths or []
            return len(ends), max((b - a for a, b in spans(ends)), default=0)
        sequence = 2 if self.layout == "BNSD" else 1
        return self.query.shape[0], self.query.shape[sequence]


def spans(ends: list[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends[:-1]], ends, strict=True))


def check(call: Call) -> None:
    q = call.query
    need(call.layout in RANKS, f"input_layout must be one of {list(RANKS)}", call.layout)
    need(q.dim() == RANKS[call.layout], f"{call.layout} is of rank {RANKS[call.layout]}", q.shape)
    for name, tensor in (("query", q), ("key", call.key), ("value", call.value)):
        need_dtype(name, tensor, *LOW)
        need(tensor.dtype == q.dtype, f"{name} must be of query's dtype", tensor.dtype)
    need(call.key.shape == call.value.shape, "key and value must be alike", call.value.shape)
    need(q.shape[-1] % (call.heads if call.layout == "BSH" else 1) == 0, "whole heads", q.shape)
    if call.layout != "BSH":
        axis = {"BSND": 2, "BNSD": 1, "TND": 1}[call.layout]
        need(q.shape[axis] == call.heads, f"query must have {call.heads} heads", list(q.shape))
    need(call.heads % call.kv_heads == 0, "num_query_heads must be a multiple", call.kv_heads)
    need(call.heads // call.kv_heads <= 64, "at most 64 queries a key head", call.heads)
    need(call.dim % 16 == 0 and call.dim <= 512, "head dims are 16..512 in 16s", call.dim)
    if call.layout == "TND":
        allowed = (*TND_DIMS, 256) if CAPABILITIES["attention_tnd_256"] else TND_DIMS
        need(call.dim in allowed, f"TND takes head dims {list(allowed)}", call.dim)
    need(call.inner_precise in (0, 1), "inner_precise must be 0 or 1", call.inner_precise)
    need(call.inner_precise == 0 or q.dtype == torch.float16, "bf16 needs inner_precise 0", 1)
    lengths_check(call)
    pages_check(call) if call.table is not None else dense_check(call)
    mask_check(call)


def lengths_check(call: Call) -> None:
    batch, most = call.shape
    if call.layout == "TND":
        ends = call.q_lengths
        need(ends, "TND needs actual_seq_qlen", ends)
        assert ends
        need(all(a <= b for a, b in spans(ends)), "actual_seq_qlen must be running sums", ends)
        need(ends[-1] == call.query.shape[0], "actual_seq_qlen must end at t", ends)
    elif call.q_lengths:
        good = len(call.q_lengths) == batch and all(0 <= n <= most for n in call.q_lengths)
        need(good, f"actual_seq_qlen must be {batch} lengths up to {most}", call.q_lengths)
    if call.kv_lengths is not None:
        good = len(call.kv_lengths) == batch and all(n >= 0 for n in call.kv_lengths)
        need(good, f"actual_seq_kvlen must be {batch} lengths", call.kv_lengths)


def pages_check(call: Call) -> None:
    batch, most = call.shape
    table, key, size = call.table, call.key, call.block_size
    assert table is not None
    need_dtype("block_table", table, torch.int32)
    need(
        table.dim() == 2 and table.shape[0] == batch,
        f"block_table must be [{batch}, n]",
        table.shape,
    )
    need(call.kv_lengths is not None, "pages need actual_seq_kvlen", None)
    room = table.shape[1] * size
    need(max(call.kv_lengths or [0]) <= room, f"at most {room} keys a row", call.kv_lengths)
    if most == 1:
        need(size % 16 == 0 and 16 <= size <= 512, "block_size must be 16..512 in 16s", size)
    else:
        need(size % 128 == 0 and 128 <= size <= 512, "block_size must be 128..512 in 128s", size)
    need(
        key.is_contiguous() and call.value.is_contiguous(), "pages must be contiguous", key.stride()
    )
    width = call.kv_heads * call.dim
    if key.dim() == 3:
        need(
            tuple(key.shape[1:]) == (size, width), f"pages must be [n, {size}, {width}]", key.shape
        )
        need(width <= 65535, "a row of such pages must be at most 65535 wide", width)
    else:
        need(key.dim() == 4, "pages are of rank 3 or 4", list(key.shape))
        need(call.layout in ("BNSD", "TND"), "pages of rank 4 need BNSD or TND", call.layout)
        want = (call.kv_heads, size, call.dim)
        need(tuple(key.shape[1:]) == want, f"pages must be [n, {want}]", list(key.shape))


def dense_check(call: Call) -> None:
    key, batch = call.key, call.shape[0]
    need(key.dim() == call.query.dim(), "key must be of query's layout", list(key.shape))
    if call.layout == "TND":
        ends = call.kv_lengths
        need(ends, "TND needs actual_seq_kvlen", ends)
        assert ends
        need(all(a <= b for a, b in spans(ends)), "actual_seq_kvlen must be running sums", ends)
        need(ends[-1] == key.shape[0], "actual_seq_kvlen must end at t", ends)
        need(tuple(key.shape[1:]) == (call.kv_heads, call.dim), "key is [t, n, d]", key.shape)
        return
    need(key.shape[0] == batch, "key must have query's rows", list(key.shape))
    have = dense(call, key, 0).shape
    need(tuple(have[1:]) == (call.kv_heads, call.dim), "key's heads must be whole", list(key.shape))
    if call.kv_lengths is not None:
        good = max(call.kv_lengths) <= have[0]
        need(good, f"actual_seq_kvlen must be up to {have[0]}", call.kv_lengths)


def mask_check(call: Call) -> None:
    mask = call.mask
    need(call.sparse_mode in (0, 3), "sparse_mode must be 0 or 3 here", call.sparse_mode)
    if mask is not None:
        need_dtype("atten_mask", mask, *MASKS)
    if call.sparse_mode == 3:
        need(mask is not None, "sparse_mode 3 needs its mask", None)
        assert mask is not None
        need(tuple(mask.shape) == (SIDE, SIDE), f"sparse_mode 3 takes [{SIDE}, {SIDE}]", mask.shape)
    elif mask is not None:
        batch, most = call.shape
        need(call.layout != "TND", "TND takes no full mask", call.layout)
        if call.table is not None:
            keys = call.table.shape[1] * call.block_size
        else:
            keys = dense(call, call.key, 0).shape[0]
        shapes = [(batch, 1, most, keys), (1, 1, most, keys), (batch, most, keys), (most, keys)]
        need(tuple(mask.shape) in shapes, f"a full mask must be one of {shapes}", list(mask.shape))


def dense(call: Call, tensor: Tensor, row: int) -> Tensor:
    """A sequence of a dense tensor as [s, heads, dim], a view."""
    if call.layout == "BNSD":
        return tensor[row].transpose(0, 1)
    return tensor[row].unflatten(-1, (-1, call.dim)) if call.layout == "BSH" else tensor[row]


def keys_of(call: Call, tensor: Tensor, row: int) -> Tensor:
    """The keys or values of a sequence, [s, heads, dim]."""
    if call.table is None:
        if call.layout == "TND":
            assert call.kv_lengths is not None
            return tensor[slice(*spans(call.kv_lengths)[row])]
        every = dense(call, tensor, row)
        return every[: call.kv_lengths[row]] if call.kv_lengths else every
    assert call.kv_lengths is not None
    length = call.kv_lengths[row]
    pages = call.table[row, : -(-length // call.block_size)].long()
    need_range("block_table", pages, tensor.shape[0])
    found = tensor[pages]
    if found.dim() == 4:
        found = found.transpose(1, 2)
    return found.reshape(-1, call.kv_heads, call.dim)[:length]


def run(call: Call) -> None:
    """out = R(sum_j R(exp(s_j - m)) v_j / sum_j exp(s_j - m)), a row at a time.

    Rows beyond actual_seq_qlen, and rows that see no key, are undefined.
    """
    if call.sparse_mode == 3:
        assert call.mask is not None
        causal = torch.ones(SIDE, SIDE, dtype=torch.bool).triu(1)
        need(torch.equal(call.mask.bool(), causal), "the mask must be triu(ones, 1)", "another")
    poison(call.out)
    lse = call.lse if call.lse is not None and call.lse.numel() > 1 else None
    if lse is not None:
        poison(lse)
    for row in range(call.shape[0]):
        if call.layout == "TND":
            assert call.q_lengths is not None
            span = slice(*spans(call.q_lengths)[row])
            query, out = call.query[span], call.out[span]
        else:
            length = call.q_lengths[row] if call.q_lengths else call.shape[1]
            span = slice(0, length)
            query = dense(call, call.query, row)[span]
            out = dense(call, call.out, row)[span]
        result, total = one(
            query.float(),
            keys_of(call, call.key, row).float(),
            keys_of(call, call.value, row).float(),
            call,
            row,
        )
        out.copy_(result)
        if lse is not None and call.layout == "TND":
            lse[span, :, 0] = total
        elif lse is not None:
            lse[row, :, span, 0] = total.t()


def one(q: Tensor, k: Tensor, v: Tensor, call: Call, row: int) -> tuple[Tensor, Tensor]:
    """A sequence: its output [l, heads, dim] and log of the sum of exponentials [l, heads]."""
    share = call.heads // call.kv_heads
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    length, keys = q.shape[0], k.shape[0]
    if keys == 0 or length == 0:
        return torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
    scores = torch.einsum("lnd,snd->nls", q, k) * call.scale
    if call.sparse_mode == 3:
        hidden = torch.ones(length, keys, dtype=torch.bool).triu(keys - length + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    elif call.mask is not None:
        mask = call.mask.bool().reshape(-1, *call.mask.shape[-2:])
        hidden = mask[row if mask.shape[0] > 1 else 0, :length, :keys]
        scores = scores.masked_fill(hidden, -torch.inf)
    most = scores.amax(-1, keepdim=True)
    weights = (scores - most).exp()  # a row without a key becomes NaN
    total = weights.sum(-1)
    rounded = weights.to(call.query.dtype).float()
    out = torch.einsum("nls,snd->lnd", rounded, v) / total.t()[..., None]
    return out, (most[..., 0] + total.log()).t()


def absent(values: tuple[Any, ...]) -> None:
    extra = [value for value in values if value is not None]
    need(not extra, "quantisation, prefix, rope and sink must be absent", len(extra))


# argument places of the two calls: the host lists, then 14 and 5 or 8 optional tensors
V3 = "tLLttII" + "t" * 14 + "ttIttt" + "idiisiiiiibiitt"
V4 = "tLLttII" + "t" * 14 + "ttIttttt" + "idiisiiiiibiiitt"
TABLE, SCALARS_V3, SCALARS_V4 = 14, 27, 29


def gather(values: tuple[Any, ...], scalars: int) -> Call:
    q, keys, val, pse, mask, q_lengths, kv_lengths = values[:7]
    heads, scale, _before, _after, layout, kv_heads, mode, precise, size = values[
        scalars : scalars + 9
    ]
    optional = (pse, *values[7:TABLE], *values[TABLE + 1 : scalars])
    absent(tuple(value for value in optional if value != []))
    need(len(keys) == len(val) == 1, "key and value must be one tensor each", len(keys))
    return Call(
        *(q, keys[0], val[0], mask, q_lengths or None, kv_lengths, values[TABLE], heads, scale),
        *(layout, kv_heads or heads, mode, size, precise, values[-2], values[-1]),
    )


for _name, _signature, _scalars in (
    ("aclnnFusedInferAttentionScoreV3", V3, SCALARS_V3),
    ("aclnnFusedInferAttentionScoreV4", V4, SCALARS_V4),
):
    kernel(_name, _signature, lambda *values, at=_scalars: check(gather(values, at)))(
        lambda *values, at=_scalars: run(gather(values, at))
    )
