"""`qnext plan`: its options and its report."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qnext.arguments import PUBLISHED, Verbs, add_verb, architecture
from qnext.bench.files import check_files
from qnext.errors import InputError
from qnext.functional.config import Config
from qnext.functional.mesh import Mesh
from qnext.planner import show
from qnext.planner.assumed import (
    MACHINES,
    MEASURED_CARDS,
    MEASURED_LOAD,
    Load,
    Machine,
)
from qnext.planner.plan import Plan, plan, with_prefill
from qnext.planner.plot import draw
from qnext.planner.search import meshes, ranked

BEST = 5  # plans that are shown
DESCRIPTION = """\
How a model would do on many cards, on paper: what each holds, how many requests there is room for,
and the time for a token, from steps lowered on shapes. Nothing is measured. Without --tp, --dp and
--ep it tells the best plans it finds; with them, that plan beside the best.
"""
EXAMPLES = """\
examples:
  qnext plan                                            the published 80B model on 16 cards
  qnext plan --tp 4 --dp 4 --ep 16                      a plan of one's own, beside the best
  qnext plan --tp 16 --dp 4                             as SGLang counts: tp of all groups together
  qnext plan --chip 910b --cards 8 --w8a8 --requests 64 --plot plan.png
  qnext plan --model path/to/checkpoint --cards 1024 --requests 8192 --json plan.json
  qnext plan --draft 1 --accepted 0.9 --launch-us 5     with guesses, and another cost of a launch

A card is a device as torch_npu counts them: a 910C has two. docs/parallel.md tells the words.
"""


def add_plan(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "plan",
        help="a model on many cards, on paper",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    verb.add_argument(
        "--model",
        default=PUBLISHED,
        metavar="MODEL",
        help=f"a checkpoint's directory or config.json; default: {PUBLISHED}, the published "
        "architecture, which needs no file",
    )
    verb.add_argument("--cards", type=int, default=MEASURED_CARDS, metavar="N", help="default: 16")
    verb.add_argument("--chip", choices=tuple(MACHINES), default="a3", help="default: a3")
    for axis, what in (
        ("tp", "ranks of a group"),
        ("dp", "groups"),
        ("ep", "ranks that share experts"),
    ):
        verb.add_argument(f"--{axis}", type=int, metavar="N", help=what)
    verb.add_argument("--w8a8", action="store_true", help="int8 weights and tokens")
    _add_load(verb)
    _add_machine(verb)
    group = verb.add_argument_group("results, beside the report on standard output")
    group.add_argument("--json", type=Path, metavar="FILE", help="write all plans and assumptions")
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="draw times and memory")
    verb.set_defaults(run=run_plan)


def _add_load(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("load")
    for name, what in (
        ("requests", "that run at once"),
        ("prompt", "tokens of a prompt"),
        ("output", "tokens of an answer"),
        ("draft", "guesses a step"),
    ):
        default = getattr(MEASURED_LOAD, name)
        text = f"{what} (default: {default:,})"
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    group.add_argument(
        "--accepted",
        type=float,
        default=MEASURED_LOAD.accepted,
        metavar="P",
        help=f"share of guesses that are right (default: {MEASURED_LOAD.accepted})",
    )


def _add_machine(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("assumptions; defaults are told in the report")
    for name, _, what in UNITS:
        kind = int if name == "island" else float
        group.add_argument(f"--{name}", type=kind, metavar="X", help=what)


UNITS = (  # of options: what one of them is in the units of `Machine`
    ("launch-us", 1e-6, "a node of a captured graph, beside its work"),
    ("collective-us", 1e-6, "a collective, beside its bytes"),
    ("link-gb", 1e9, "GB/s a card within an island"),
    ("network-gb", 1e9, "GB/s a card between islands"),
    ("island", 1, "cards that fast links join"),
    ("usable", 1, "share of a card's memory, 0 to 1"),
)


def machine_of(args: argparse.Namespace) -> Machine:
    """The chip's machine with the command's own figures. Raises InputError."""
    changes: dict[str, Any] = {}
    for option, unit, _ in UNITS:
        value = getattr(args, option.replace("-", "_"))
        if value is None:
            continue
        if value <= 0 or (option == "usable" and value > 1):
            rule = "lie in 0..1" if option == "usable" else "be > 0"
            raise InputError(f"--{option} must {rule}, got {value:g}")
        changes[option.partition("-")[0]] = value * unit
    return replace(MACHINES[args.chip], **changes)


def config_of(args: argparse.Namespace) -> Config:
    """The model's config in bfloat16, states too. Raises InputError, ConfigError."""
    config = architecture(args.model)
    if args.draft and not config.mtp_layers:
        config = replace(config, mtp_layers=1)
    return config.with_precision(compute=torch.bfloat16, state=torch.bfloat16)


def mesh_of(args: argparse.Namespace, config: Config) -> tuple[Mesh | None, str]:
    """The mesh that was asked for, if any, and how it was read. Raises InputError."""
    cards, told = args.cards, ""
    if type(cards) is not int or cards < 1:
        raise InputError(f"--cards must be an integer >= 1, got {cards!r}")
    tp, dp, ep = args.tp, args.dp, args.ep
    if (tp, dp, ep) == (None, None, None):
        return None, ""
    if tp is None:
        tp = cards // dp if dp else 1
    if dp is None:
        dp = cards // tp if tp else 1
    if tp == cards and dp > 1 and tp % dp == 0:
        told = (
            f"--tp {tp} is all {cards} cards: read as SGLang counts, {dp} groups of {tp // dp} "
            f"(tp {tp // dp}, dp {dp})"
        )
        tp //= dp
    mesh = Mesh(tp, dp, ep or 0).for_vocab(config.vocab_size)
    if mesh.ranks != cards:
        raise InputError(
            f"tp = {tp} times dp = {dp} are {mesh.ranks} cards, --cards says {cards}: "
            f"--cards {mesh.ranks}, or leave out --tp or --dp"
        )
    return mesh, told


def run_plan(args: argparse.Namespace) -> int:
    """Plan and report; returns the exit status, 1 where the plan does not fit."""
    config, machine = config_of(args), machine_of(args)
    load = Load(args.requests, args.prompt, args.output, args.draft, args.accepted)
    mesh, told = mesh_of(args, config)
    check_files(args.json, args.plot)
    plans, asked = planned(config, args.w8a8, args.cards, load, machine, mesh)
    chosen = asked or plans[0]
    title = show.title(config, args.w8a8, args.cards, load, machine)
    if args.json:
        made = as_json(args, plans, chosen, machine, load)
        args.json.write_text(json.dumps(made, indent=1) + "\n")
    if args.plot:
        same = args.cards == MEASURED_CARDS and load == MEASURED_LOAD
        draw(plans, load.length, title, same, args.plot)
    print(title, *([told] if told else []), "", sep="\n")
    print(show.table(plans, asked), "", sep="\n")
    print(f"tp {chosen.mesh.tp}, dp {chosen.mesh.dp}, ep {chosen.mesh.ep}:")
    print(show.account(chosen), show.advice(chosen, config, load, machine), "", sep="\n")
    print(show.measured(args.cards, load), "", "assumed:", sep="\n")
    print("\n".join(f"- {line}" for line in show.assumptions(machine)))
    return 0 if chosen.fits else 1


def planned(
    config: Config,
    int8: bool,
    cards: int,
    load: Load,
    machine: Machine,
    mesh: Mesh | None = None,
) -> tuple[list[Plan], Plan | None]:
    """(the best plans, and the one that was asked for among them, that one)."""
    wanted = dict.fromkeys([*meshes(config, int8, cards, load, machine), *([mesh] if mesh else [])])
    if not wanted:
        raise InputError(
            f"no mesh of {cards} cards divides the heads of this model: give --tp, --dp"
        )
    with tqdm(wanted, desc="plans", unit="plan", leave=False) as bar:
        found = ranked([plan(config, int8, each, load, machine) for each in bar])
    kept = found[:BEST]
    kept += [p for p in found[BEST:] if p.mesh == mesh]
    with tqdm(kept, desc="prompts", unit="plan", leave=False) as bar:
        kept = [with_prefill(each, config, int8, load, machine) for each in bar]
    return kept, next((p for p in kept if p.mesh == mesh), None)


def as_json(
    args: argparse.Namespace, plans: list[Plan], chosen: Plan, machine: Machine, load: Load
) -> dict[str, Any]:
    """Everything that the report tells, and the parts of all plans."""
    given = {k: str(v) for k, v in vars(args).items() if k not in ("run", "verb") and v is not None}
    return {
        "arguments": given,
        "assumed": list(show.assumptions(machine)),
        "measured_by_others": show.measured(args.cards, load),
        "chosen": chosen.to_dict(),
        "plans": [each.to_dict() for each in plans],
    }
