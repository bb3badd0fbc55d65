"""What an engine counted since it began."""

from collections import Counter
from dataclasses import dataclass, field

from qnext.acceptance import NONE, Acceptance


@dataclass
class Stats:
    """Counts that only grow; prompt, generated and cache counts are of tokens."""

    steps: int = 0
    prompt: int = 0
    generated: int = 0
    cache_queries: int = 0
    cache_hits: int = 0
    preempted: int = 0
    corrupted: int = 0
    failed_steps: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    acceptance: Acceptance = NONE
