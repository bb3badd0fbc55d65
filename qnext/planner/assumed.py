"""What a plan takes for granted: machines, loads, and a measured point to compare with.

Nominal figures of chips are in `qnext.lowering.target`. What is here nobody publishes as one number
or depends on software; every figure can be given to `qnext plan` instead.
"""

from dataclasses import dataclass

from qnext.errors import InputError
from qnext.lowering.target import LAUNCH_SECONDS, Chip, Target, resolve


@dataclass(frozen=True)
class Machine:
    """Cards of one kind and what joins them. A card is a device as torch_npu counts them.

    island: cards that fast links join, each with each. link, network: bytes a second that a card
    gets through these, and between islands. launch, collective: seconds of a node of a captured
    graph beside its work, and of a collective beside its bytes. usable: share of a card's memory
    that weights, states and workspace may take.
    """

    target: Target
    island: int
    link: float = 100e9
    network: float = 20e9
    launch: float = LAUNCH_SECONDS
    collective: float = 20e-6
    usable: float = 0.9

    @property
    def chip(self) -> Chip:
        assert self.target.chip is not None
        return self.target.chip

    @property
    def usable_bytes(self) -> int:
        return int(self.usable * self.chip.memory_bytes)


# link: DeepEP-Ascend reports 107 and 103 GB/s for large messages among 16 ranks of an A3.
# network: a card has 200 Gb/s of RoCE on both; 80 % of that. collective: no source.
# island: a server of 8 cards (Atlas 800I A2); a supernode of 384 packages of two dies (CloudMatrix,
# arXiv:2506.12708); 8,192 cards as announced for the 950.
MACHINES = {
    "910b": Machine(resolve("npu:910b"), island=8),
    "a3": Machine(resolve("npu:a3"), island=768),
    "950": Machine(resolve("npu:950"), island=8192),
}


@dataclass(frozen=True)
class Load:
    """Requests that run at once, all alike. accepted: share of guesses that are right."""

    requests: int = 24
    prompt: int = 3500
    output: int = 1500
    draft: int = 0
    accepted: float = 0.8

    def __post_init__(self) -> None:
        for name, least in (("requests", 1), ("prompt", 1), ("output", 1), ("draft", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"{name} must be an integer >= {least}, got {value!r}")
        if not 0 <= self.accepted <= 1:
            raise InputError(f"accepted must lie in 0..1, got {self.accepted!r}")

    @property
    def length(self) -> int:
        """Tokens of a request at its end."""
        return self.prompt + self.output

    @property
    def tokens_a_step(self) -> float:
        """Tokens that a step yields a request: the model's, and guesses up to the first wrong."""
        return 1 + sum(self.accepted**n for n in range(1, self.draft + 1))


# SGLang pull request 14391: 16 devices, --tp-size 16 --dp-size 4, docs/serving_points.md
MEASURED_LOAD, MEASURED_CARDS, MEASURED_SECONDS = Load(), 16, 44.30e-3
MEASURED = "SGLang pull request 14391, --tp-size 16 --dp-size 4"
