"""Arguments that several commands have, and the model that they name."""

import argparse
from pathlib import Path
from typing import TypeAlias

import torch

import qnext as qn
from qnext.functional.speculate import check_module
from qnext.text import Tokenizer

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_verb(
    verbs: Verbs, name: str, help: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """A command whose help ends in examples, as they are written."""
    return verbs.add_parser(
        name,
        help=help,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="checkpoint directory")
    verb.add_argument(
        "--dtype", choices=DTYPES, help="compute in (default: as stored; the demo: float32)"
    )


PUBLISHED = "qwen3-next-80b"  # an architecture that needs no file


def architecture(model: str | None) -> qn.Config:
    """The config of a checkpoint's directory or config.json, or of `PUBLISHED`; None: the demo's.

    Raises ConfigError.
    """
    if model is None:
        return qn.demo().config
    known = PUBLISHED in model.lower() and not Path(model).exists()
    return qn.Config.from_hf({"model_type": "qwen3_next"} if known else model)


def add_draft(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--draft",
        type=int,
        default=0,
        metavar="K",
        help="guess K tokens ahead with the checkpoint's MTP module and verify them in one call of "
        "the model; in float32 no token changes. What was accepted is told (default: 0)",
    )


def add_target(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--target",
        choices=("cpu", "reference"),
        default="cpu",
        help="cpu: kernels for this machine, compiled once (default); reference: PyTorch",
    )


def load(
    args: argparse.Namespace, mapped: bool = True, mesh: qn.Mesh | None = None
) -> tuple[qn.Params, Tokenizer]:
    """Params and tokenizer of the command's model, which can draft where that is asked.

    `mapped` is that of `qn.load`: for commands that end before anyone changes a checkpoint. mesh:
    of which only a rank's part is wanted.
    """
    if args.draft < 0:
        raise qn.InputError(f"draft must be an integer >= 0, got {args.draft}")
    dtype = DTYPES.get(args.dtype)
    if args.model is None:
        params = qn.demo(dtype or torch.float32)
        return params if mesh is None else qn.shard(params, mesh), qn.tokenizer()
    qn.Config.from_hf(args.model)  # what can be refused at once is, before weights are read
    tokenizer = qn.tokenizer(args.model)
    params = qn.load(args.model, dtype=dtype, mapped=mapped, mesh=mesh)
    if args.draft:
        check_module(params)
    return params, tokenizer
