"""The `qnext` command. Text goes to standard output, everything about it to standard error."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import qnext as qn
from qnext import doctor
from qnext.arguments import Verbs, add_draft, add_model, add_target, add_verb, load
from qnext.bench.command import add_bench
from qnext.complete import Piece, complete
from qnext.convert import convert
from qnext.embedded import PROBLEMS
from qnext.evaluate import evaluate, read_problems
from qnext.functional.quantize import CHOICES
from qnext.lower import add_lower
from qnext.planner.command import add_plan
from qnext.server.command import add_serve
from qnext.text import Tokenizer

INTERRUPTED = 130  # what shells report for a command ended by Ctrl-C

EXAMPLES = """\
examples:
  qnext generate --chat "Who are you?"
  printf 'Question: Mia has 12 apples and buys 7 more. How many has she now?\\nAnswer:' |
    qnext generate --stop Question
  qnext generate --chat                                 talk to it; an empty line or Ctrl-D ends
  qnext generate --prompt "Tom went to the market." --temperature 0.8 --seed 7
  qnext generate --chat "Who are you?" --draft 2        guess 2 tokens ahead: the same text, sooner
  qnext generate path/to/checkpoint --prompt "Hello" --json | jq -r .text
"""
EVAL_EXAMPLES = """\
examples:
  qnext eval                                            the demo on its 200 unseen problems
  qnext eval --draft 1                                  the same answers, and what was guessed right
  qnext eval path/to/checkpoint --data gsm8k_test.jsonl --shots 5 --json result.json
"""
QUANTIZE_EXAMPLES = """\
examples:
  qnext quantize Qwen3-Next-80B-A3B-Instruct Qwen3-Next-80B-W8A8
  qnext quantize SRC DST --choice public                what SGLang's converter quantises
  qnext quantize SRC DST --ignore lm_head --ignore 're:.*\\.mlp\\.gate$'
  qnext generate DST --prompt "Hello"                   the result is a checkpoint like any other

Cut off (Ctrl-C, kill, a full disk), the same command goes on with the next file.
docs/quantization.md tells which matrices are quantised, and why the others are not.
"""
DOCTOR_EXAMPLES = """\
examples:
  qnext doctor
  qnext doctor --json | jq .facts

In an environment that has torch_npu but no CANN, `import torch` itself fails: source CANN's
set_env.sh, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to run doctor and everything but the NPU.
"""


def parser() -> argparse.ArgumentParser:
    """The command line: one subcommand a verb."""
    top = argparse.ArgumentParser(
        prog="qnext", description="Qwen3-Next as pure functions. Without MODEL, the demo is used."
    )
    top.add_argument("--version", action="version", version=f"qnext {qn.__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_generate(verbs)
    _add_eval(verbs)
    _add_quantize(verbs)
    add_serve(verbs)
    add_bench(verbs)
    add_lower(verbs)
    add_plan(verbs)
    _add_doctor(verbs)
    return top


def _add_generate(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "generate",
        help="continue a prompt, or chat",
        description="Continue a prompt, or chat. Streams text, then prints tokens per second.",
        epilog=EXAMPLES,
    )
    add_model(verb)
    verb.add_argument("--prompt", metavar="TEXT", help="text to continue as it stands")
    verb.add_argument(
        "--chat",
        metavar="TEXT",
        nargs="?",
        const="",
        help="a message for the chat template; without TEXT the message is that of --prompt, or "
        "each line of standard input in turn",
    )
    verb.add_argument("--system", metavar="TEXT", help="system message for --chat")
    verb.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    verb.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest (default)"
    )
    verb.add_argument("--top-p", type=float, default=1.0, metavar="P")
    verb.add_argument("--top-k", type=int, default=0, metavar="K")
    verb.add_argument("--seed", type=int, default=0, help="same seed, same text")
    verb.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable"
    )
    add_draft(verb)
    add_target(verb)
    verb.add_argument("--json", action="store_true", help="print one JSON object at the end")
    verb.set_defaults(run=run_generate)


def _add_eval(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "eval",
        help="few-shot word problems (GSM8K)",
        description="Few-shot accuracy on word problems in GSM8K's JSON lines, as the public "
        "scripts measure it: the shots are the file's first lines, the answer is the last number.",
        epilog=EVAL_EXAMPLES,
    )
    add_model(verb)
    verb.add_argument(
        "--data", type=Path, default=PROBLEMS, metavar="FILE", help="default: the demo's problems"
    )
    verb.add_argument("--shots", type=int, default=5, metavar="K")
    verb.add_argument("--limit", type=int, metavar="N", help="ask only the first N problems")
    verb.add_argument("--batch", type=int, default=16, metavar="B", help="problems at a time")
    verb.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    add_draft(verb)
    add_target(verb)
    verb.add_argument("--json", type=Path, metavar="FILE", help="write figures and all answers")
    verb.set_defaults(run=run_eval)


def _add_quantize(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "quantize",
        help="a checkpoint to W8A8",
        description="Quantise a checkpoint to int8 weights, a scale for each output channel, and "
        "int8 activations, a scale for each token as it comes (compressed-tensors int-quantized).",
        epilog=QUANTIZE_EXAMPLES,
    )
    verb.add_argument("source", type=Path, metavar="SRC", help="checkpoint directory")
    verb.add_argument("target", type=Path, metavar="DST", help="new directory to write to")
    verb.add_argument(
        "--choice",
        choices=CHOICES,
        default="default",
        help="what keeps its dtype: routers, gates of experts and of the delta rule, head and "
        "mtp.fc (default), or the shared expert in place of the delta rule's gates (public)",
    )
    verb.add_argument(
        "--ignore",
        action="append",
        metavar="NAME",
        help="a module to keep, or re: and a regular expression; repeatable, replaces --choice",
    )
    verb.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    verb.set_defaults(run=run_quantize)


def _add_doctor(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "doctor",
        help="what this machine can lower for",
        description="Versions, the NPU of this machine, its target, and the facts that tiny calls "
        "found to hold on it. Without an NPU it says what is missing; that is no error.",
        epilog=DOCTOR_EXAMPLES,
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.set_defaults(run=lambda args: doctor.run(args.json))


def run_generate(args: argparse.Namespace) -> None:
    sampling = qn.Sampling(args.temperature, args.top_k, args.top_p, seed=args.seed)
    if args.prompt is None and args.chat is None and sys.stdin.isatty():
        raise qn.InputError("nothing to continue: give --prompt TEXT, --chat TEXT or --chat")
    if args.prompt is not None and args.chat:
        raise qn.InputError("two texts to answer: give --prompt TEXT or --chat TEXT")
    params, tokenizer = load(args)
    if args.chat is None:
        prompt = sys.stdin.read() if args.prompt is None else args.prompt
        _answer(params, tokenizer, tokenizer.encode(prompt), prompt, sampling, args)
        return
    history = [{"role": "system", "content": args.system}] if args.system else []
    only = args.chat or args.prompt
    for message in [only] if only else _messages():
        history.append({"role": "user", "content": message})
        prompt = tokenizer.encode_chat(history)
        text = _answer(params, tokenizer, prompt, message, sampling, args)
        history.append({"role": "assistant", "content": text})


def _messages() -> Iterator[str]:
    """The user's lines, until an empty one or the end."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _answer(
    params: qn.Params,
    tokenizer: Tokenizer,
    prompt: list[int],
    said: str,
    sampling: qn.Sampling,
    args: argparse.Namespace,
) -> str:
    """Stream one continuation and report its figures; Ctrl-C keeps what was said so far."""
    quiet = args.json
    if not quiet and (args.prompt or args.chat):
        print(said, file=sys.stderr, flush=True)
    if not prompt:
        raise qn.InputError("empty prompt: give --prompt or --chat at least one character")
    began = time.monotonic()
    first: float | None = None
    text, last = "", Piece(0, "", 0, None)
    try:
        how = (args.max_new_tokens, sampling, args.stop, args.draft)
        for last in complete(params, tokenizer, [prompt], *how, target=args.target):
            first = time.monotonic() if first is None else first
            text += last.text
            if not quiet:
                print(last.text, end="", flush=True)
    finally:
        if not quiet:
            print(flush=True)
        ended = time.monotonic()
        figures = _figures(len(prompt), last, began, first or ended, ended)
        drafted = f"; draft {args.draft}: {last.acceptance}" if args.draft else ""
        if quiet:
            guesses = {
                "draft": args.draft,
                "acceptance": last.acceptance.rates,
                "tokens_per_step": last.acceptance.tokens_per_step,
            }
            print(json.dumps({"prompt": said, "text": text, **figures, **guesses}), flush=True)
        else:
            print(
                f"[{figures['prompt_tokens']} prompt tokens, first text after "
                f"{figures['first_text_seconds']:.2f} s; {figures['tokens']} new tokens, "
                f"{figures['tokens_per_second']:.1f} tokens/s; {figures['finish']}{drafted}]",
                file=sys.stderr,
                flush=True,
            )
    return text


def _figures(
    prompt: int, last: Piece, began: float, first: float, ended: float
) -> dict[str, int | float | str]:
    return {
        "prompt_tokens": prompt,
        "tokens": last.tokens,
        "finish": last.finish or "interrupted",
        "first_text_seconds": round(first - began, 4),
        "seconds": round(ended - began, 4),
        "tokens_per_second": round(last.tokens / max(ended - began, 1e-9), 2),
    }


def run_eval(args: argparse.Namespace) -> None:
    problems = read_problems(args.data)
    params, tokenizer = load(args)
    report = evaluate(
        params,
        tokenizer,
        problems,
        shots=args.shots,
        batch=args.batch,
        max_new_tokens=args.max_new_tokens,
        limit=args.limit,
        draft=args.draft,
        target=args.target,
    )
    print(f"accuracy           {report.accuracy:.3f}")
    print(f"  beyond the shots {report.accuracy_beyond_shots:.3f}")
    print(f"invalid            {report.invalid:.3f}")
    print(f"latency            {report.seconds:.1f} s for {report.problems} problems")
    print(f"output throughput  {report.output_tokens_per_second:.1f} tokens/s")
    if args.draft:
        print(f"{f'draft {args.draft}':<18} {report.acceptance}")
    if args.json:
        report.write(args.json)


def run_quantize(args: argparse.Namespace) -> None:
    try:
        summary = convert(args.source, args.target, args.ignore, choice=args.choice)
    except KeyboardInterrupt:
        print("qnext: the same command goes on with the next file", file=sys.stderr)
        raise
    if args.json:
        print(json.dumps(asdict(summary)))
        return
    print(f"quantised  {summary.quantised} tensors, {summary.kept} kept as they were")
    before, after = summary.bytes_before / 1e9, summary.bytes_after / 1e9
    print(f"bytes      {before:.3f} GB before, {after:.3f} GB after")
    print(f"worst      {summary.worst:.4f} relative RMS error, {summary.worst_name}")
    if summary.zero_rows:
        print(f"zero rows  {summary.zero_rows} output channels are zero in int8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status. Errors of use are one message, not a traceback."""
    args = parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader left, as `| head` does
        sys.stderr.close()
        return 0
    except (qn.QnextError, OSError) as error:
        print(f"qnext: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
