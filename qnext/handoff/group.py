"""torch.distributed as a transport: gloo for memory of the host, HCCL for an NPU's.

Both send from one end and receive at the other, so each transport has threads that receive: one
waits for others to connect, at a store of its own, and each pair is a process group of two with a
thread that puts what arrives where its header says. A pair that failed is left; the next call
makes another.
"""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qnext.errors import QnextError
from qnext.handoff.transport import Copy, TransportError, check_copies, check_pool

WRITE, NOTIFY = 1, 2
END = b"\n"  # of a message: no tensor is empty
POLL = 0.02  # seconds between looks for who wants to connect
IDLE = timedelta(days=365)  # a pair may rest so long
Connect: TypeAlias = Callable[[Any, int, timedelta], Any]  # store, rank of two, timeout -> group


def gloo(host: str) -> Connect:
    """Groups over TCP, by the interface that `host` names."""
    from torch.distributed import ProcessGroupGloo

    group: Any = ProcessGroupGloo

    def connect(store: Any, rank: int, timeout: timedelta) -> Any:
        options = group._Options()
        options._timeout = timeout
        options._devices = [group.create_device(hostname=host)]
        return group(store, rank, 2, options)

    return connect


def hccl(host: str) -> Connect:
    """Groups over the NPUs' own links; the store alone uses `host`."""
    from torch_npu._C._distributed_c10d import ProcessGroupHCCL

    def connect(store: Any, rank: int, timeout: timedelta) -> Any:
        options = ProcessGroupHCCL.Options()
        options._timeout = timeout
        return ProcessGroupHCCL(store, rank, 2, options)

    return connect


class GroupTransport:
    """A transport for other processes and machines; raises QnextError where it cannot listen.

    host: this machine's name or address as others reach it. connect: what makes a group; by default
    what suits the pool's device.
    """

    def __init__(
        self, pool: Tensor, host: str = "127.0.0.1", port: int = 0, connect: Connect | None = None
    ) -> None:
        from torch.distributed import DistNetworkError, TCPStore

        check_pool(pool)
        self.pool = pool
        self._connect = connect or (gloo if pool.device.type == "cpu" else hccl)(host)
        try:
            self._store = TCPStore(host, port, is_master=True, wait_for_workers=False)
        except DistNetworkError as error:
            raise QnextError(f"nothing can listen at {host}:{port}: {error}") from None
        self.address = f"group:{host}:{self._store.port}"
        self._notices: deque[str] = deque()
        self._pairs: dict[str, _Pair] = {}
        self._groups: list[Any] = []  # that receive
        self._lock, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._accept, name="qnext-accept", daemon=True).start()

    def write(self, peer: str, copies: Sequence[Copy], seconds: float) -> None:
        check_copies(copies, self.pool.numel())
        pieces = [self.pool[c.source : c.source + c.nbytes] for c in copies]
        table = torch.tensor([(c.target, c.nbytes) for c in copies], dtype=torch.int64)
        self._send(peer, WRITE, table, pieces, seconds)

    def notify(self, peer: str, message: str, seconds: float) -> None:
        text = torch.frombuffer(bytearray(message.encode() + END), dtype=torch.uint8)
        table = torch.tensor([(0, text.numel())], dtype=torch.int64)
        self._send(peer, NOTIFY, table, [text.to(self.pool.device)], seconds)

    def notices(self) -> list[str]:
        return [self._notices.popleft() for _ in range(len(self._notices))]

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            groups = [pair.group for pair in self._pairs.values() if pair.group]
            groups, self._groups = groups + self._groups, []
            self._pairs = {}
        for group in groups:
            group.abort()

    # ---- sending

    def _send(
        self, peer: str, kind: int, table: Tensor, pieces: Sequence[Tensor], seconds: float
    ) -> None:
        until = time.monotonic() + seconds
        if self._closed.is_set():
            raise TransportError(peer, "this transport is closed")
        with self._lock:
            pair = self._pairs.setdefault(peer, _Pair())
        if not pair.lock.acquire(timeout=seconds):
            raise TransportError(peer, f"others have kept it busy for {seconds:g} s")
        try:
            if pair.group is None:
                pair.group = self._reach(peer, until)
            status = pair.exchange(kind, table, pieces, until, self.pool.device)
        except RuntimeError as error:  # whatever went wrong, the pair is of no more use
            with self._lock:
                self._pairs.pop(peer, None)
            raise TransportError(peer, str(error).splitlines()[0]) from None
        finally:
            pair.lock.release()
        if status:
            raise TransportError(peer, "bytes were to go beyond the pool there")

    def _reach(self, peer: str, until: float) -> Any:
        from torch.distributed import PrefixStore, TCPStore

        kind, _, place = peer.partition(":")
        host, _, port = place.rpartition(":")
        if kind != "group" or not host or not port.isdigit():
            raise TransportError(peer, "it is no address of a group transport")
        try:  # a store would try again and again
            socket.create_connection((host, int(port)), _left(until).total_seconds()).close()
        except OSError as error:
            raise TransportError(peer, str(error)) from None
        store = TCPStore(host, int(port), is_master=False, timeout=_left(until))
        number = store.add("pairs", 1)
        return self._connect(PrefixStore(f"pair {number}", store), 1, _left(until))

    # ---- receiving

    def _accept(self) -> None:
        from torch.distributed import PrefixStore, TCPStore

        host, _, port = self.address.removeprefix("group:").rpartition(":")
        store, known = TCPStore(host, int(port), is_master=False), 0
        while not self._closed.wait(POLL):
            while known < store.add("pairs", 0):
                known += 1
                pair = PrefixStore(f"pair {known}", store)
                receive = threading.Thread(target=self._receive, args=(pair,), daemon=True)
                receive.start()

    def _receive(self, store: Any) -> None:
        group = None
        try:
            group = self._connect(store, 0, IDLE)
            with self._lock:
                self._groups.append(group)
            while not self._closed.is_set():
                self._take(group)
        except RuntimeError:  # the sender ended, or gave up; it connects anew
            with self._lock:
                if group in self._groups:
                    self._groups.remove(group)

    def _take(self, group: Any) -> None:
        device = self.pool.device
        head = torch.zeros(2, dtype=torch.int64, device=device)
        group.recv([head], 1, 0).wait()
        kind, count = head.tolist()
        table = torch.zeros(count, 2, dtype=torch.int64, device=device)
        group.recv([table], 1, 0).wait()
        places: list[tuple[int, int]] = table.tolist()
        inside = all(0 <= at <= at + n <= self.pool.numel() for at, n in places)
        fresh = kind == NOTIFY or not inside  # bytes that do not go to the pool
        got = [
            torch.empty(n, dtype=torch.uint8, device=device) if fresh else self.pool[at : at + n]
            for at, n in places
        ]
        for piece in got:
            group.recv([piece], 1, 0).wait()
        if kind == NOTIFY:
            self._notices.append(bytes(got[0].tolist()).removesuffix(END).decode())
        wrong = kind == WRITE and not inside
        group.send([torch.tensor([int(wrong)], device=device)], 1, 0).wait()


class _Pair:
    """A connection to a peer, for one sender at a time."""

    def __init__(self) -> None:
        self.group: Any = None
        self.lock = threading.Lock()

    def exchange(
        self,
        kind: int,
        table: Tensor,
        pieces: Sequence[Tensor],
        until: float,
        device: torch.device,
    ) -> int:
        """Send a header, a table and bytes; the peer's answer, which tells that it has them."""
        head = torch.tensor([kind, len(table)], device=device)
        for part in (head, table.to(device), *pieces):
            self.group.send([part], 0, 0).wait(_left(until))
        answer = torch.zeros(1, dtype=torch.int64, device=device)
        self.group.recv([answer], 0, 0).wait(_left(until))
        return int(answer)


def _left(until: float) -> timedelta:
    return timedelta(seconds=max(until - time.monotonic(), 0.001))
