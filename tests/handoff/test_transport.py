"""What every transport promises, in one process and between two; peers that die and freeze."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.handoff.transport import Copy, Transport, TransportError
from tests.handoff.peer import MAKE, checksum

SIZE, SECONDS = 1 << 20, 10.0
Make = Callable[[Tensor], Any]


def has_mooncake() -> bool:
    try:
        import mooncake.engine
    except ImportError:  # or libibverbs is not there
        return False
    return bool(mooncake.engine)


needs_mooncake = pytest.mark.skipif(not has_mooncake(), reason="mooncake cannot be imported")
EVERY = ["inproc", "group", pytest.param("mooncake", marks=needs_mooncake)]


def noise(nbytes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), generator=generator, dtype=torch.uint8)


@pytest.fixture(params=EVERY)
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[Transport] = []

    def transport(pool: Tensor) -> Transport:
        made.append(MAKE[request.param](pool))
        return made[-1]

    yield transport
    for each in made:
        each.close()


def waited(transport: Transport, count: int) -> list[str]:
    """So many notices of a transport."""
    found, until = list[str](), time.monotonic() + SECONDS
    while len(found) < count and time.monotonic() < until:
        found += transport.notices()
        time.sleep(0.001)
    return found


def test_bytes_come_to_lie_where_they_should(make: Make) -> None:
    here, there = noise(SIZE), noise(SIZE + 77, seed=1)
    a, b, want = make(here), make(there), there.clone()
    copies = [Copy(64, 1000, 1), Copy(777, 2000, 4099), Copy(64, SIZE + 76, 1), Copy(9000, 64, 500)]
    a.write(b.address, copies, SECONDS)
    for source, target, nbytes in copies:
        want[target : target + nbytes] = here[source : source + nbytes]
    assert torch.equal(there, want) and torch.equal(here, noise(SIZE))
    assert isinstance(a, Transport) and a.address != b.address


def test_a_message_comes_after_the_bytes_and_the_messages_before_it(make: Make) -> None:
    here, there = noise(SIZE), noise(SIZE, seed=1)
    a, b = make(here), make(there)
    texts = ["first", "zweite Nachricht, mit ü und 文", '{"long": "' + "x" * 200_000 + '"}', ""]
    for number, text in enumerate(texts):
        here[64:] = number
        a.write(b.address, [Copy(64, 64, SIZE - 64)], SECONDS)
        a.notify(b.address, text, SECONDS)
        assert waited(b, 1) == [text]
        assert bool((there[64:] == number).all())
    for number in range(20):
        a.notify(b.address, str(number), SECONDS)
    assert waited(b, 20) == [str(number) for number in range(20)]
    assert b.notices() == [] == a.notices()


def test_what_lies_outside_of_a_pool_is_refused(make: Make) -> None:
    here, there = noise(SIZE), noise(SIZE, seed=1)
    a, b = make(here), make(there)
    for copy in (Copy(SIZE - 5, 0, 6), Copy(-1, 0, 5), Copy(0, -1, 5), Copy(0, 0, 0)):
        with pytest.raises(qn.InputError, match="does not lie within the pool's 1048576 bytes"):
            a.write(b.address, [Copy(100, 100, 100), copy], SECONDS)
    with pytest.raises(TransportError, match="beyond the pool there"):
        a.write(b.address, [Copy(100, 100, 100), Copy(100, SIZE - 99, 100)], SECONDS)
    assert torch.equal(there, noise(SIZE, seed=1))
    a.write(b.address, [Copy(100, SIZE - 100, 100)], SECONDS)  # it can go on
    assert torch.equal(there[-100:], here[100:200])


@pytest.mark.parametrize(
    "address", ["", "nowhere", "inproc:77", "group:", "mooncake:127.0.0.1:9/x"]
)
def test_a_wrong_address_is_an_error(make: Make, address: str) -> None:
    a = make(noise(SIZE))
    for call in (
        lambda: a.write(address, [Copy(100, 100, 100)], 1.0),
        lambda: a.notify(address, "hello", 1.0),
    ):
        with pytest.raises(TransportError, match="nothing can be sent to"):
            call()


def test_nothing_is_sent_to_or_from_a_closed_transport(make: Make) -> None:
    a, b, c = (make(noise(SIZE, seed=seed)) for seed in range(3))
    a.write(b.address, [Copy(100, 100, 100)], SECONDS)
    b.close()
    b.close()
    with pytest.raises(TransportError):
        b.write(a.address, [Copy(100, 100, 100)], SECONDS)
    with pytest.raises(TransportError):
        b.notify(a.address, "hello", SECONDS)
    a.write(c.address, [Copy(100, 100, 100)], SECONDS)


def test_many_write_at_once(make: Make) -> None:
    pools = [noise(SIZE, seed=seed) for seed in range(4)]
    transports = [make(pool) for pool in pools]
    own = [pool.clone() for pool in pools]
    part = SIZE // 16

    def send(job: int) -> None:
        """From pool j to another one; each of the 12 pairs has a place of its own there."""
        source, other = divmod(job, 3)
        target = [k for k in range(4) if k != source][other]
        place = 64 + part * (4 + source)
        copies = [Copy(64 + i, place + i, 100) for i in range(0, part - 200, 100)]
        transports[source].write(transports[target].address, copies, SECONDS)
        transports[source].notify(transports[target].address, f"{source}", SECONDS)

    with ThreadPoolExecutor(12) as many:
        for done in [many.submit(send, job) for job in range(12)]:
            done.result()
    for target, (transport, pool) in enumerate(zip(transports, pools, strict=True)):
        others = [k for k in range(4) if k != target]
        assert sorted(waited(transport, 3)) == [str(k) for k in others]
        for k in others:
            place = 64 + part * (4 + k)
            assert torch.equal(pool[place : place + part - 200], own[k][64 : 64 + part - 200])


@pytest.mark.parametrize(
    "pool",
    [
        torch.zeros(5),
        torch.zeros(5, dtype=torch.int8),
        torch.zeros(3, 7, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
    ],
    ids=["floats", "signed", "two axes", "empty"],
)
def test_a_pool_is_bytes_that_lie_together(make: Make, pool: Tensor) -> None:
    with pytest.raises(qn.InputError, match=r"a pool must be bytes \[n\], uint8"):
        make(pool)
    with pytest.raises(qn.InputError, match="that lie together"):
        make(torch.zeros(10, dtype=torch.uint8)[::2])


# ---- two processes


@contextmanager
def another(kind: str, nbytes: int = SIZE) -> Iterator[tuple[Any, str]]:
    """A process with a transport, and its address."""
    command = [sys.executable, "-m", "tests.handoff.peer", kind, str(nbytes)]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **quiet) as process:  # type: ignore[call-overload]
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


BETWEEN = [kind for kind in EVERY if kind != "inproc"]


@pytest.mark.parametrize("kind", BETWEEN)
def test_from_process_to_process(kind: str) -> None:
    here = noise(SIZE)
    with another(kind) as (process, address):
        a = MAKE[kind](here)
        for nbytes in (1, 999, SIZE - 64):
            a.write(address, [Copy(64, 64, nbytes)], SECONDS)
            a.notify(address, f"at {nbytes}", SECONDS)
            assert int(process.stdout.readline()) == checksum(here[64 : 64 + nbytes])
        a.close()


@pytest.mark.parametrize("kind", BETWEEN)
def test_a_peer_that_is_killed(kind: str) -> None:
    a = MAKE[kind](noise(SIZE))
    with another(kind) as (process, address):
        a.write(address, [Copy(64, 64, 1000)], SECONDS)
        process.kill()
        process.wait()
        for call in (
            lambda: a.write(address, [Copy(64, 64, 1000)], 5.0),
            lambda: a.notify(address, "at 5", 5.0),
        ):
            began = time.monotonic()
            with pytest.raises(TransportError):
                call()
            assert time.monotonic() - began < 5.5
    with another(kind) as (process, address):  # others are served
        a.write(address, [Copy(64, 64, 1000)], SECONDS)
    a.close()


@pytest.mark.parametrize("kind", BETWEEN)
def test_a_peer_that_is_frozen_and_goes_on(kind: str) -> None:
    here = noise(SIZE * 16)
    a = MAKE[kind](here)
    with another(kind, SIZE * 16) as (process, address):
        a.write(address, [Copy(64, 64, 1000)], SECONDS)
        os.kill(process.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(TransportError):
            a.write(address, [Copy(64, 64, 15 * SIZE)], 0.5)
        assert 0.4 < time.monotonic() - began < 2
        os.kill(process.pid, signal.SIGCONT)
        a.write(address, [Copy(64, 64, 15 * SIZE)], SECONDS)
        a.notify(address, f"at {15 * SIZE}", SECONDS)
        assert int(process.stdout.readline()) == checksum(here[64 : 64 + 15 * SIZE])
    a.close()
