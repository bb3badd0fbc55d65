"""Ranks of a job find each other: torch.distributed, with gloo on CPUs and HCCL on NPUs."""

from datetime import timedelta
from itertools import product

from qnext.errors import InputError
from qnext.functional.mesh import CONTROL, EP, TP, Mesh


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
    for axis in (TP, EP):
        every = {tuple(Mesh(tp, dp, ep, rank).peers(axis)) for rank in range(size)}
        # all ranks of the job make all groups together, also those that they are not in
        for mesh, peers in product(range(world // size), sorted(every)):
            group = dist.new_group([mesh * size + rank for rank in peers])
            if mesh == mine and number % size in peers and len(peers) > 1:
                groups[axis] = group.group_name
    for mesh in range(world // size):
        # what follows from a request may be long in coming
        ranks, patience = range(mesh * size, (mesh + 1) * size), timedelta(days=3650)
        group = dist.new_group([*ranks], backend="gloo", timeout=patience)
        if mesh == mine:
            groups[CONTROL] = group.group_name
    return Mesh(tp, dp, ep, number % size, tuple(groups.items()), whole)
