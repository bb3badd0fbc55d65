"""A sender and a receiver in one process, on transports that fail as they are told."""

import time
from collections.abc import Callable, Sequence
from functools import cache

import torch

import qnext as qn
from qnext.functional.state import KV
from qnext.functional.tree import leaves, leaves_with_paths
from qnext.handoff.inproc import Hub
from qnext.handoff.layout import Layout, layout_of
from qnext.handoff.manifest import Claim, HandoffError, claim_of
from qnext.handoff.receive import Expected, Receiver
from qnext.handoff.send import Outgoing, Sender
from qnext.handoff.transport import Copy, Transport
from qnext.runtime.kept import Kept, take
from qnext.runtime.request import Handoff, Portion
from tests.sequences import model, started, words

LENGTH, FIRST = 127, 64
SECONDS = 20.0
POOL = 4 << 20


@cache
def params() -> qn.Params:
    return model(mtp_num_hidden_layers=1)


@cache
def state(draft: int = 1) -> qn.State:
    return started(params(), draft)


def kept(pages: int = 1, draft: int = 1) -> Kept:
    made = state(draft)
    return take(made, 1, made.block_table[1, :pages].tolist())


def hand(outgoing: Handoff, value: Kept, first: int = 0, ends: bool = True) -> None:
    """Give a value its pages from the `first` on, or all that is left of it."""
    count = next(layer for layer in value.layers if isinstance(layer, KV)).key.shape[0]
    portion = outgoing.portion(first, count, ends)
    if portion is not None:
        fill(portion, value, ends)


def fill(portion: Portion, value: Kept, states: bool = True) -> None:
    """Copy a value's pages into a portion; and its states."""
    for (path, into), leaf in zip(leaves_with_paths(portion.into), leaves(value), strict=True):
        if states or path.endswith(("key", "value")):
            into.copy_(leaf)
    portion.filled(whole=True)


def claimed(draft: int = 1, pages: int = 1, seed: int = 5) -> tuple[Claim, Layout]:
    layout = layout_of(state(draft), pages)
    tokens = words(LENGTH, seed=seed)[1].tolist()
    return claim_of(params().config.fingerprint, "weights", tokens, layout), layout


class Faulty:
    """A transport whose next calls go as they are told."""

    def __init__(self, transport: Transport) -> None:
        self.transport, self.pool, self.address = transport, transport.pool, transport.address
        self.on_write: Callable[[], None] = lambda: None
        self.on_notify: Callable[[str], str | None] = lambda message: message
        self.after_write: Callable[[], None] = lambda: None
        self.writes: list[list[Copy]] = []

    def write(self, peer: str, copies: Sequence[Copy], seconds: float) -> None:
        self.on_write()
        self.writes.append(list(copies))
        self.transport.write(peer, copies, seconds)
        self.after_write()

    def notify(self, peer: str, message: str, seconds: float) -> None:
        told = self.on_notify(message)
        if told is not None:
            self.transport.notify(peer, told, seconds)

    def notices(self) -> list[str]:
        return self.transport.notices()

    def close(self) -> None:
        self.transport.close()


class Sides:
    """Both sides, and the faults of the one that sends."""

    def __init__(self, there: int = POOL, hold: float = SECONDS) -> None:
        hub = Hub()
        pools = [torch.full((n,), 0xA5, dtype=torch.uint8) for n in (POOL, there)]
        self.faults, self.there = Faulty(hub.transport(pools[0])), hub.transport(pools[1])
        self.sender = Sender(self.faults, hold, FIRST)
        self.receiver = Receiver(self.there, FIRST)

    def open(self, room: str = "7", **how: int) -> Outgoing:
        return self.sender.open(room, *claimed(**how))

    def expect(self, room: str = "7", seconds: float = SECONDS, **how: int) -> Expected:
        return self.receiver.expect(room, *claimed(**how), seconds)

    def is_clean(self) -> bool:
        """Nothing is held any more, on either side."""
        until = time.monotonic() + 5
        while time.monotonic() < until:
            if not (self.sender.regions.taken or self.receiver.regions.taken):
                return True
            time.sleep(0.01)
        return False


def value(expected: Expected) -> Kept:
    return expected.value.result(SECONDS)


def why(expected: Expected) -> str:
    error = expected.value.exception(SECONDS)
    assert isinstance(error, HandoffError)
    return str(error)
