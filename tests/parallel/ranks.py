"""Four processes that are ranks of one job, for tests that run functions in all of them."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WORLD = 4
SECONDS = 240.0


class Ranks:
    """Processes that wait for functions to run; `store` is a file by which they find each other."""

    def __init__(self, store: Path, world: int = WORLD, backend: str = "gloo") -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(world):
            mine, theirs = context.Pipe()
            given = (theirs, store, rank, world, backend)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function of a module returns in each rank; raises what any of them raised."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(SECONDS):
                raise TimeoutError(f"rank {rank} has no result of {function.__name__}")
            results.append(pipe.recv())
        failed = [f"rank {rank}: {told}" for rank, (good, told) in enumerate(results) if not good]
        if failed:
            raise AssertionError("\n".join(failed))
        return [told for _, told in results]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, store: Path, rank: int, world: int, backend: str) -> None:
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    os.nice(1)
    if backend == "hccl":
        import torch_npu  # noqa: F401
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
