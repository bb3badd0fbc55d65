"""`qnext bench decode` and `qnext bench prefill`: options, report, and the files they write."""

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import qnext as qn
from qnext.arguments import DTYPES, Verbs, add_model, add_verb
from qnext.bench.files import check_files
from qnext.bench.steps.measure import Figure, measure_decode, measure_prefill
from qnext.bench.steps.plot import draw_decode, draw_prefill
from qnext.bench.steps.roofline import arithmetic, bandwidth

TARGETS = ("cpu", "reference")
DECODE = """\
Time decode steps of a model on this machine, after a prompt. The limit is the time of reading what
a step must read (weights, recurrent states, keys and values) at the bandwidth measured beside it.
"""
PREFILL = """\
Time how long a model takes to read prompts on this machine, a chunk at a time. The limit is the
time of its operations at the speed of a product of large matrices in float32, measured beside it.
"""
DECODE_EXAMPLES = """\
examples:
  qnext bench decode path/to/checkpoint
  qnext bench decode path/to/checkpoint --batch 1 8 --w8a8 --plot decode.png
  qnext bench decode --target cpu reference             the demo, on kernels and on the definitions
"""
PREFILL_EXAMPLES = """\
examples:
  qnext bench prefill path/to/checkpoint
  qnext bench prefill path/to/checkpoint --length 512 2048 8192 32768 --plot prefill.png
  qnext bench prefill path/to/checkpoint --chunk 1024 --json prefill.json
"""


def add_steps(kinds: Verbs) -> None:
    """The two verbs under `qnext bench`."""
    decode = _verb(kinds, "decode", "decode steps on this machine", DECODE, DECODE_EXAMPLES)
    decode.add_argument(
        "--batch", type=_count, nargs="+", default=[1, 8], metavar="B", help="rows (default: 1 8)"
    )
    decode.add_argument(
        "--prompt", type=_count, default=512, metavar="N", help="tokens before (default: 512)"
    )
    decode.add_argument(
        "--steps", type=_count, default=16, metavar="N", help="of a round (default: 16)"
    )
    decode.set_defaults(run=run_bench_decode)
    prefill = _verb(kinds, "prefill", "reading prompts on this machine", PREFILL, PREFILL_EXAMPLES)
    prefill.add_argument(
        "--length",
        type=_count,
        nargs="+",
        default=[512, 1024, 2048],
        metavar="N",
        help="tokens (default: 512 1024 2048)",
    )
    prefill.set_defaults(run=run_bench_prefill)


def _verb(
    kinds: Verbs,
    name: str,
    help: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    verb = add_verb(kinds, name, help, description, epilog)
    add_model(verb)
    verb.add_argument("--w8a8", action="store_true", help="quantise a float model before")
    verb.add_argument(
        "--ignore",
        nargs="+",
        metavar="NAME",
        help="modules that --w8a8 leaves as they are (default: as `qnext quantize` does)",
    )
    verb.add_argument(
        "--target", nargs="+", choices=TARGETS, default=["cpu"], help="one or both (default: cpu)"
    )
    verb.add_argument("--rounds", type=_count, default=5, metavar="N", help="default: 5")
    verb.add_argument(
        "--chunk", type=_count, default=512, metavar="N", help="tokens read at once (default: 512)"
    )
    verb.add_argument("--threads", type=_count, metavar="N", help="default: PyTorch's own")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    verb.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    return verb


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return int(text)


def run_bench_decode(args: argparse.Namespace) -> None:
    """Measure decode steps and report."""
    params = _start(args)
    sizes = (sorted(set(args.batch)), args.prompt, args.steps, args.rounds, args.chunk)
    figures = measure_decode(params, _targets(args), *sizes, progress=True)
    limit = bandwidth()
    where = f"a prompt of {args.prompt} tokens, read at {limit / 1e9:.1f} GB/s"
    _tell(args, params, where, table(figures, limit, "batch", "ms/step"))
    _write(args, params, figures, {"bytes_per_second": limit})
    if args.plot:
        draw_decode(figures, limit, _model(args, params), args.plot)


def run_bench_prefill(args: argparse.Namespace) -> None:
    """Measure prefills and report."""
    params = _start(args)
    sizes = (sorted(set(args.length)), args.rounds, args.chunk)
    figures = measure_prefill(params, _targets(args), *sizes, progress=True)
    limit = arithmetic()
    where = f"chunks of {args.chunk} tokens, products of float32 at {limit / 1e9:.0f} GFLOP/s"
    _tell(args, params, where, table(figures, limit, "length", "ms"))
    _write(args, params, figures, {"flops_per_second": limit})
    if args.plot:
        draw_prefill(figures, limit, _model(args, params), args.plot)


def _start(args: argparse.Namespace) -> qn.Params:
    """Check what can be refused at once; then the model."""
    check_files(args.json, args.plot)
    if args.ignore and not args.w8a8:
        raise qn.InputError("--ignore says what --w8a8 leaves as it is: give --w8a8 as well")
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = DTYPES.get(args.dtype)
    if args.model is None:
        params = qn.demo(dtype or torch.float32)
    else:
        params = qn.load(args.model, dtype=dtype, mapped=True)
    return qn.quantize(params, ignore=args.ignore) if args.w8a8 else params


def _targets(args: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(args.target))


def _model(args: argparse.Namespace, params: qn.Params) -> str:
    name = "the demo" if args.model is None else args.model.name
    precision = str(params.embed.dtype).removeprefix("torch.")
    kept = f" but {', '.join(args.ignore)}" if args.ignore else ""
    return f"{name}, {precision}{' W8A8' if args.w8a8 else ''}{kept}"


def _tell(args: argparse.Namespace, params: qn.Params, where: str, lines: str) -> None:
    print(
        f"{_model(args, params)}, {torch.get_num_threads()} threads\n{where}\n{lines}", flush=True
    )


def table(figures: Sequence[Figure], limit: float, size: str, unit: str) -> str:
    """Aligned lines, one a case; `limit` is work per second, as that of the figures."""
    names = ("target", size, unit, "tokens/s", "of limit", "fastest", "slowest", "first call, s")
    widths = (11, 8, 11, 11, 10, 10, 10, 15)
    lines = ["".join(f"{n:>{w}}" for n, w in zip(names, widths, strict=True))]
    for f in figures:
        cells = (
            f.target,
            str(f.batch if size == "batch" else f.length),
            f"{1e3 * f.seconds:.3f}",
            f"{f.rate:.1f}",
            f"{f.work / limit:.0%}",
            f"{1e3 * min(f.rounds):.3f}",
            f"{1e3 * max(f.rounds):.3f}",
            f"{f.first_seconds:.2f}",
        )
        lines.append("".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def _write(
    args: argparse.Namespace,
    params: qn.Params,
    figures: Sequence[Figure],
    limit: dict[str, float],
) -> None:
    if args.json is None:
        return
    (most,) = limit.values()
    rows = [
        {**f._asdict(), "tokens_per_second": f.rate, "of_limit": f.work / most} for f in figures
    ]
    whole: dict[str, Any] = {
        "benchmark": args.kind,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": _model(args, params),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "chunk": args.chunk,
        **limit,
        "figures": rows,
    }
    args.json.write_text(json.dumps(whole) + "\n", encoding="utf-8")
