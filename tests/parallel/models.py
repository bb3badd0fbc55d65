"""What ranks compute of a model that they share, beside what one process computes of all of it."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import qnext as qn
from qnext.functional.tree import map_leaves
from tests.sequences import model, words

# heads, experts and vocabulary that four ranks can share; no two axes of equal size
EVEN: dict[str, Any] = {
    "vocab_size": 212,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 12,
    "head_dim": 20,
    "num_experts": 9,
    "intermediate_size": 52,
    "mtp_num_hidden_layers": 1,
}
ROWS, CAPACITY = 5, 290
LENGTHS = (31, 127, 0, 130, 2)
MORE = (5, 1, 3, 0, 4)


class Mixed(NamedTuple):
    """A mesh, and how the model that it shares differs from the usual one."""

    tp: int = 1
    dp: int = 1
    ep: int = 0
    whole: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    int8: bool = False
    changes: tuple[tuple[str, Any], ...] = ()


@cache
def whole_params(mixed: Mixed) -> qn.Params:
    params = model(compute=mixed.dtype, **EVEN | dict(mixed.changes))
    return qn.quantize(params) if mixed.int8 else params


@cache
def joined(tp: int, dp: int, ep: int, whole: tuple[str, ...]) -> qn.Mesh:
    return qn.join(tp, dp, ep, whole=whole)


SHARES = {1: [[0, 1, 2, 3, 4]], 2: [[0, 1, 3], [2, 4]], 4: [[0, 3], [2, 4], [1], []]}


def rows_of(mesh: qn.Mesh) -> list[int]:
    """The sequences of a rank's group: some have more, and the last of four has none."""
    return SHARES[mesh.dp][mesh.index("dp")]


def computed(params: qn.Params, rows: list[int], batch: int) -> dict[str, Tensor]:
    """Logits of some of the sequences: prompts, a second chunk, verified guesses, decode steps.

    Further rows, up to `batch`, are computed for others' sake: what they consume is of no matter.
    """
    index = torch.tensor(rows + [0] * (batch - len(rows)))
    real = torch.arange(batch) < len(rows)
    state = qn.init_state(params.config, batch, CAPACITY, draft=2)
    found = {}
    _, state = qn.forward(
        params, state, words(130, seed=5)[index], real * torch.tensor(LENGTHS)[index]
    )
    counts = real * torch.tensor(MORE)[index]
    logits, state = qn.forward(params, state, words(5, seed=6)[index], counts)
    valid = torch.arange(5) < counts[:, None]
    found["forward"] = logits.where(valid[..., None], 0)
    found["verify"], state = qn.verify(params, state, words(3, seed=7)[index])
    state = qn.commit(state, torch.tensor([2, 1, 3, 1, 2])[index])
    found["prefill"], state = qn.prefill(params, state, words(4, seed=9)[index])
    for step in range(2):
        tokens = words(2, seed=8)[index][:, step]
        found[f"decode {step}"], state = qn.decode(params, state, tokens)
    return {name: logits[: len(rows)].float() for name, logits in found.items()}


def on_ranks(mixed: Mixed) -> dict[str, tuple[Tensor, ...]]:
    """What a rank computes with its part of the model, and one process with all of it; in bfloat16
    also what the same weights make in float32."""
    mesh = joined(*mixed[:4])
    params = whole_params(mixed)
    batch = max(map(len, SHARES[mesh.dp]))
    everything = list(range(ROWS))
    with torch.no_grad():
        found = [computed(qn.shard(params, mesh), rows_of(mesh), batch)]
        found.append(computed(params, everything, ROWS))
        if mixed.dtype == torch.bfloat16:
            found.append(computed(exact(params), everything, ROWS))
    mine, *others = found
    if not rows_of(mesh):
        return {}
    index = torch.tensor(rows_of(mesh))
    return {name: (mine[name], *(other[name][index] for other in others)) for name in mine}


def long_prompts(mixed: Mixed, seq: int) -> tuple[Tensor, Tensor]:
    """Logits of two prompts in a rank's group, and of one process."""
    params, tokens = whole_params(mixed), words(seq, seed=3)[:2]
    made = []
    with torch.no_grad():
        for each in (qn.shard(params, joined(*mixed[:4])), params):
            state = qn.init_state(each.config, 2, CAPACITY)
            made.append(qn.forward(each, state, tokens)[0])
    return made[0], made[1]


def exact(params: qn.Params) -> qn.Params:
    """The same numbers, computed with in float32."""
    precise = {"compute": torch.float32, "logits": torch.float32}
    wide = map_leaves(lambda leaf: leaf if leaf.dtype == torch.int8 else leaf.float(), params)
    return wide._replace(config=params.config.with_precision(**precise))


PROMPTS = (
    "Question: Mia has 12 apples. She buys 7 more and then gives 5 to Tom. How many are left?",
    "Question: Ben has 3 boxes of 4 pens.",
    "The",
)


def texts(int8: bool, tp: int, dp: int, whole: tuple[str, ...], draft: int) -> tuple[Any, Any]:
    """What ranks continue prompts with, and what one process does; some of it drawn."""
    mesh, params, tokenizer = joined(tp, dp, 0, whole), qn.demo(), qn.tokenizer()
    params = qn.quantize(params) if int8 else params
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    lengths = torch.tensor([len(each) for each in ids])
    tokens = torch.zeros(len(ids), int(lengths.max()), dtype=torch.int64)
    for row, each in zip(tokens, ids, strict=True):
        row[: len(each)] = torch.tensor(each)
    sampling = [qn.Sampling(temperature=t, seed=9) for t in (0.0, 0.8, 1.2)]

    def made(params: qn.Params) -> list[list[int]]:
        state = qn.init_state(params.config, len(ids), 200, draft=draft)
        new, _ = qn.generate(params, state, tokens, 40, lengths, sampling=sampling, draft=draft)
        return new.tolist()

    return made(qn.shard(params, mesh)), made(params)
