"""A process with a transport of its own: says its address, then what its pool holds when told so.

    python -m tests.handoff.peer KIND BYTES

A notice "at N" is answered on stdout by the checksum of the N bytes from 64 on.
"""

import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import torch

from qnext.handoff.group import GroupTransport
from qnext.handoff.inproc import Hub
from qnext.handoff.mooncake import MooncakeTransport

MAKE: dict[str, Callable[[torch.Tensor], Any]] = {
    "inproc": Hub().transport,
    "group": GroupTransport,
    "mooncake": MooncakeTransport,
}


def checksum(data: torch.Tensor) -> int:
    return zlib.crc32(data.numpy().data)


if __name__ == "__main__":
    pool = torch.zeros(int(sys.argv[2]), dtype=torch.uint8)
    transport = MAKE[sys.argv[1]](pool)
    print(transport.address, flush=True)
    while True:
        for notice in transport.notices():
            end = 64 + int(notice.removeprefix("at "))
            print(checksum(pool[64:end]), flush=True)
        time.sleep(0.002)
