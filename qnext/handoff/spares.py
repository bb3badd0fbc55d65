"""Memory that is used again: fresh pages of a hundred megabytes cost as much time as the copy."""

import weakref
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Spares:
    """Gives out bytes [n] that come back by themselves once no tensor looks at them any more.

    most: bytes that are kept for the next.
    """

    def __init__(self, most: int) -> None:
        self.most, self._kept, self._lock = most, list[Any](), Lock()

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """Bytes of any values; of another device than the host its allocator keeps spares."""
        if device.type != "cpu":
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
        with self._lock:
            fits = [memory for memory in self._kept if memory.nbytes >= nbytes]
            memory = min(fits, key=lambda each: each.nbytes, default=None)
            if memory is not None:
                self._kept = [each for each in self._kept if each is not memory]
        if memory is None:
            memory = np.empty(nbytes, dtype=np.uint8)
        given = memory[:nbytes]  # goes with the last tensor over it
        weakref.finalize(given, self._back, memory)
        return torch.from_numpy(given)

    def _back(self, memory: Any) -> None:
        with self._lock:
            if sum(each.nbytes for each in self._kept) + memory.nbytes <= self.most:
                self._kept.append(memory)
