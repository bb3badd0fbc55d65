"""Grouped-query attention over pages, and the write of keys and values into them."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qnext.functional.ops.primitive import primitive
from qnext.functional.ops.tolerance import EXACT, SUMS, randn


def _pools(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return randn(g, 7, 4, 6, 10), randn(g, 7, 4, 6, 10)


def _write_samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    key_pool, value_pool = _pools(g)
    yield {
        "key_pool": key_pool,
        "value_pool": value_pool,
        "key": randn(g, 3, 5, 6, 10),
        "value": randn(g, 3, 5, 6, 10),
        "index": torch.randperm(24, generator=g)[:15].view(3, 5) + 4,
    }


@primitive(
    shapes=lambda *, key_pool, value_pool, **_: (
        torch.empty_like(key_pool),
        torch.empty_like(value_pool),
    ),
    flops=lambda **_: 0,
    # in place, only the written rows move; a functional copy of the pool is the lowering's failure
    bytes=lambda *, key, value, index, **_: 2 * (key.nbytes + value.nbytes) + index.nbytes,
    tolerance=EXACT,
    samples=_write_samples,
)
def kv_write(
    *,
    key_pool: Float[Tensor, "pages page hkv hd"],
    value_pool: Float[Tensor, "pages page hkv hd"],
    key: Float[Tensor, "batch seq hkv hd"],
    value: Float[Tensor, "batch seq hkv hd"],
    index: Int[Tensor, "batch seq"],
) -> tuple[Float[Tensor, "pages page hkv hd"], Float[Tensor, "pages page hkv hd"]]:
    """The pools with row `index` (page * page size + offset) replaced; padding has index 0."""

    def write(pool: Tensor, new: Tensor) -> Tensor:
        flat = pool.flatten(0, 1).index_put((index.long(),), new.to(pool.dtype))
        return flat.view_as(pool)

    return write(key_pool, key), write(value_pool, value)


def _attention_samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    key_pool, value_pool = _pools(g)
    table = torch.tensor([[3, 5], [1, 6], [2, 0]], dtype=torch.int32)
    starts = torch.tensor([[2], [0], [1]])
    yield {
        "query": randn(g, 3, 5, 12, 10),
        "key_pool": key_pool,
        "value_pool": value_pool,
        "block_table": table,
        "position": starts + torch.arange(5),
        "context": torch.tensor([7, 5, 4]),  # the third row's last two queries are padding
        "scale": 10**-0.5,
    }


def _visited(*, key_pool: Tensor, block_table: Tensor, **_: Any) -> int:
    """Tokens of all sequences together, as far as shapes can tell: every page full."""
    return block_table.numel() * key_pool.shape[1]


@primitive(
    shapes=lambda *, query, **_: torch.empty_like(query),
    flops=lambda *, query, **rest: (
        4 * query.numel() * _visited(**rest) // rest["block_table"].shape[0]
    ),
    bytes=lambda *, query, key_pool, **rest: (
        2 * query.nbytes
        + 2 * _visited(key_pool=key_pool, **rest) * key_pool[0, 0].numel() * key_pool.itemsize
    ),
    tolerance=SUMS,
    samples=_attention_samples,
)
def attention(
    *,
    query: Float[Tensor, "batch seq hq hd"],
    key_pool: Float[Tensor, "pages page hkv hd"],
    value_pool: Float[Tensor, "pages page hkv hd"],
    block_table: Int[Tensor, "batch max_pages"],
    position: Int[Tensor, "batch seq"],
    context: Int[Tensor, " batch"],
    scale: float,
) -> Float[Tensor, "batch seq hq hd"]:
    """Causal softmax(q k^T * scale) v; a query sees positions <= its own that are < context.

    Queries at or beyond their context are padding: their result is 0. Query head h reads key head
    h // (hq / hkv). What pools hold outside the context is never touched, not even times zero.
    """
    page = key_pool.shape[1]
    seen = torch.arange(max(int(context.max()), 1), device=query.device)
    # clamped to the context: a masked NaN would still poison the sum
    index = torch.minimum(seen, (context[:, None] - 1).clamp(min=0))
    rows = block_table.long().gather(1, index // page) * page + index % page
    key = key_pool.flatten(0, 1)[rows].transpose(1, 2).to(query.dtype)
    value = value_pool.flatten(0, 1)[rows].transpose(1, 2).to(query.dtype)
    if int(context.min()) == 0:  # without context even position 0 is nobody's
        some = (context > 0)[:, None, None, None]
        key, value = key.where(some, 0), value.where(some, 0)
    visible = (seen <= position[..., None]) & (seen < context[:, None, None])
    out = scaled_dot_product_attention(
        query.transpose(1, 2), key, value, visible[:, None], scale=scale, enable_gqa=True
    )
    valid = position < context[:, None]
    return out.transpose(1, 2).where(valid[..., None, None], 0)
