"""Ranks of a job find each other: torch.distributed, with gloo on CPUs and HCCL on NPUs."""

from datetime import timedelta
from itertools import product
from typing import Any

from qnext.errors import InputError
from qnext.functional.mesh import ALL, CONTROL, EP, LEADERS, TP, Mesh


def join(
    tp: int = 1, dp: int = 1, ep: int = 0, *, whole: tuple[str, ...] = (), backend: str = "gloo"
) -> Mesh:
    """This process's place in a mesh, with process groups for it; every rank calls it alike.

    The job is torchrun's, unless torch.distributed was initialised before. Of more ranks than
    dp * tp each so many in a row are a mesh of their own. Raises InputError for a job of a size
    that does not fit.
    """
    from torch import distributed as dist

    if not dist.is_initialized():
        dist.init_process_group(backend)
    world, number = dist.get_world_size(), dist.get_rank()
    size = Mesh(tp, dp, ep).ranks
    if world % size:
        raise InputError(
            f"tp = {tp} times dp = {dp} takes {size} ranks, this job has {world}: "
            f"torchrun --nproc-per-node {size}"
        )
    mine, groups = number // size, dict[str, str]()
    ours = [Mesh(tp, dp, ep, rank) for rank in range(size)]
    heads = tuple(range(0, size, tp))
    # what follows from a request may be long in coming
    patience = {"backend": "gloo", "timeout": timedelta(days=3650)}
    kinds: list[tuple[str, set[tuple[int, ...]], dict[str, Any]]] = [
        *((axis, {tuple(mesh.peers(axis)) for mesh in ours}, {}) for axis in (TP, EP)),
        (CONTROL, {tuple(mesh.peers(TP)) for mesh in ours}, patience),
        (LEADERS, {heads}, patience),
        (ALL, {tuple(range(size))}, patience),
    ]
    for name, every, how in kinds:
        # all ranks of the job make all groups together, also those that they are not in
        for mesh, peers in product(range(world // size), sorted(every)):
            if len(peers) == 1:
                continue
            group = dist.new_group([mesh * size + rank for rank in peers], **how)
            if mesh == mine and number % size in peers:
                groups[name] = group.group_name
    return Mesh(tp, dp, ep, number % size, tuple(groups.items()), whole)
