"""The cpu target beside llama.cpp on one checkpoint: decode, prefill, cold starts, memory.

    python -m benchmarks.peers --llama BIN_DIR --gguf GGUF_DIR [--checkpoint .cache/mid]
        [--rounds 5] [--only f32 bf16 q8_0] [--cases decode1 decode8 prefill cold] [--threads N]
        [--json benchmarks/results.jsonl] [--roofline docs/roofline.md] [--plot docs/roofline.png]

BIN_DIR has llama-bench and llama-batched-bench; GGUF_DIR has the checkpoint as NAME-f32.gguf,
NAME-bf16.gguf and NAME-q8_0.gguf, NAME being that of its directory. Each run is a process of its
own, and the two sides take turns. A run counts if other processes left the machine to it. A
precision whose logits are not the float32 reference's is red: it gets no figure, and the command
ends with status 1.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import qnext as qn
from benchmarks.eager import checkpoint, where_measured
from benchmarks.peers import noise
from benchmarks.peers.page import draw, faults, memory, page, rate, rates_table, start, starts_table
from benchmarks.peers.runs import PEER, PRECISIONS, SIDES, STARTS, Cell, Run, Setup, until_clean
from qnext.bench.files import check_file, check_files

CASES = ("decode1", "decode8", "prefill", "cold")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.peers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--llama", type=Path, required=True, metavar="BIN_DIR")
    parser.add_argument("--gguf", type=Path, required=True, metavar="GGUF_DIR")
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/mid"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--roofline", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args(words)


def check_options(args: argparse.Namespace, setup: Setup) -> None:
    """Refuse at once what could not be measured or written."""
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            raise qn.InputError(f"--{name} must be an integer >= 1, got {getattr(args, name)}")
    if "cold" in args.cases and not hasattr(os, "posix_fadvise"):
        raise qn.InputError("--cases cold: this system cannot put a file out of its page cache")
    check_files(args.json, args.plot)
    check_file("--roofline", args.roofline)
    setup.check(args.only)


def examine(setup: Setup, precisions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """precision -> whether its logits are right, and the bytes of its weights and state."""
    found = {}
    for precision in precisions:
        setup.make(precision)
        try:
            found[precision] = setup.examine(precision)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            found[precision] = {"red": "the check of its logits failed"}
        if found[precision]["red"]:
            print(f"{precision}: red, {found[precision]['red']}", flush=True)
    return found


def cells_of(precisions: Sequence[str], cases: Sequence[str]) -> list[Cell]:
    """One for each precision and case; a cold start brings a warm one."""
    names = [name for case in cases for name in (STARTS if case == "cold" else (case,))]
    return [Cell(name, precision) for precision in precisions for name in dict.fromkeys(names)]


def turns(cells: Sequence[Cell], rounds: int) -> Iterator[tuple[Cell, str]]:
    """All runs in their order: sides beside each other, in turn the first."""
    for number in range(rounds):
        for cell in cells:
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                yield cell, side


def measure(setup: Setup, cells: Sequence[Cell], rounds: int) -> None:
    """Go through all rounds; a case that fails is left, the others go on."""
    for cell, side in tqdm(list(turns(cells, rounds)), desc="runs", disable=None):
        if cell.failed:
            continue
        try:
            cell.runs[side] += until_clean(partial(one, setup, cell, side))
        except RuntimeError as error:
            print(f"{side}, {cell.case}, {cell.precision}: {error}", file=sys.stderr)
            cell.failed = side


def one(setup: Setup, cell: Cell, side: str) -> Run:
    """One run, when the machine is quiet."""
    noise.wait_quiet()
    setup.prepare(side, cell.case, cell.precision)
    return Run(*noise.watch(lambda: setup.run(side, cell.case, cell.precision)))


def summary(
    args: argparse.Namespace,
    setup: Setup,
    checks: dict[str, dict[str, Any]],
    cells: Sequence[Cell],
) -> dict[str, Any]:
    """The line of results: figures of what could be measured, and all runs."""
    good = [cell for cell in cells if not cell.fault(args.rounds)]
    row = where_measured()
    row["versions"][PEER] = setup.version()
    return {
        "benchmark": "peers",
        **row,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "command": command(args),
        "rounds": args.rounds,
        "gated": noise.read() is not None,
        "red": {name: check["red"] for name, check in checks.items() if check["red"]},
        "faults": [
            {"case": cell.case, "precision": cell.precision, "why": cell.fault(args.rounds)}
            for cell in cells
            if cell.fault(args.rounds)
        ],
        "rates": [rate(cell) for cell in good if cell.case not in STARTS],
        "starts": [start(cell) for cell in good if cell.case in STARTS],
        "memory": [
            memory(cell, held(checks[cell.precision]), setup.weights(cell.precision).stat().st_size)
            for cell in good
            if cell.case == "decode1"
        ],
        "runs": [
            {"case": cell.case, "precision": cell.precision, "side": side, "others": run.others}
            | run.told
            for cell in cells
            for side in SIDES
            for run in cell.runs[side]
        ],
    }


def held(check: dict[str, Any]) -> int:
    """Bytes of weights and state."""
    both: int = check["weights_bytes"] + check["state_bytes"]
    return both


def processor() -> str:
    """Its name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "a processor without a name"


def command(args: argparse.Namespace) -> str:
    """The command line, without the places of this machine."""
    words = ["python -m benchmarks.peers --llama BIN_DIR --gguf GGUF_DIR"]
    words.append(f"--checkpoint {shown(args.checkpoint)} --rounds {args.rounds}")
    words.append(f"--only {' '.join(args.only)} --cases {' '.join(args.cases)}")
    words.append(f"--threads {args.threads}")
    files = {"json": args.json, "roofline": args.roofline, "plot": args.plot}
    words += [f"--{name} {shown(path)}" for name, path in files.items() if path]
    return " ".join(words)


def shown(path: Path) -> str:
    """A path inside the working directory as it is, the name of any other."""
    inside = not path.is_absolute() and ".." not in path.parts
    return path.as_posix() if inside else path.name


def write(args: argparse.Namespace, row: dict[str, Any]) -> None:
    """The files that were asked for."""
    if args.json:
        with args.json.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
    drawn = args.plot is not None and bool(row["rates"])
    if drawn:
        draw(row["rates"], args.plot)
    if args.roofline:
        away = Path(os.path.relpath(args.plot, args.roofline.parent)).as_posix() if drawn else None
        args.roofline.write_text(page(row, away), encoding="utf-8")


def show(row: dict[str, Any]) -> None:
    if not row["gated"]:
        print("this machine does not tell what other processes use: no run was thrown away")
    for table in (rates_table(row["rates"]), starts_table(row["starts"])):
        if table.count("\n") > 2:
            print(table)
    for line in faults(row):
        print(line)


def main(words: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a precision is red, or if a run failed."""
    args = parse(words)
    setup = Setup(args.llama, args.gguf, args.checkpoint, args.threads)
    try:
        check_options(args, setup)
    except qn.InputError as error:
        print(f"benchmarks.peers: {error}", file=sys.stderr)
        return 1
    torch.set_num_threads(args.threads)
    checkpoint(args.checkpoint)
    checks = examine(setup, list(dict.fromkeys(args.only)))
    cells = cells_of([name for name in checks if not checks[name]["red"]], args.cases)
    measure(setup, cells, args.rounds)
    row = summary(args, setup, checks, cells)
    show(row)
    write(args, row)
    return int(bool(row["red"]) or any(cell.failed for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
