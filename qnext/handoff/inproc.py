"""Transports of one process, for whoever has both sides in it."""

from collections import deque
from collections.abc import Sequence
from itertools import count
from threading import Lock

from torch import Tensor

from qnext.handoff.transport import (
    Copy,
    TransportError,
    check_copies,
    check_pool,
    check_targets,
)


class Hub:
    """Where the transports of a process find each other."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.open: dict[str, InProcess] = {}
        self._numbers = count()

    def transport(self, pool: Tensor) -> "InProcess":
        """A transport that owns a pool; raises InputError unless it can be one."""
        check_pool(pool)
        made = InProcess(self, f"inproc:{next(self._numbers)}", pool)
        with self.lock:
            self.open[made.address] = made
        return made


class InProcess:
    """A transport whose peers are those of its hub."""

    def __init__(self, hub: Hub, address: str, pool: Tensor) -> None:
        self.pool, self.address = pool, address
        self._hub = hub
        self._notices: deque[str] = deque()

    def _peer(self, address: str) -> "InProcess":
        with self._hub.lock:
            if self.address not in self._hub.open:
                raise TransportError(address, "this transport is closed")
            peer = self._hub.open.get(address)
        if peer is None:
            raise TransportError(address, "there is no such transport, or it is closed")
        return peer

    def write(self, peer: str, copies: Sequence[Copy], seconds: float) -> None:
        check_copies(copies, self.pool.numel())
        target = self._peer(peer).pool
        check_targets(copies, peer, target.numel())
        for copy in copies:
            source = self.pool[copy.source : copy.source + copy.nbytes]
            target[copy.target : copy.target + copy.nbytes] = source

    def notify(self, peer: str, message: str, seconds: float) -> None:
        self._peer(peer)._notices.append(message)

    def notices(self) -> list[str]:
        return [self._notices.popleft() for _ in range(len(self._notices))]

    def close(self) -> None:
        with self._hub.lock:
            self._hub.open.pop(self.address, None)
