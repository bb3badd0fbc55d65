"""Mooncake's transfer engine as a transport: `tcp` anywhere, `ascend` with the NPU build.

github.com/kvcache-ai/Mooncake, docs/python-api-reference/transfer-engine.md. The engine's calls
cannot be given up: one to a frozen peer returns after 30 seconds (MC_TCP_PROGRESS_TIMEOUT_SEC), so
each runs in a thread that is left alone when the deadline comes.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from qnext.errors import QnextError
from qnext.handoff.transport import (
    Copy,
    TransportError,
    check_copies,
    check_pool,
    check_targets,
)

BELL = 64  # first bytes of a pool, which notices write to: a message comes with a transfer only
NAME = "qnext"


class MooncakeTransport:
    """A transport for other processes and machines; raises QnextError where Mooncake cannot start.

    host: this machine's name or address as others reach it; on Ascend no loopback address. The
    pool's first 64 bytes are Mooncake's: `BELL`.
    """

    def __init__(self, pool: Tensor, host: str = "127.0.0.1", protocol: str = "tcp") -> None:
        check_pool(pool)
        try:
            from mooncake.engine import TransferEngine, TransferNotify, TransferOpcode
        except ImportError as error:
            raise QnextError(
                f"mooncake cannot be imported ({error}): pip install 'qnext[pd]', and on Debian "
                "apt install libibverbs1"
            ) from None
        self._engine: Any = TransferEngine()
        self._notice, self._write = TransferNotify, TransferOpcode.Write
        if self._engine.initialize(host, "P2PHANDSHAKE", protocol, ""):
            raise QnextError(f"mooncake cannot listen on {host} by {protocol!r}")
        self.pool, self._base = pool, pool.data_ptr()
        if self._engine.register_memory(self._base, pool.numel()):
            raise QnextError(f"mooncake cannot register a pool of {pool.numel()} bytes")
        session = f"{host}:{self._engine.get_rpc_port()}"
        self.address = f"mooncake:{session}/{self._base}+{pool.numel()}"
        self._lock, self._closed = threading.Lock(), False

    def write(self, peer: str, copies: Sequence[Copy], seconds: float) -> None:
        check_copies(copies, self.pool.numel())
        session, base, nbytes = _parts(peer)
        check_targets(copies, peer, nbytes)
        given = (
            [self._base + copy.source for copy in copies],
            [base + copy.target for copy in copies],
            [copy.nbytes for copy in copies],
        )
        call = self._engine.batch_transfer_sync_write
        self._within(peer, seconds, lambda: call(session, *given))

    def notify(self, peer: str, message: str, seconds: float) -> None:
        session, base, _ = _parts(peer)
        notice, call = self._notice(NAME, message), self._engine.transfer_sync
        given = (session, self._base, base, BELL, self._write, notice)
        self._within(peer, seconds, lambda: call(*given))

    def notices(self) -> list[str]:
        return [notice.msg for notice in self._engine.get_notifies() if notice.name == NAME]

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._engine.unregister_memory(self._base)

    def _within(self, peer: str, seconds: float, call: Callable[[], int]) -> None:
        if self._closed:
            raise TransportError(peer, "this transport is closed")
        done: Future[int] = Future()

        def run() -> None:
            try:
                done.set_result(call())
            except Exception as error:
                done.set_exception(error)

        threading.Thread(target=run, name="qnext-mooncake", daemon=True).start()
        try:
            status = done.result(seconds)
        except TimeoutError:
            raise TransportError(peer, f"it did not take it within {seconds:g} s") from None
        if status:
            raise TransportError(peer, f"the transfer failed ({status})")


def _parts(address: str) -> tuple[str, int, int]:
    """(session, where its pool begins, bytes of the pool) of an address."""
    kind, _, rest = address.partition(":")
    session, _, memory = rest.rpartition("/")
    base, _, nbytes = memory.partition("+")
    if kind != "mooncake" or not session or not base.isdigit() or not nbytes.isdigit():
        raise TransportError(address, "it is no address of a mooncake transport")
    return session, int(base), int(nbytes)
