"""Rotary positions (op-plugin npu_mrope) and writes to pages (npu_scatter_pa_kv_cache)."""

import torch
from torch import Tensor

from qnext.lowering.softnpu.bridge import kernel, need, need_absent, need_dtype, need_shape
from qnext.lowering.softnpu.kernels.index import need_range

INDICES = (torch.int32, torch.int64)


def rope_check(
    positions: Tensor, q: Tensor, k: Tensor, cache: Tensor, section: list[int] | None, dim: int,
    half: bool, cache_mode: int, q_out: Tensor, k_out: Tensor,
) -> None:  # fmt: skip
    need_dtype("positions", positions, *INDICES)
    need(positions.dim() == 1, "positions must be [t] for plain rope", list(positions.shape))
    # sections matter for positions of rank 2 alone; without them the wheel hands over three
    # numbers of memory it has freed already, so they are not looked at
    need(half, "rotary_mode must be half here", half)
    for name, tensor in (("query", q), ("key", k)):
        need_dtype(name, tensor, torch.bfloat16, torch.float16, torch.float32)
        need_dtype(name, tensor, cache.dtype)
        need(tensor.dim() == 2, f"{name} must be [t, heads * dim]", list(tensor.shape))
        need(tensor.shape[0] == positions.shape[0], f"{name} must have a row a position", q.shape)
        need(tensor.shape[1] % dim == 0, f"{name} must be whole heads of {dim}", tensor.shape[1])
        need(tensor.stride(-1) == 1, f"{name} must have contiguous rows", tensor.stride())
    need(cache.dim() == 2 and cache.is_contiguous(), "cos_sin_cache must be [n, dim]", cache.shape)
    rotary = cache.shape[1]
    need(rotary <= dim, f"the rotary dim must be at most {dim}", rotary)
    need(dim % 32 == 0 and rotary % 32 == 0, "both dims must be multiples of 32", (dim, rotary))


@kernel("aclnnRopeWithSinCosCacheV2", "ttttIibitt", rope_check)
def rope(
    positions: Tensor, q: Tensor, k: Tensor, cache: Tensor, section: list[int] | None, dim: int,
    half: bool, cache_mode: int, q_out: Tensor, k_out: Tensor,
) -> None:  # fmt: skip
    """a' = R(a cos - b sin), b' = R(b cos + a sin) of the leading part; the tail is copied."""
    need_range("positions", positions, cache.shape[0])
    cos, sin = cache[positions.long()].float()[:, None].chunk(2, -1)
    width = cache.shape[1]
    for tensor, out in ((q, q_out), (k, k_out)):
        heads = tensor.reshape(tensor.shape[0], -1, dim).float()
        a, b = heads[..., :width].chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin, heads[..., width:]], -1)
        out.copy_(turned.reshape(out.shape))


def scatter_check(
    key: Tensor, keys: Tensor, slots: Tensor, value: Tensor, values: Tensor,
    compress: object, offsets: None, lengths: None, mode: str, scatter_mode: str,
    strides: list[int] | None, starts: list[int] | None,
) -> None:  # fmt: skip
    need(mode == "Norm", "cache_mode must be Norm, not the default", mode)
    need_absent(compress_lens=compress, compress_seq_offsets=offsets, seq_lens=lengths)
    need_dtype("slot_mapping", slots, *INDICES)
    need_shape("slot_mapping", slots, key.shape[0])
    need_shape("value_cache", values, *keys.shape[:3], values.shape[-1])
    for name, tensor, cache in (("key", key, keys), ("value", value, values)):
        need(tensor.dtype == cache.dtype, f"{name} must be of its cache's dtype", tensor.dtype)
        need(tensor.dim() == 3, f"{name} must be [t, heads, dim]", list(tensor.shape))
        need(cache.dim() == 4, f"{name}_cache must be [pages, size, heads, dim]", cache.dim())
        need_shape(name, tensor, slots.shape[0], *cache.shape[2:])
        need(tensor.stride(-1) == 1, f"{name} must have contiguous heads", tensor.stride())
        need(cache.is_contiguous(), f"{name}_cache must be contiguous", cache.stride())


@kernel("aclnnScatterPaKvCache", "ttttttttssII", scatter_check)
def scatter(
    key: Tensor, keys: Tensor, slots: Tensor, value: Tensor, values: Tensor,
    compress: object, offsets: None, lengths: None, mode: str, scatter_mode: str,
    strides: list[int] | None, starts: list[int] | None,
) -> None:  # fmt: skip
    """cache[slot // size, slot % size] = row. Rows of page 0, which is scratch, may meet."""
    size = keys.shape[1]
    need_range("slot_mapping", slots, keys.shape[0] * size)
    kept = slots[slots >= size]
    need(kept.unique().numel() == kept.numel(), "slots must be distinct", slots.tolist())
    page, place = slots.long() // size, slots.long() % size
    keys[page, place] = key
    values[page, place] = value
