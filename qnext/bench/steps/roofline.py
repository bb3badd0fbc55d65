"""What a machine can do at most, and what a step must do at least."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from qnext.functional.config import ATTENTION
from qnext.functional.params import Params
from qnext.functional.state import Delta, init_state
from qnext.functional.tree import leaves

READ = 1 << 30  # bytes of a pass
SIDE = 2048  # of the square matrices whose product is timed
PASSES = 5
OF_STATE = 7  # operations on each number of a recurrent state: decay, read 2, write 2, ask 2


def bandwidth() -> float:
    """Bytes per second of reading 1 GiB, the best of five passes."""
    block = torch.ones(READ // 4)
    return READ / _best(block.sum)


def arithmetic() -> float:
    """Operations per second of a product of matrices in float32, the best of five."""
    square = torch.ones(SIDE, SIDE)
    return 2 * SIDE**3 / _best(lambda: square @ square)


def _best(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(PASSES):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def decode_bytes(params: Params, batch: int, length: int = 0) -> float:
    """Least bytes that a decode step of `batch` rows of `length` tokens reads and writes.

    Weights once, experts as if all choices differed; recurrent states twice; keys and values once.
    """
    config = params.config
    head = params.head or params.embed
    every = sum(leaf.nbytes for leaf in leaves((params.layers, params.norm, head)))
    state = init_state(config, 1, 1, device="meta")
    recurrent = sum(s.recurrent[0].nbytes for s in state.layers if isinstance(s, Delta))
    idle = sum(leaf.nbytes for leaf in _of_experts(params)) * _idle(params, batch)
    return every - idle + batch * (2 * recurrent + length * token_bytes(params))


def _of_experts(params: Params) -> list[Tensor]:
    """The matrices of all experts, or their integers and scales."""
    layers = zip(params.layers, params.config.is_moe, strict=True)
    return [leaf for p, moe in layers if moe for leaf in leaves((p.ffn.gate_up, p.ffn.down))]


def _idle(params: Params, rows: int) -> float:
    """The share of experts that nobody chooses, if all choices of so many rows differ."""
    config = params.config
    chosen = rows * config.num_experts_per_tok
    return 1 - min(chosen, config.num_experts) / max(config.num_experts, 1)


def token_bytes(params: Params) -> int:
    """Bytes of the keys and values of one token."""
    config = params.config
    layers = sum(kind == ATTENTION for kind in config.layer_types)
    return 2 * layers * config.num_key_value_heads * config.head_dim * params.embed.itemsize


def prefill_flops(params: Params, length: int) -> float:
    """Operations of reading a prompt: products with weights, attention, the recurrence.

    Of the head one token's; of experts those that are chosen.
    """
    config = params.config
    attention = config.layer_types.count(ATTENTION)
    delta = len(config.layer_types) - attention
    weights = sum(leaf.numel() for leaf in leaves(params.layers) if leaf.ndim > 1)
    idle = sum(leaf.numel() for leaf in _of_experts(params)) * _idle(params, 1)
    seen = length * (length + 1) / 2  # pairs of a query and a key before it
    scores = 4 * attention * config.num_attention_heads * config.head_dim * seen
    state = config.linear_num_value_heads * config.linear_key_head_dim
    state *= config.linear_value_head_dim
    head = 2 * config.vocab_size * config.hidden_size
    return 2 * (weights - idle) * length + scores + OF_STATE * delta * state * length + head
