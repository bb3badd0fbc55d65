"""Tokens to the ranks of their experts, and back (op-plugin npu_moe_distribute_*_v2)."""

from typing import Any

import torch
from torch import Tensor

from qnext.lowering.softnpu.bridge import (
    CAPABILITIES,
    kernel,
    need,
    need_absent,
    need_dtype,
    need_shape,
    option,
    poison,
)
from qnext.lowering.softnpu.hccl import COMMUNICATORS, Communicator
from qnext.lowering.softnpu.kernels.elementwise import write
from qnext.lowering.softnpu.kernels.quant import per_token

NOTE = 128
RELAYS = (16, 32, 64)
SOURCE, TOKEN, CHOICE = range(3)  # what is noted of a row


def _relays() -> bool:
    return option("soc").startswith("Ascend910B")


def _group(name: str, ranks: int, rank: int) -> Communicator:
    need(name in COMMUNICATORS, "group_ep must be the name of a communicator", name)
    group = COMMUNICATORS[name]
    need((group.ranks, group.rank) == (ranks, rank), "its ranks and this one", (ranks, rank))
    return group


def _check_place(x: Tensor, expert: Tensor, ranks: int, count: int, algorithm: str) -> None:
    need_dtype("x", x, torch.bfloat16, torch.float16)
    need_dtype("expert_ids", expert, torch.int32)
    width = x.shape[-1]
    if _relays():
        few = CAPABILITIES["few_relays"]
        need(few or ranks in RELAYS, "ep_world_size must be 16, 32 or 64 here", ranks)
        need(width % 32 == 0 and width <= 7168, "h must be a multiple of 32 up to 7168", width)
        need(algorithm == "hierarchy", 'comm_alg must be "hierarchy" here', algorithm)
    else:
        need(2 <= ranks <= 384, "ep_world_size must be 2..384", ranks)
        need(1024 <= width <= 7168, "h must be 1024..7168", width)
        need(algorithm in ("", "fullmesh_v1", "0"), "comm_alg must be absent here", algorithm)
    most = 256 if _relays() else 512
    need(1 <= expert.shape[0] <= most, f"1..{most} tokens", expert.shape[0])
    need(1 <= expert.shape[1] <= 16, "1..16 choices a token", expert.shape[1])
    need(count % ranks == 0 and count <= 512, "as many experts a rank, at most 512", count)


def dispatch_check(
    x: Tensor, expert: Tensor, smooth: object, active: object, weight: Tensor | None,
    elastic: object, timing: object, group: str, ranks: int, rank: int, count: int,
    group_tp: str, ranks_tp: int, rank_tp: int, shard: int, shared: int, shared_ranks: int,
    quant: int, total: int, kind: int, algorithm: str, zero: int, copy: int, constant: int,
    rows: Tensor, scale: Tensor, info: Tensor, counts: Tensor, received: Tensor, tp: Tensor,
    weights: Tensor,
) -> None:  # fmt: skip
    _check_place(x, expert, ranks, count, algorithm)
    need_absent(smooth=smooth, active=active, group_tp=group_tp, shared_ranks=shared_ranks)
    need_absent(elastic=elastic, timing=timing, zero=zero, copy=copy, constant=constant)
    need(quant in (0, 2) and kind == 1, "quant_mode 0 or 2, counts of kind 1", (quant, kind))
    need(total in (0, ranks * x.shape[0]), "global_bs must be that of even ranks", total)
    known = weight is not None and weight.numel() > 0
    need(known == _relays(), "expert_scales are for the A2, and only for it", known)
    if weight is not None and known:
        need_dtype("expert_scales", weight, torch.float32)
    own = count // ranks
    most = ranks * x.shape[0] * min(own, expert.shape[1])
    need_shape("expand_x", rows, most, x.shape[1])
    need(info.numel() >= most * NOTE, "room for notes", info.numel())


@kernel(
    "aclnnMoeDistributeDispatchV4", "t" * 7 + "siiis" + "i" * 8 + "siii" + "t" * 7, dispatch_check
)
def dispatch(
    x: Tensor, expert: Tensor, smooth: object, active: object, weight: Tensor | None,
    elastic: object, timing: object, group: str, ranks: int, rank: int, count: int,
    group_tp: str, ranks_tp: int, rank_tp: int, shard: int, shared: int, shared_ranks: int,
    quant: int, total: int, kind: int, algorithm: str, zero: int, copy: int, constant: int,
    rows: Tensor, scale: Tensor, info: Tensor, counts: Tensor, received: Tensor, tp: Tensor,
    weights: Tensor,
) -> None:  # fmt: skip
    """Rows that came, sorted by expert, then by the rank they are from. The rest is undefined."""
    to = _group(group, ranks, rank)
    own = count // ranks
    need(int(expert.min()) >= 0 and int(expert.max()) < count, f"experts 0..{count - 1}", expert)
    need(bool((expert.sort(-1).values.diff(dim=-1) > 0).all()), "a token's experts differ", expert)
    chosen = torch.stack(to.every(expert.long())) - rank * own  # [ranks, tokens, topk]
    mine = ((chosen >= 0) & (chosen < own)).nonzero()  # by rank, then token, then choice
    local = chosen[tuple(mine.T)]
    order = local.argsort(stable=True)
    mine, local = mine[order], local[order]
    poison(rows, info, received, weights)
    came = len(mine)
    if quant:
        poison(scale)
        q, q_scale = per_token(x.float())
        rows[:came] = torch.stack(to.every(q))[mine[:, SOURCE], mine[:, TOKEN]]
        scale[:came] = torch.stack(to.every(q_scale))[mine[:, SOURCE], mine[:, TOKEN]]
    else:
        rows[:came] = torch.stack(to.every(x))[mine[:, SOURCE], mine[:, TOKEN]]
    info.view(-1, NOTE)[:came, :3] = mine.int()
    write(counts, local.bincount(minlength=own))
    cells = (local * ranks + mine[:, SOURCE]).bincount(minlength=own * ranks)
    write(received[: own * ranks], cells.cumsum(0))
    if weight is not None and weight.numel():
        weights[:came] = torch.stack(to.every(weight))[tuple(mine.T)]


def combine_check(
    rows: Tensor, expert: Tensor, info: Tensor, received: Tensor, weight: Tensor, tp: object,
    active: object, activation: object, weight_scale: object, groups: object, weights: object,
    shared_x: object, elastic: object, original: object, alpha_1: object, alpha_2: object,
    constants: object, timing: object, group: str, ranks: int, rank: int, count: int,
    group_tp: str, ranks_tp: int, rank_tp: int, shard: int, shared: int, shared_ranks: int,
    total: int, out_dtype: int, quant: int, list_type: int, algorithm: str, zero: int, copy: int,
    constant: int, out: Tensor,
) -> None:  # fmt: skip
    _check_place(rows, expert, ranks, count, algorithm)
    need_absent(tp=tp, active=active, shared_x=shared_x, group_tp=group_tp, quant=quant)
    need_absent(elastic=elastic, original=original, zero=zero, copy=copy, constant=constant)
    need_dtype("expert_scales", weight, torch.float32)
    known = isinstance(weights, Tensor) and weights.numel() > 0
    need(known == _relays(), "expand_scales are for the A2, and only for it", known)
    need_shape("out", out, expert.shape[0], rows.shape[1])


@kernel("aclnnMoeDistributeCombineV4", "t" * 18 + "siiis" + "i" * 9 + "siiit", combine_check)
def combine(
    rows: Tensor, expert: Tensor, info: Tensor, received: Tensor, weight: Tensor, tp: object,
    active: object, activation: object, weight_scale: object, groups: object, weights: object,
    shared_x: object, elastic: object, original: object, alpha_1: object, alpha_2: object,
    constants: object, timing: object, group: str, ranks: int, rank: int, count: int,
    group_tp: str, ranks_tp: int, rank_tp: int, shard: int, shared: int, shared_ranks: int,
    total: int, out_dtype: int, quant: int, list_type: int, algorithm: str, zero: int, copy: int,
    constant: int, out: Tensor,
) -> None:  # fmt: skip
    """Each token's weighted sum in float32, in the order of its choices."""
    to = _group(group, ranks, rank)
    came = received[count // ranks * ranks - 1].clone()
    notes = info.view(-1, NOTE)[:, :3].contiguous()
    back = torch.full((*expert.shape, rows.shape[1]), torch.nan)
    every: zip[Any] = zip(to.every(came), to.every(notes), to.every(rows), strict=True)
    for number, note, row in every:
        note, row = note[: int(number)].long(), row[: int(number)].float()
        here = note[:, SOURCE] == rank
        back[note[here, TOKEN], note[here, CHOICE]] = row[here]
    write(out, (back * weight[..., None]).sum(1))
