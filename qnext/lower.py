"""`qnext lower`: what a step becomes on a target, read on a machine that has none of it."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import qnext as qn
from qnext.arguments import PUBLISHED, Verbs, add_verb, architecture
from qnext.bench.files import check_file
from qnext.errors import InputError
from qnext.functional.mesh import Mesh
from qnext.functional.quantize import quantize
from qnext.lowering.stages import Lowered
from qnext.lowering.target import TARGETS, resolve

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
STEPS: dict[str, Callable[..., Any]] = {
    "decode": qn.decode,
    "advance": qn.advance,
    "verify": qn.verify,
    "speculate": qn.speculate,
    "prefill": qn.prefill,
}
DESCRIPTION = """\
Lower a step of a model for a target and tell what became of each primitive, how many launches a
captured graph would have, and what the step costs at the target's roofline. Only shapes are needed:
neither weights nor the target are here.
"""
EXAMPLES = f"""\
examples:
  qnext lower                                           the demo's decode step on a 910B
  qnext lower {PUBLISHED} --html step.html          a page to look at: sites, verdicts, bars
  qnext lower {PUBLISHED} --w8a8 --text | less      a line a site
  qnext lower {PUBLISHED} --step prefill --seq 4096 --target npu:a3
  qnext lower {PUBLISHED} --tp 4 --dp 4 --batch 6   the step of one rank of 16
  qnext lower --fact custom_conv=sgl                    with sgl-kernel-npu's convolution

`qnext doctor` tells which facts hold on a machine with a chip. docs/lowering.md tells the rules.
"""


def add_lower(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "lower",
        help="what a step becomes on a target",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    verb.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"a checkpoint's directory or config.json, or {PUBLISHED}, which needs no file",
    )
    verb.add_argument("--step", choices=tuple(STEPS), default="decode", help="default: decode")
    verb.add_argument("--target", choices=TARGETS, default="npu:910b", help="default: npu:910b")
    for name, default, what in (
        ("batch", 1, "sequences"),
        ("capacity", 4096, "tokens that a sequence has room for"),
        ("seq", 512, "tokens of a prompt, for prefill"),
        ("draft", 1, "guesses, for verify and speculate"),
        ("tp", 1, "ranks that share heads"),
        ("dp", 1, "groups of ranks with requests of their own"),
        ("ep", 0, "ranks that share experts: all where it is 0"),
    ):
        text = f"{what} (default: {default})"
        verb.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    verb.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="compute and states (default: bfloat16)"
    )
    verb.add_argument("--w8a8", action="store_true", help="int8 weights and tokens")
    verb.add_argument(
        "--host-lengths", action="store_true", help="attention takes lengths from the host"
    )
    verb.add_argument(
        "--fact",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="decide a fact of the target otherwise; repeatable",
    )
    group = verb.add_argument_group("results, beside the report on standard output")
    group.add_argument("--text", action="store_true", help="print a line a site instead")
    group.add_argument("--html", type=Path, metavar="FILE", help="write a page that stands alone")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the cost analysis")
    verb.set_defaults(run=run_lower)


def run_lower(args: argparse.Namespace) -> int:
    """Lower and report; returns the exit status, 1 where primitives stay on the reference."""
    check_file("--html", args.html)
    check_file("--json", args.json)
    lowered = lower(args)
    if args.html:
        args.html.write_text(lowered.as_html(), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(lowered.cost_analysis(), indent=1) + "\n")
    print(lowered.as_text() if args.text else summary(lowered))
    return 1 if lowered.left and lowered.target.kind != "reference" else 0


def lower(args: argparse.Namespace) -> Lowered:
    """The lowered step that the command asks for. Raises InputError, ConfigError, TargetError."""
    for name in ("batch", "capacity", "seq", "draft"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be an integer >= 1, got {getattr(args, name)}")
    drafts = args.step in ("verify", "speculate")
    config = architecture(args.model)
    dtype = DTYPES[args.dtype]
    config = config.with_precision(compute=dtype, state=dtype)
    mtp = max(config.mtp_layers, int(args.step == "speculate"))
    mesh = Mesh(args.tp, args.dp, args.ep).for_vocab(config.vocab_size)
    config = replace(config, mesh=mesh, mtp_layers=mtp)
    seq = {"prefill": args.seq, "verify": args.draft + 1}.get(args.step)
    if seq is not None and seq > args.capacity:
        raise InputError(f"{seq} tokens do not fit a capacity of {args.capacity}: --capacity {seq}")
    draft = args.draft if drafts else 0
    params, state, tokens = qn.specs(config, args.batch, args.capacity, seq=seq, draft=draft)
    params = quantize(params) if args.w8a8 else params
    more = [args.draft] if args.step == "speculate" else []
    traced = qn.jit(STEPS[args.step], donate="state").trace(params, state, tokens, *more)
    target = resolve(args.target, **dict(map(_fact, args.fact)))
    return traced.lower(target, host_lengths=args.host_lengths)


def _fact(text: str) -> tuple[str, Any]:
    """`custom_conv=sgl`, `chunk_delta_rule=false`, `max_verify_tokens=4` as name and value."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--fact {text}: write a name and a value, as --fact custom_conv=sgl")
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    return name, words.get(value.lower(), int(value) if value.isdecimal() else value)


def summary(lowered: Lowered) -> str:
    """What the step costs, and what became of primitives."""
    cost = lowered.cost_analysis()
    lines = [
        f"{lowered.trace.name} on {lowered.target.name}"
        + (f", {cost['chip']}" if cost["chip"] else ""),
        f"{cost['launches']:,} launches, {cost['flops'] / 1e9:.3g} GFLOP, "
        f"{cost['bytes'] / 1e9:.3g} GB",
    ]
    if cost["chip"]:
        lines.append(
            f"{1e3 * cost['seconds_at_roofline']:.3g} ms at the roofline, "
            f"{1e3 * cost['seconds_of_launches']:.3g} ms of launching alone"
        )
    return "\n".join([*lines, "", lowered.report()])
