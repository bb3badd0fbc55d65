"""Bytes of one process's memory that become bytes of another's: what a hand-off asks of an engine.

A transport owns one pool, registered when it is made and never again: CANN allows a process 256
registrations. What is sent lies in the pool, what arrives comes to lie there.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from qnext.errors import InputError, QnextError


class TransportError(QnextError):
    """Bytes or a message that may not have arrived: the peer is dead, frozen, gone or too slow."""

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(f"nothing can be sent to {peer}: {why}")
        self.peer = peer


class Copy(NamedTuple):
    """Bytes of the pool here, and the place where they go in the pool there."""

    source: int
    target: int
    nbytes: int


@runtime_checkable
class Transport(Protocol):
    """Writes into others' pools and tells their owners; for several threads at once.

    pool: [n] bytes, uint8, where the engine can reach them. address: what others must know to write
    here, in the engine's own words; every transport has another one, also after a restart.

    A call takes `seconds` at the most and then raises TransportError, as it does where the peer is
    known to be gone. Bytes that it was sending may be read, and may arrive, some time longer: who
    writes anything else there must tell by what they hold whether it is whole.
    """

    pool: Tensor
    address: str

    def write(self, peer: str, copies: Sequence[Copy], seconds: float) -> None:
        """Copy bytes of this pool into the peer's; they are there when it returns."""
        ...

    def notify(self, peer: str, message: str, seconds: float) -> None:
        """Give the peer a message, which it gets after everything that was written before."""
        ...

    def notices(self) -> list[str]:
        """The messages that arrived since the last call, in the order of each sender."""
        ...

    def close(self) -> None:
        """End it: what others send from now on fails there."""
        ...


def check_pool(pool: Tensor) -> None:
    """Raise InputError unless a tensor can be a pool."""
    kind = f"{pool.dtype} {list(pool.shape)}"
    if pool.dtype != torch.uint8 or pool.ndim != 1 or not pool.is_contiguous() or not pool.numel():
        raise InputError(f"a pool must be bytes [n], uint8, that lie together, got {kind}")


def check_copies(copies: Sequence[Copy], nbytes: int) -> None:
    """Raise InputError unless all sources lie within a pool of so many bytes."""
    for copy in copies:
        inside = 0 <= copy.source <= copy.source + copy.nbytes <= nbytes
        if copy.nbytes <= 0 or copy.target < 0 or not inside:
            raise InputError(f"{copy} does not lie within the pool's {nbytes} bytes")


def check_targets(copies: Sequence[Copy], peer: str, nbytes: int) -> None:
    """Raise TransportError unless all targets lie within the peer's pool of so many bytes."""
    for copy in copies:
        if copy.target + copy.nbytes > nbytes:
            raise TransportError(peer, f"{copy} goes beyond the pool there")
