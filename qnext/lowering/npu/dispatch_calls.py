"""The torch_npu calls by which tokens travel to their experts and back. Pages: op-plugin's.

Both run on one process group, which the pages want for these calls alone. What `dispatch` notes
for `combine` means nothing to anybody else, and its values differ between releases.
"""

from typing import Any

import torch
from torch import Tensor

from qnext.functional.tree import process_group
from qnext.lowering.calls import call

QUANTISED = 2  # quant_mode: int8 tokens, a scale each, by 127 / max as npu_dynamic_quant makes them
SERVER = 8  # ranks of a server, as the A2 counts them in what it notes
NOTE = 128  # numbers that are noted for a row


def _npu() -> Any:
    import torch_npu

    return torch_npu


def came(*, expert: Tensor, size: int, experts: int) -> int:
    """Rows that may come: as if every rank sent each of its choices here."""
    tokens, topk = expert.shape
    return size * tokens * min(topk, experts // size)


def _notes(
    *, x: Tensor, expert: Tensor, size: int, experts: int, relayed: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, (tokens, topk) = came(expert=expert, size=size, experts=experts), expert.shape
    known = experts + 2 * size * tokens * topk * (size // SERVER) if relayed else experts
    return (
        x.new_empty(experts // size, dtype=torch.int64),
        x.new_empty(rows * NOTE, dtype=torch.int32),
        x.new_empty(known, dtype=torch.int32),
        x.new_empty(rows if relayed else 0, dtype=torch.float32),
    )


def _rows(*, x: Tensor, dtype: torch.dtype | None = None, **given: Any) -> Tensor:
    rows = came(expert=given["expert"], size=given["size"], experts=given["experts"])
    return x.new_empty(rows, x.shape[1], dtype=dtype or x.dtype)


def _moved(*, x: Tensor, expert: Tensor, **_: Any) -> int:
    """Bytes that a balanced dispatch reads and writes: a row for each choice, in and out."""
    return x.nbytes + expert.nbytes + expert.numel() * x[:1].nbytes


def _sent(
    x: Tensor, expert: Tensor, weight: Tensor, relayed: bool, quant: int, **where: Any
) -> Any:
    how = {"expert_scales": weight, "comm_alg": "hierarchy"} if relayed else {}
    return _npu().npu_moe_distribute_dispatch_v2(
        x, expert, *_place(**where), expert_token_nums_type=1, quant_mode=quant, **how
    )


def _place(*, group: str, size: int, rank: int, experts: int) -> tuple[str, int, int, int]:
    """(the name of HCCL's communicator, ranks, this one, experts), as both calls take them."""
    known = process_group(group)._get_backend(torch.device("npu"))
    return known.get_hccl_comm_name(rank), size, rank, experts


@call(
    "npu_moe_distribute_dispatch_v2",
    shapes=lambda **given: (_rows(**given), *_notes(**given)),
    bytes=_moved,
    collective=True,
)
def npu_dispatch(
    *,
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    group: str,
    size: int,
    rank: int,
    experts: int,
    relayed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(rows, rows of each expert, and three notes for `npu_combine`): rows that came, by expert.

    x [tokens, d], expert [tokens, topk] int32, weight [tokens, topk] float32. relayed: as the A2
    does it, over ranks of one number in other servers, which takes the weights along.
    """
    where = {"group": group, "size": size, "rank": rank, "experts": experts}
    rows, _, info, counts, received, _, scales = _sent(x, expert, weight, relayed, 0, **where)
    return rows, counts, info, received, scales if relayed else weight.new_empty(0)


@call(
    "npu_moe_distribute_dispatch_v2",
    shapes=lambda **given: (
        (rows := _rows(dtype=torch.int8, **given)),
        rows.new_empty(rows.shape[0], dtype=torch.float32),
        *_notes(**given),
    ),
    flops=lambda *, x, **_: 4 * x.numel(),
    bytes=_moved,
    collective=True,
)
def npu_dispatch_quant(
    *,
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    group: str,
    size: int,
    rank: int,
    experts: int,
    relayed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same with int8 tokens, and their scales after them; half the bytes travel."""
    where = {"group": group, "size": size, "rank": rank, "experts": experts}
    rows, scale, info, counts, received, _, scales = _sent(
        x, expert, weight, relayed, QUANTISED, **where
    )
    return rows, scale, counts, info, received, scales if relayed else weight.new_empty(0)


@call(
    "npu_moe_distribute_combine_v2",
    shapes=lambda *, rows, expert, **_: rows.new_empty(expert.shape[0], rows.shape[1]),
    flops=lambda *, rows, expert, **_: 2 * expert.numel() * rows.shape[1],
    bytes=lambda *, rows, expert, **_: (2 * expert.numel() + expert.shape[0]) * rows[:1].nbytes,
    collective=True,
)
def npu_combine(
    *,
    rows: Tensor,
    expert: Tensor,
    weight: Tensor,
    info: Tensor,
    received: Tensor,
    scales: Tensor,
    group: str,
    size: int,
    rank: int,
    experts: int,
    relayed: bool,
) -> Tensor:
    """Each token's weighted sum [tokens, d] of what was made of its rows, in float32."""
    how = {"expand_scales": scales, "comm_alg": "hierarchy"} if relayed else {}
    place = _place(group=group, size=size, rank=rank, experts=experts)
    return _npu().npu_moe_distribute_combine_v2(rows, expert, info, received, weight, *place, **how)
