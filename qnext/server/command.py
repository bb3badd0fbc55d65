"""`qnext serve`: its options, and what they make."""

import argparse
import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qnext.arguments import Verbs, add_draft, add_model, add_verb
from qnext.arguments import load as load_model
from qnext.errors import InputError
from qnext.functional.mesh import TABLE
from qnext.lowering.target import TARGETS
from qnext.runtime.options import Options
from qnext.server.guard import MOST_BYTES

if TYPE_CHECKING:
    from qnext.functional.params import Params
    from qnext.handoff.transport import Transport
    from qnext.runtime.engine import Engine
    from qnext.runtime.steps import Steps
    from qnext.server.host import Ready, Role

EXAMPLES = """\
examples:
  qnext serve                                           the demo, on http://127.0.0.1:8000
  qnext serve Qwen3-Next-80B-W8A8 --draft 1 --target npu:910b --rows 32 --capacity 32768
  qnext serve --port 8080 --api-key-file keys.txt --address 0.0.0.0
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Who are you?"}]}'

Open / in a browser to chat. The first Ctrl-C (or SIGTERM) lets answers under way finish and takes
no new ones; the second ends at once. docs/serving.md tells more.
"""


def add_serve(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "serve",
        help="answer over HTTP, as OpenAI's API does",
        description="An HTTP server with OpenAI's API: completions, chat, tools, grammars, "
        "metrics, and a page to chat on. Needs the extra: pip install 'qnext[serve]'.",
        epilog=EXAMPLES,
    )
    add_model(verb)
    verb.add_argument("--name", help="what clients call the model (default: its directory's name)")
    add_draft(verb)
    _add_engine(verb)
    _add_ranks(verb)
    _add_role(verb)
    _add_listening(verb)


# options of the engine that are a number: its unit, and what it is
NUMBERS = {
    "capacity": ("N", "tokens of one conversation, prompt and answer"),
    "rows": ("N", "requests that run at once"),
    "chunk": ("N", "tokens of prompts in one step, so how long decoding waits at most"),
    "cache_bytes": ("B", "states kept for prompts that begin alike; 0: none"),
    "snapshot_every": ("N", "tokens between these states, beside those at ends of messages"),
    "file_bytes": ("B", "files of such states, with --cache-dir"),
    "max_waiting": ("N", "requests that may wait; more are refused, 429"),
}


def _add_engine(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("engine")
    default = Options()
    group.add_argument(
        "--target", choices=TARGETS, default="cpu", help="what steps are lowered for (default: cpu)"
    )
    group.add_argument("--strict", action="store_true", help="an error where a rule takes no site")
    for name, (unit, text) in NUMBERS.items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=getattr(default, name),
            metavar=unit,
            help=f"{text} (default: {getattr(default, name)})",
        )
    group.add_argument(
        "--pages", type=int, metavar="N", help="pages of 128 tokens, for all of them together"
    )
    group.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="keep states in files, too, over restarts"
    )
    group.add_argument("--no-warm", action="store_true", help="compile steps when first needed")


def _add_ranks(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group(
        "ranks",
        "A model that several processes share, on one machine or more: docs/parallel.md. "
        "torchrun --nproc-per-node 4 -m qnext serve MODEL --tp 4",
    )
    group.add_argument(
        "--tp", type=int, default=1, metavar="N", help="ranks that share heads (default: 1)"
    )
    group.add_argument(
        "--dp",
        type=int,
        default=1,
        metavar="N",
        help="groups of such ranks, each with requests of its own; group g listens on --port + g, "
        "for a router to choose (default: 1)",
    )
    group.add_argument(
        "--ep", type=int, default=0, metavar="N", help="ranks that share experts (default: all)"
    )
    group.add_argument(
        "--whole",
        action="append",
        default=[],
        metavar="AXIS",
        choices=tuple(TABLE),
        help=f"what is not divided after all, repeatable: {', '.join(TABLE)}",
    )


def _add_role(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group(
        "prefill and decode apart",
        "One server reads prompts, another one answers them: docs/handoff.md. Behind sglang-router "
        "the bootstrap port is this server's --port.",
    )
    group.add_argument("--role", choices=("prefill", "decode"), help="default: both")
    group.add_argument(
        "--transport",
        choices=("mooncake", "group"),
        default="mooncake",
        help="what moves states: Mooncake, or torch.distributed (default: mooncake)",
    )
    group.add_argument(
        "--reach",
        default="127.0.0.1",
        metavar="HOST",
        help="this machine's name or address as the other side reaches it (default: 127.0.0.1)",
    )
    group.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="HOST",
        help="whom requests to a decoder may name as the one that prefills, repeatable (default: "
        "anybody, who is not told the --api-key then)",
    )
    group.add_argument(
        "--handoff-bytes",
        type=int,
        metavar="B",
        help="states on their way (default: as many as the pages hold)",
    )
    group.add_argument(
        "--handoff-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="how long one may take, the reading of the prompt included, and a value wait for its "
        "decoder; then the decoder reads the prompt itself (default: 30)",
    )


def _add_listening(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("listening")
    group.add_argument("--address", default="127.0.0.1", help="default: 127.0.0.1, this machine")
    group.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free one")
    group.add_argument("--api-key", action="append", default=[], metavar="KEY", help="repeatable")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="a key a line")
    group.add_argument("--cors-origin", action="append", default=[], metavar="URL")
    group.add_argument(
        "--timeout", type=float, metavar="S", help="seconds a request may take (default: any)"
    )
    group.add_argument("--max-body", type=int, default=MOST_BYTES, metavar="B", help="bytes")
    group.add_argument(
        "--drain", type=float, default=60.0, metavar="S", help="seconds to finish after a signal"
    )
    group.add_argument("--log-json", action="store_true", help="a JSON object a line")
    group.add_argument("--quiet", action="store_true", help="no line for each request")
    verb.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    """Serve until a signal; returns the exit status."""
    try:
        from qnext.server.host import Host
        from qnext.server.run import Listening, serve
    except ModuleNotFoundError as error:
        raise InputError(
            f"qnext serve needs {error.name}, of its extra: pip install 'qnext[serve]'"
        ) from error
    if args.role == "prefill" and not args.port:
        raise InputError("--role prefill: give the --port that decoders are to reach, not 0")
    given = vars(args)
    options = Options(**{f.name: given[f.name] for f in fields(Options) if f.name in given})
    _log(args.quiet, args.log_json)
    rank = rank_of(args)
    if rank % args.tp:
        return _follow(args, options)
    group, port = rank // args.tp, args.port
    if args.dp > 1:  # each group has its own
        port = port + group if port else 0
        files = options.cache_dir and options.cache_dir / f"group-{group}"
        options = replace(options, cache_dir=files)
    listening = Listening(
        address=args.address,
        port=port,
        keys=_keys(args),
        origins=tuple(args.cors_origin),
        most_bytes=args.max_body,
        drain_seconds=args.drain,
        json_log=args.log_json,
    )
    name = args.name or (args.model.resolve().name if args.model else "demo")
    return serve(Host(name, {"target": args.target}), _loader(args, options), listening)


def _loader(args: argparse.Namespace, options: Options) -> "Callable[[], Ready]":
    def load() -> "Ready":
        from qnext.runtime.engine import Engine
        from qnext.runtime.parallel import join
        from qnext.runtime.service import Service
        from qnext.server.asked import Reader
        from qnext.server.guide import Grammars
        from qnext.server.host import Ready

        axes = (args.tp, args.dp, args.ep)
        mesh = None
        if args.tp * args.dp > 1:
            mesh = join(*axes, whole=tuple(args.whole), backend=backend_of(args))
        params, tokenizer = load_model(args, mapped=False, mesh=mesh)
        engine = Engine(params, tokenizer, options, _shared(params, options))
        if not args.no_warm:
            engine.warm(progress=sys.stderr.isatty())
        vocab = params.config.vocab_size
        grammars = Grammars(tokenizer, vocab)
        reader = Reader(tokenizer, grammars, options.capacity, vocab, args.timeout)
        return Ready(Service(engine), tokenizer, reader, _role(args, engine))

    return load


def rank_of(args: argparse.Namespace) -> int:
    """This process's number among those of torchrun; 0 where there is one. Raises InputError."""
    from torch import distributed as dist

    for axis in ("tp", "dp"):
        if getattr(args, axis) < 1:
            raise InputError(f"--{axis} must be an integer >= 1, got {getattr(args, axis)}")
    ranks = args.tp * args.dp
    if ranks == 1:
        return 0
    if not dist.is_torchelastic_launched():
        asked = f"--tp {args.tp}" + (f" --dp {args.dp}" if args.dp > 1 else "")
        raise InputError(
            f"{asked} takes {ranks} processes: torchrun --nproc-per-node {ranks} "
            f"-m qnext serve ... {asked}"
        )
    if backend_of(args) == "hccl":
        from qnext.lowering.npu.probe import use_device

        use_device(dist.get_node_local_rank())
    dist.init_process_group(backend_of(args))
    return dist.get_rank()


def backend_of(args: argparse.Namespace) -> str:
    """By what ranks reach each other's memory."""
    return "hccl" if TARGETS[args.target].kind == "npu" else "gloo"


def _follow(args: argparse.Namespace, options: Options) -> int:
    """What all ranks of a group but the first do."""
    from qnext.runtime.parallel import join
    from qnext.runtime.ranks import Channel, follow
    from qnext.runtime.request import RankError

    # a signal for all of them is for the first to act on
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    whole = tuple(args.whole)
    mesh = join(args.tp, args.dp, args.ep, whole=whole, backend=backend_of(args))
    channel = Channel(mesh)
    try:
        params, _ = load_model(args, mapped=False, mesh=mesh)
        follow(channel, params, options)
    except RankError as error:
        print(f"qnext: rank {mesh.rank} ends: {error}", file=sys.stderr)
        return 3
    except Exception as error:
        channel.failed(error)
        raise
    return 0


def _shared(params: "Params", options: Options) -> "Steps | None":
    """Steps that other ranks make as well, if there are any."""
    from qnext.runtime.ranks import Channel, SharedSteps

    mesh = params.config.mesh
    if mesh.ranks == 1:
        return None
    return SharedSteps(Channel(mesh), params, options.target, options.strict, **options.buckets)


def _role(args: argparse.Namespace, engine: "Engine") -> "Role | None":
    if args.role is None:
        return None
    import torch

    from qnext.handoff.group import GroupTransport
    from qnext.handoff.mooncake import MooncakeTransport
    from qnext.server.roles import Decoder, Prefiller, pool_bytes

    device = engine.params.embed.device
    nbytes = args.handoff_bytes or pool_bytes(engine)
    pool = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    if args.transport == "group":
        transport: Transport = GroupTransport(pool, args.reach)
    else:
        protocol = "tcp" if device.type == "cpu" else "ascend"
        transport = MooncakeTransport(pool, args.reach, protocol)
    if args.role == "prefill":
        return Prefiller(engine, transport, args.reach, args.port, args.handoff_seconds)
    key = next(iter(_keys(args)), None)
    return Decoder(engine, transport, args.handoff_seconds, args.peer, key)


def _keys(args: argparse.Namespace) -> tuple[str, ...]:
    keys = list(args.api_key)
    if args.api_key_file:
        keys += args.api_key_file.read_text(encoding="utf-8").split()
        if not keys:
            raise InputError(f"{args.api_key_file}: has no key; write one a line")
    if any(not key for key in keys):
        raise InputError("--api-key: is empty; leave it out to serve without keys")
    return tuple(keys)


def _log(quiet: bool, json_lines: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(message)s" if json_lines else "%(asctime)s %(message)s")
    )
    logger = logging.getLogger("qnext")
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
