"""How an engine is made."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from qnext.errors import InputError
from qnext.functional.config import PAGE
from qnext.functional.params import Params
from qnext.functional.speculate import check_module
from qnext.functional.state import pages_of
from qnext.lowering.target import Target, resolve


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an engine may use.

    rows: sequences that run at once. capacity: tokens of one, prompt and new ones. pages: of 128
    tokens, for all of them together (default: what `rows` of a quarter of the capacity need, and
    one whole sequence at least). chunk: tokens of prompts in one step. snapshot_every: tokens
    between snapshots for the prefix cache, of which it holds `cache_bytes` (0: no cache).
    cache_dir: where snapshots that it gives up go, as files of `file_bytes` in all (default:
    nowhere).
    max_waiting: requests that may wait for a row. overlap: settle a step while the next one runs
    in a thread of its own (default: where the target is another device than this processor).
    """

    rows: int = 16
    capacity: int = 4096
    pages: int | None = None
    draft: int = 0
    chunk: int = 256
    snapshot_every: int = 1024
    cache_bytes: int = 1 << 29
    cache_dir: Path | None = None
    file_bytes: int = 8 << 30
    max_waiting: int = 1024
    overlap: bool | None = None
    target: str | Target = "cpu"
    strict: bool = False

    @property
    def pool(self) -> int:
        whole = pages_of(self.capacity)
        return self.pages or max(whole, self.rows * -(-whole // 4))

    @property
    def overlaps(self) -> bool:
        kind = (resolve(self.target) if isinstance(self.target, str) else self.target).kind
        return kind == "npu" if self.overlap is None else self.overlap

    @property
    def buckets(self) -> dict[str, list[int]]:
        """Batch sizes and chunk lengths that steps are compiled for: powers of 2.

        A lone piece of a prompt, the most usual, has lengths between the longest of them, too.
        """
        batches = [1 << n for n in range(self.rows.bit_length()) if 1 << n < self.rows]
        seqs = [*(2**n for n in range(4, 32) if 2**n < self.chunk), self.chunk]
        last = list(pairwise(seqs))[-2:]
        lone = [low + (high - low) * n // 4 for low, high in last for n in (1, 2, 3)]
        return {"batches": [*batches, self.rows], "seqs": seqs, "lone": lone}

    def check(self, params: Params) -> None:
        """Raise InputError unless these are sizes, and sizes that fit the model."""
        least = {
            **dict.fromkeys(("rows", "capacity", "chunk", "snapshot_every", "max_waiting"), 1),
            **dict.fromkeys(("draft", "cache_bytes", "file_bytes"), 0),
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < bound:
                raise InputError(f"{name} must be an integer >= {bound}, got {value!r}")
        if self.pages is not None and self.pages < pages_of(self.capacity):
            raise InputError(
                f"pages = {self.pages} hold {self.pages * PAGE} tokens, but one sequence may have "
                f"capacity = {self.capacity}: give it at least {pages_of(self.capacity)} pages"
            )
        if self.draft:
            check_module(params)
