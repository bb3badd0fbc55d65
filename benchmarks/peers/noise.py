"""How much of the machine other processes use, before and while something is measured."""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

STAT = Path("/proc/stat")
QUIET = 0.08  # of the machine, that others may use before a run
CLEAN = 0.06  # and during one
SLACK = 3  # ticks that count for nothing: the kernel's counts are no finer
SAMPLE, WAIT = 2.0, 40.0  # seconds that are looked at, and that quiet is waited for at most
T = TypeVar("T")


class Counters(NamedTuple):
    """Ticks of all processors since the machine started."""

    busy: int
    total: int


def counters(text: str) -> Counters:
    """Those of the text of /proc/stat; what a hypervisor took counts as busy."""
    user, nice, system, idle, wait, irq, soft, steal = (int(w) for w in text.split()[1:9])
    busy = user + nice + system + irq + soft + steal
    return Counters(busy, busy + idle + wait)


def share(before: Counters, after: Counters, own: float = 0.0) -> float:
    """The share of the machine that others used, where `own` ticks were ours."""
    others = after.busy - before.busy - own
    return max(0.0, others - SLACK) / max(1, after.total - before.total)


def is_clean(others: float | None) -> bool:
    """Whether a run counts; where nothing can be told of others, it does."""
    return others is None or others <= CLEAN


def read() -> Counters | None:
    """None on machines that have no such file."""
    return counters(STAT.read_text()) if STAT.exists() else None


def wait_quiet() -> None:
    """Return when others are quiet, or after a while."""
    until = time.monotonic() + WAIT
    while (before := read()) is not None and time.monotonic() < until:
        time.sleep(SAMPLE)
        after = read()
        if after is not None and share(before, after) < QUIET:
            return


def watch(run: Callable[[], T]) -> tuple[T, float | None]:
    """What `run` returns, and the share of the machine that others used meanwhile."""
    before, used = read(), _used()
    result = run()
    after, own = read(), _used() - used
    if before is None or after is None:
        return result, None
    return result, share(before, after, own * os.sysconf("SC_CLK_TCK"))


def _used() -> float:
    """Seconds of processors that this process and its children took."""
    both = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)
