"""Seconds of decode steps and of prefills, of several targets in turn.

Rounds go through all cases, so that a noisy machine is noisy for all; medians are told.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

import qnext as qn
from qnext.bench.steps.roofline import decode_bytes, prefill_flops
from qnext.lowering.compiled import Compiled

SEED = 11


class Figure(NamedTuple):
    """What was measured of one case."""

    target: str
    batch: int
    length: int  # of the prompt: before the first step, or read by the prefill
    seconds: float  # of a step, or of the prefill: the median
    rounds: tuple[float, ...]  # seconds of each
    tokens: int  # of a step, or of the prefill
    least: float  # bytes that a step moves, or operations of the prefill
    first_seconds: float  # of the first call, which compiles
    peak_bytes: int  # that the process had had by then

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def work(self) -> float:
        """Bytes, or operations, per second."""
        return self.least / self.seconds


class Runner:
    """A model on one target, for prompts of up to `capacity` tokens in `batch` rows.

    Raises what `lower` and `compile` do: what a figure of kernels tells is never the reference.
    """

    def __init__(
        self, params: qn.Params, target: str, batch: int, capacity: int, chunk: int
    ) -> None:
        self.params, self.target = params, target
        self.batch, self.capacity, self.chunk = batch, capacity, chunk
        self._compiled: dict[str, Compiled] = {}

    def start(self) -> qn.State:
        dtype = self.params.embed.dtype
        return qn.init_state(self.params.config, self.batch, self.capacity, dtype=dtype)

    def prefill(self, state: qn.State, tokens: Tensor) -> qn.State:
        """Consume tokens [batch, seq], a chunk at a time: all calls have the same shapes."""
        for part in tokens.split(self.chunk, dim=1):
            lengths = torch.full((self.batch,), part.shape[1])
            whole = pad(part, (0, self.chunk - part.shape[1]))
            state = self._run(qn.prefill, state, whole, lengths)
        return state

    def decode(self, state: qn.State, tokens: Tensor) -> qn.State:
        """Consume tokens [batch]."""
        return self._run(qn.decode, state, tokens)

    def _run(self, function: Callable[..., Any], *rest: Any) -> qn.State:
        """Call a function, which is compiled before its first call."""
        name = function.__name__
        if name not in self._compiled:
            step = qn.jit(function, donate="state", target=self.target)
            strict = self.target != "reference"
            self._compiled[name] = step.compile(self.params, *rest, strict=strict)
        state: qn.State
        _, state = self._compiled[name](self.params, *rest)
        return state


@dataclass
class Case:
    """What is measured, and what has been so far."""

    target: str
    runner: Runner
    length: int
    first: float = 0.0
    peak: int = 0
    seconds: list[float] = field(default_factory=list)

    def figure(self, tokens: int, least: float) -> Figure:
        return Figure(
            target=self.target,
            batch=self.runner.batch,
            length=self.length,
            seconds=statistics.median(self.seconds),
            rounds=tuple(self.seconds),
            tokens=tokens,
            least=least,
            first_seconds=self.first,
            peak_bytes=self.peak,
        )


def random_tokens(params: qn.Params, *shape: int) -> Tensor:
    """Token ids, ever the same."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, params.config.vocab_size, shape, generator=generator)


def measure_decode(
    params: qn.Params,
    targets: Sequence[str],
    batches: Sequence[int],
    prompt: int,
    steps: int,
    rounds: int,
    chunk: int,
    progress: bool = False,
) -> list[Figure]:
    """Steps after a prompt; a round is `steps` of them in a row, and its figure their median."""
    capacity = prompt + steps * rounds + 1
    cases = [
        Case(target, Runner(params, target, batch, capacity, chunk), prompt)
        for batch in batches
        for target in targets
    ]
    total = len(cases) * (rounds + 1)
    with tqdm(total=total, desc="decode", unit="round", disable=not progress) as bar:
        states = []
        for case in cases:
            tokens = random_tokens(params, case.runner.batch, prompt)
            state = case.runner.prefill(case.runner.start(), tokens)
            began = time.perf_counter()
            states.append(case.runner.decode(state, tokens[:, 0]))
            case.first = time.perf_counter() - began
            bar.update()
        for _ in range(rounds):
            for i, case in enumerate(cases):
                seconds = []
                for tokens in random_tokens(params, steps, case.runner.batch):
                    began = time.perf_counter()
                    states[i] = case.runner.decode(states[i], tokens)
                    seconds.append(time.perf_counter() - began)
                case.seconds.append(statistics.median(seconds))
                case.peak = case.peak or peak_bytes()
                bar.update()
    each = [(case, case.runner.batch) for case in cases]
    return [case.figure(batch, decode_bytes(params, batch, prompt)) for case, batch in each]


def measure_prefill(
    params: qn.Params,
    targets: Sequence[str],
    lengths: Sequence[int],
    rounds: int,
    chunk: int,
    progress: bool = False,
) -> list[Figure]:
    """Prompts of one row, read a chunk at a time."""
    runners = {target: Runner(params, target, 1, max(lengths), chunk) for target in targets}
    cases = [Case(target, runners[target], n) for n in lengths for target in targets]
    total = len(targets) + len(cases) * rounds
    with tqdm(total=total, desc="prefill", unit="prompt", disable=not progress) as bar:
        first = {}
        for target, runner in runners.items():
            began = time.perf_counter()
            runner.prefill(runner.start(), random_tokens(params, 1, 1))
            first[target] = time.perf_counter() - began
            bar.update()
        for _ in range(rounds):
            for case in cases:
                case.seconds.append(_prefill_seconds(case, random_tokens(params, 1, case.length)))
                case.first, case.peak = first[case.target], case.peak or peak_bytes()
                bar.update()
    return [case.figure(case.length, prefill_flops(params, case.length)) for case in cases]


def _prefill_seconds(case: Case, tokens: Tensor) -> float:
    """Seconds of one prompt, on a state that is gone afterwards."""
    state = case.runner.start()
    began = time.perf_counter()
    case.runner.prefill(state, tokens)
    return time.perf_counter() - began


def peak_bytes() -> int:
    """The most memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
