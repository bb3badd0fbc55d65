"""Snapshots as files, so that what the prefix cache gives up, or a restart, is not lost."""

import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import BoundedSemaphore, Lock

import torch

from qnext.errors import QnextError
from qnext.functional.checkpoint import load_state, save_state, state_tokens
from qnext.functional.params import Params
from qnext.runtime.kept import Kept, as_state, of_state

log = logging.getLogger("qnext")
Tokens = tuple[int, ...]
UNDER_WAY = 8  # files that wait to be written; beyond it snapshots are dropped, not queued


class SnapshotFiles:
    """State files of one directory, by the tokens they have consumed; for several threads.

    Each is whole: a state of one sequence as `save_state` writes it. The least recently used are
    deleted beyond `most_bytes`. They lie in a folder named after the `weights`, as states of others
    would be read without complaint: a config's fingerprint is all that a state file tells. params:
    of the whole model, or specs of them; states come to lie on `device`.
    """

    def __init__(
        self,
        params: Params,
        weights: str,
        directory: Path,
        most_bytes: int,
        device: torch.device,
    ) -> None:
        self.params, self.most_bytes, self.device = params, most_bytes, device
        self.directory = directory / weights
        self.directory.mkdir(parents=True, exist_ok=True)
        self._known: OrderedDict[Tokens, Path] = OrderedDict()  # the least recently used first
        self._lock, self._writer = Lock(), ThreadPoolExecutor(1, "qnext-files")
        self._room = BoundedSemaphore(UNDER_WAY)
        paths = self.directory.glob("*.safetensors")
        found = sorted(paths, key=lambda path: path.stat().st_mtime)
        for path in found:
            tokens = state_tokens(params, path)
            if tokens:
                self._known[tokens] = path

    def __len__(self) -> int:
        return len(self._known)

    def save(self, tokens: Tokens, kept: Kept) -> None:
        """Write a whole value in the background, unless it is known."""
        with self._lock:
            if tokens in self._known:
                self._known.move_to_end(tokens)
                return
        if not self._room.acquire(blocking=False):
            log.info("a snapshot of %d tokens was dropped: files are being written", len(tokens))
            return
        self._writer.submit(self._write, tokens, kept)

    def _write(self, tokens: Tokens, kept: Kept) -> None:
        name = hashlib.sha256(repr(tokens).encode()).hexdigest()[:32]
        path = self.directory / f"{name}.safetensors"
        try:
            state = as_state(self.params.config, kept, len(tokens))
            save_state(self.params, state, path, tokens)
            with self._lock:
                self._known[tokens] = path
            self._delete_beyond()
        except Exception as error:  # a full disk, say: it costs time later, nothing now
            log.warning("a snapshot was not written: %s", error)
        finally:
            self._room.release()

    def _delete_beyond(self) -> None:
        with self._lock:
            sizes = {tokens: path.stat().st_size for tokens, path in self._known.items()}
            total = sum(sizes.values())
            while total > self.most_bytes and len(self._known) > 1:
                tokens, path = self._known.popitem(last=False)
                total -= sizes[tokens]
                path.unlink(missing_ok=True)

    def find(self, tokens: Sequence[int], most: int) -> tuple[int, Kept] | None:
        """(length, value) of the longest file that tokens begin with, of at most `most` tokens."""
        with self._lock:
            lengths = sorted({len(known) for known in self._known if len(known) <= most})
            begins = (tuple(tokens[:length]) for length in reversed(lengths))
            found = next((begin for begin in begins if begin in self._known), None)
            if found is None:
                return None
            self._known.move_to_end(found)
            path = self._known[found]
        try:
            os.utime(path)  # so that a restart knows what was used last
            state = load_state(self.params, path, self.device)
        except (OSError, QnextError) as error:
            log.warning("%s is not used: %s", path, error)
            with self._lock:
                self._known.pop(found, None)
            return None
        return len(found), of_state(state)

    def close(self) -> None:
        """Wait until everything is written."""
        self._writer.shutdown()
