"""`qnext bench serve`: its options, its report, and the files it writes."""

import argparse
import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path

from qnext.bench.figures import Figures, measure, report
from qnext.bench.files import check_files
from qnext.bench.plot import draw
from qnext.bench.serve import PATHS, Bench, Options, import_aiohttp
from qnext.bench.steps.command import add_steps
from qnext.embedded import PROBLEMS
from qnext.errors import InputError

REQUESTS, CONCURRENCY = 100, 16
DESCRIPTION = """\
Send requests to a server that speaks OpenAI's API, and tell how long answers took and how many
tokens came. Closed loop (--concurrency): so many clients, each of which sends when its last
request has ended; it finds what the server can do at most. Open loop (--rate): requests come at
random times whatever becomes of them, as users do; it finds how long these wait.
Needs the extra: pip install 'qnext[bench]'.
"""
EXAMPLES = """\
examples:
  qnext bench serve                                     the demo's problems, 16 at a time
  qnext bench serve --concurrency 64 --duration 60 --warmup 16 --plot run.png --json run.json
  qnext bench serve --rate 4 --requests 500             4 a second, at random times
  qnext bench serve --input-tokens 2048 --output-tokens 256 --ignore-eos
  qnext bench serve --input-tokens 4096 --shared-prefix 3072       what a prefix cache brings
  qnext bench serve --endpoint completions --prompts gsm8k_test.jsonl --url http://host:30000

Ctrl-C ends it, and what was measured until then is told. Times are as the client sees them:
TTFT from sending a request to its first text, TPOT (last text - first text) / (tokens - 1).
The exit status is 1 where no request was answered.
"""


def add_bench(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    bench = verbs.add_parser(
        "bench",
        help="measure a server, or steps on this machine",
        description="Measure how fast a server answers, or steps of a model run on this machine.",
    )
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="KIND")
    add_steps(kinds)
    verb = kinds.add_parser(
        "serve",
        help="load for a server with OpenAI's API",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_server(verb)
    _add_load(verb)
    _add_prompts(verb)
    group = verb.add_argument_group("results, beside the report on standard output")
    group.add_argument(
        "--json", type=Path, metavar="FILE", help="write options, figures and all requests"
    )
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="draw latencies and load")
    verb.set_defaults(run=run_bench_serve)


def _add_server(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("server")
    group.add_argument(
        "--url", default="http://127.0.0.1:8000", help="its root (default: http://127.0.0.1:8000)"
    )
    group.add_argument("--model", metavar="NAME", help="default: the first of its /v1/models")
    group.add_argument(
        "--endpoint",
        choices=tuple(PATHS),
        help="default: chat; completions with --input-tokens, as it takes token ids",
    )
    group.add_argument("--api-key", metavar="KEY")
    group.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds until a request is given up as failed (default: 600)",
    )


def _add_load(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("load")
    loop = group.add_mutually_exclusive_group()
    loop.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help=f"closed loop: N requests under way (default: {CONCURRENCY})",
    )
    loop.add_argument(
        "--rate", type=float, metavar="R", help="open loop: R requests/s, Poisson arrivals"
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument("--requests", type=int, metavar="N", help=f"default: {REQUESTS}")
    length.add_argument(
        "--duration",
        type=float,
        metavar="S",
        help="send for S seconds; requests then under way are still awaited",
    )
    group.add_argument(
        "--warmup", type=int, default=0, metavar="N", help="send N others first, not measured"
    )


def _add_prompts(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("requests")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help="lines with prompt, messages, or question (as GSM8K); default: the demo's problems",
    )
    group.add_argument(
        "--input-tokens",
        type=int,
        metavar="N",
        help="random prompts of N tokens: ids for completions, N common words for chat",
    )
    group.add_argument(
        "--output-tokens", type=int, default=128, metavar="M", help="at most (default: 128)"
    )
    group.add_argument(
        "--shared-prefix",
        type=int,
        default=0,
        metavar="N",
        help="the first N tokens are the same in all random prompts (default: 0)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="same seed, same random prompts and arrivals"
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="always --output-tokens tokens, where supported"
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest (default)"
    )


def run_bench_serve(args: argparse.Namespace) -> int:
    """Measure a server and report; returns the exit status. Ctrl-C reports what there is."""
    options = options_of(args)
    check_files(args.json, args.plot)
    import_aiohttp()
    bench = Bench(options)
    began = datetime.now(UTC)
    try:
        asyncio.run(bench.run())
    except KeyboardInterrupt:
        if bench.records:
            _tell(bench, args, began, interrupted=True)
        raise
    figures = _tell(bench, args, began)
    return 0 if figures.answered else 1


def options_of(args: argparse.Namespace) -> Options:
    """The command's options, with defaults that depend on others filled in."""
    if args.prompts is not None and args.input_tokens is not None:
        raise InputError("two kinds of prompts: give --prompts FILE or --input-tokens N")
    endless = args.requests is None and args.duration is not None
    closed = args.concurrency is None and args.rate is None
    return Options(
        url=args.url,
        prompts=args.prompts or PROBLEMS,
        model=args.model,
        endpoint=args.endpoint or ("chat" if args.input_tokens is None else "completions"),
        concurrency=CONCURRENCY if closed else args.concurrency,
        rate=args.rate,
        requests=REQUESTS if args.requests is None and not endless else args.requests,
        duration=args.duration,
        input_tokens=args.input_tokens,
        output_tokens=args.output_tokens,
        shared_prefix=args.shared_prefix,
        seed=args.seed,
        api_key=args.api_key,
        warmup=args.warmup,
        ignore_eos=args.ignore_eos,
        temperature=args.temperature,
        timeout=args.timeout,
    )


def _tell(
    bench: Bench, args: argparse.Namespace, began: datetime, interrupted: bool = False
) -> Figures:
    """Print the report and write the files."""
    figures = measure(bench.records, bench.seconds)
    load = _load(bench)
    print(report(figures, load), flush=True)
    if args.json:
        whole = {
            "began": began.isoformat(timespec="seconds"),
            "interrupted": interrupted,
            "options": bench.options.to_json(),
            "model": bench.model,
            "vocab": bench.vocab,
            "figures": figures.to_json(),
            "requests": [record.to_json() for record in bench.records],
        }
        args.json.write_text(json.dumps(whole) + "\n", encoding="utf-8")
    if args.plot:
        title = "; ".join(text for _, text in load[:3])
        draw(bench.records, bench.seconds, title, args.plot)
    return figures


def _load(bench: Bench) -> list[tuple[str, str]]:
    """What was asked, in lines for the report."""
    options = bench.options
    if options.rate is not None:
        loop = f"open loop, {options.rate:g} requests/s"
    else:
        loop = f"closed loop, {options.concurrency} at once"
    lines = [
        ("server", f"{options.base}, model {bench.model}, {options.endpoint}"),
        ("load", loop),
        ("prompts", f"{_prompts(bench)}; at most {options.output_tokens} tokens out"),
    ]
    if bench.warmed:
        failed = sum(record.error is not None for record in bench.warmed)
        lines.append(("warm-up", f"{len(bench.warmed)} requests, {failed} failed"))
    return lines


def _prompts(bench: Bench) -> str:
    options = bench.options
    if options.input_tokens is None:
        return options.prompts.name
    kind = "words" if bench.vocab is None else f"token ids below {bench.vocab}"
    shared = f", the first {options.shared_prefix} shared" if options.shared_prefix else ""
    return f"{options.input_tokens} random {kind}{shared}"
