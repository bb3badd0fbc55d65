"""Engines on a small model for tests, and requests of all kinds for them."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

import qnext as qn
from qnext.runtime.engine import Engine
from qnext.runtime.options import Options
from qnext.runtime.request import Output, Request
from qnext.runtime.steps import Steps
from tests.samples import BASE

VOCAB = BASE["vocab_size"]
# few pages: sequences must be swapped out; few rows: they must wait; prompts take many chunks
OPTIONS = Options(
    rows=3, capacity=500, pages=5, chunk=32, snapshot_every=70, cache_bytes=1 << 20, overlap=False
)


@cache
def params() -> qn.Params:
    """Two layers, one of each kind, and an MTP module; random, so nothing it says is likely."""
    layers = ["linear_attention", "full_attention"]
    sizes = {"num_hidden_layers": 2, "layer_types": layers, "mtp_num_hidden_layers": 1}
    torch.manual_seed(3)
    return qn.init_params(qn.Config.from_hf(BASE | sizes))


@cache
def steps(draft: int = 0, target: str = "cpu") -> Steps:
    return Steps(params(), target, **replace(OPTIONS, draft=draft).buckets)


def engine(draft: int = 0, target: str = "cpu", **options: Any) -> Engine:
    """An engine whose steps are shared by all tests of a process with this draft."""
    made = replace(OPTIONS, draft=draft, target=target, **options)
    return Engine(params(), None, made, steps(draft, target))


def serve(served: Engine, requests: Sequence[Request]) -> list[list[Output]]:
    """The outputs of requests that are all there from the beginning."""
    outputs: list[list[Output]] = [[] for _ in requests]
    for request, into in zip(requests, outputs, strict=True):
        served.submit(request, into.append)
    served.run()
    return outputs


def alone(served: Engine, requests: Sequence[Request]) -> list[list[Output]]:
    """The same, one after the other, with nothing cached."""
    return [serve(served, [replace(request, cache=False)])[0] for request in requests]


def tokens_of(outputs: Sequence[Output]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


def ends_of(outputs: Sequence[Output]) -> tuple[Any, ...]:
    """What must not depend on what else is served."""
    last = outputs[-1]
    return tokens_of(outputs), last.finish, last.made, [p for o in outputs for p in o.logprobs]


def is_clean(served: Engine) -> bool:
    """Whether nothing is held once the cache is cleared too."""
    board = served.board
    board.cache.clear()
    return (board.pages.free, board.free_rows) == (served.options.pool, served.options.rows)


def mixture(seed: int, count: int) -> list[Request]:
    """Requests of all kinds; prompts share beginnings, some end where a page does."""
    rng = random.Random(seed)
    base = [rng.randrange(VOCAB) for _ in range(300)]
    requests = []
    for number in range(count):
        shared = rng.choice([0, 1, 60, 127, 128, 129, 255, 256, 257])
        own = rng.randrange(1 if not shared else 0, 40)
        prompt = base[:shared] + [rng.randrange(VOCAB) for _ in range(own)]
        sampling = qn.Sampling(
            temperature=rng.choice([0.0, 0.7, 1.2]),
            top_p=rng.choice([1.0, 0.9]),
            seed=number,
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        )
        requests.append(
            Request(
                tokens=tuple(prompt),
                max_new_tokens=rng.choice([1, 2, 9, 40, 160]),
                sampling=sampling,
                eos=rng.choice([(), (), (5, 7, 11, 13, 17, 19, 23)]),
                min_new_tokens=rng.choice([0, 0, 1]),
                bias=rng.choice([{}, {}, {3: -100.0, 10: 2.0}]),
                logprobs=rng.choice([None, None, 2]),
                priority=rng.choice([0, 0, 1]),
                marks=tuple(sorted(rng.sample(range(1, 300), 2))),
            )
        )
    return requests
