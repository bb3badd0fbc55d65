"""Primitives as compositions of plain torch operations, for sites that the fused calls decline.

Every operation exists on the device as one call, nothing is read on the host and shapes are fixed,
so that a step with compositions is captured like any other. They compute in float32 and round once,
as the references do. Zeros and bounds are tensors: a number would be one launch more.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from qnext.lowering.npu import calls

WIDE = torch.float32
WORD = 0xFFFFFFFF


def dense(x: Tensor, dtype: torch.dtype = WIDE) -> Tensor:
    """x in a dtype and in the order of its axes: one launch for both, none where it is so."""
    if x.dtype == dtype:
        return x.contiguous()
    return x.to(dtype, memory_format=torch.contiguous_format)


def rotary(
    *, query: Tensor, key: Tensor, position: Tensor, frequency: Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    """Five launches, and four once a step: heads * cos + swapped * sin, query and key together.

    The cosine is even and the sine odd, so frequencies -f, f turn both halves of the channels; what
    does not turn has frequency 0.
    """
    pairs, rest = frequency.shape[0], query.shape[-1] - 2 * frequency.shape[0]
    still = torch.zeros(rest, dtype=frequency.dtype, device=frequency.device)
    angle = position[..., None, None].to(frequency.dtype) * torch.cat(
        [-frequency, frequency, still]
    )
    cos, sin = angle.cos(), angle.sin()
    if factor != 1:
        size = torch.cat([torch.full_like(frequency, factor)] * 2 + [torch.ones_like(still)])
        cos, sin = cos * size, sin * size
    heads = torch.cat([query, key], dim=-2)
    a, b, *tail = heads.split([pairs, pairs, rest][: 3 if rest else 2], dim=-1)
    turned = torch.addcmul(heads * cos, torch.cat([b, a, *tail], dim=-1), sin).to(query.dtype)
    query, key = turned.split([query.shape[-2], key.shape[-2]], dim=-2)
    return query, key


def attention(
    *,
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_table: Tensor,
    position: Tensor,
    context: Tensor,
    scale: float,
    padded: bool,
) -> Tensor:
    """Eleven launches, one more for several queries a row, one for padding; masks once a step.

    Whole pages are gathered up to the bound that shapes give. Values beyond the context become 0:
    a NaN times 0 is a NaN. Scores of keys that a query must not see are replaced whatever they are.
    """
    (batch, seq, _, hd), (page, hkv) = query.shape, key_pool.shape[1:3]
    bound = block_table.shape[1] * page
    seen = torch.arange(bound, dtype=position.dtype, device=position.device)

    def heads_first(pool: Tensor) -> Tensor:
        pages = pool.index_select(0, block_table.flatten()).view(batch, bound, hkv, hd)
        return dense(pages.transpose(1, 2))

    def constant(number: float, dtype: torch.dtype) -> Tensor:
        return torch.full((), number, dtype=dtype, device=query.device)

    inside = seen < context[:, None]
    key = heads_first(key_pool)
    value = torch.where(inside[:, None, :, None], heads_first(value_pool), constant(0.0, WIDE))
    q = query * torch.full((1,), scale, dtype=WIDE, device=query.device)
    q = q.view(batch, seq, hkv, -1, hd).transpose(1, 2).reshape(batch * hkv, -1, hd)
    scores = torch.bmm(q, key.flatten(0, 1).mT).view(batch, hkv, seq, -1, bound)
    visible = seen <= position[..., None]
    scores = torch.where(visible[:, None, :, None], scores, constant(-math.inf, WIDE))
    share = scores.softmax(-1).view(batch * hkv, -1, bound)
    out = torch.bmm(share, value.flatten(0, 1)).view(batch, hkv, seq, -1, hd)
    out = dense(out.transpose(1, 2), query.dtype).view_as(query)
    if not padded:
        return out
    valid = position < context[:, None]
    return torch.where(valid[..., None, None], out, constant(0.0, query.dtype))


def mixture_apart(
    *,
    x: Tensor,
    router: Tensor,
    shared_gate: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared_gate_up: Tensor,
    shared_down: Tensor,
    topk: int,
    renormalise: bool,
) -> Tensor:
    """Eleven launches: the shared expert's result is what the routed ones' are added to."""
    experts = router.shape[0]
    packed = linear(x, torch.cat([router, shared_gate, shared_gate_up]))
    logits, gate, up = packed.split([experts, 1, shared_gate_up.shape[0]], dim=-1)
    weight, expert = calls.npu_gating(logits=logits, topk=topk, renormalise=renormalise)
    rows, where, counts = calls.npu_init_routing(x=x, expert=expert, experts=experts)
    first, second = gate_up.mT.contiguous(), down.mT.contiguous()
    inner = calls.npu_swiglu(x=calls.npu_grouped_matmul(x=rows, weight=first, counts=counts))
    outer = calls.npu_grouped_matmul(x=inner, weight=second, counts=counts)
    shared = linear(calls.npu_swiglu(x=up), shared_down) * gate.sigmoid()
    return calls.npu_finalize_routing_onto(rows=outer, weight=weight, where=where, onto=shared)


def gumbel(*, seed: Tensor, position: Tensor, vocab: int) -> Tensor:
    """The reference's hash to the bit; seeds and positions are hashed in one."""
    shifts = tuple(torch.full((), by, dtype=torch.int64, device=seed.device) for by in (15, 16, 32))

    def mix(x: Tensor) -> Tensor:
        x = x ^ (x >> shifts[1])
        x = x * 0x7FEB352D & WORD
        x = x ^ (x >> shifts[0])
        x = x * 0x846CA68B & WORD
        return x ^ (x >> shifts[1])

    low, place = mix(torch.cat([seed, position.long()]) & WORD).chunk(2)
    stream = mix(low ^ (seed >> shifts[2] & WORD))
    stream = mix(stream ^ place)[:, None]
    token = torch.arange(vocab, dtype=torch.int64, device=seed.device) * 0x9E3779B9
    bits = mix(mix(stream + token & WORD) ^ stream)
    # -(bits + 0.5) * 2^-32: scaling by a power of two commutes with the one rounding
    half = torch.full((), -(2.0**-33), dtype=WIDE, device=seed.device)
    below = torch.add(half, bits.to(WIDE), alpha=-(2.0**-32)).clamp(min=2.0**-24 - 1)
    return -torch.log(-torch.log1p(below))
