"""Regions of a pool: who has which bytes of it."""

from threading import Lock

from qnext.handoff.layout import aligned


class Regions:
    """Gives out pieces of `first` .. `nbytes` of a pool, the lowest that is free; for threads."""

    def __init__(self, nbytes: int, first: int = 0) -> None:
        self._lock = Lock()
        self._first, self._end = aligned(first), nbytes
        self._taken: dict[int, int] = {}  # begin -> end

    def take(self, nbytes: int) -> int | None:
        """Where a free piece of so many bytes begins; None where there is none."""
        with self._lock:
            begin = self._first
            for taken, end in sorted(self._taken.items()):
                if taken - begin >= nbytes:
                    break
                begin = aligned(end)
            if begin + nbytes > self._end:
                return None
            self._taken[begin] = begin + nbytes
            return begin

    def give_back(self, begin: int) -> None:
        """A piece is free again."""
        with self._lock:
            del self._taken[begin]

    @property
    def taken(self) -> int:
        """Bytes that are given out."""
        with self._lock:
            return sum(end - begin for begin, end in self._taken.items())
