"""Whether a precision computes on the cpu target what the float32 reference does; as JSON.

    python -m benchmarks.peers.check MODEL FLOAT_MODEL f32|bf16|q8_0 THREADS CAPACITY

Tells the bytes of its weights as well, and those of a state of one row with that capacity.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qnext as qn
from benchmarks.cpu import Case, check
from qnext.bench.steps.measure import random_tokens
from qnext.functional.tree import leaves

NAMES = {"f32": "cpu float32", "bf16": "cpu bfloat16", "q8_0": "cpu W8A8"}  # as benchmarks.cpu's
SEQ, STEPS = 70, 4


def logits_of(case: Case) -> Tensor:
    """Logits after the prompt and after each of a few decode steps."""
    params, (batch, seq) = case.params, case.tokens.shape
    state = qn.init_state(params.config, batch, seq + STEPS, dtype=params.embed.dtype)
    logits, state = case.prefill(params, state, case.tokens, case.lengths)
    rows = [logits.float()]
    for step in range(STEPS):
        logits, state = case.decode(params, state, case.tokens[:, step])
        rows.append(logits.float())
    return torch.stack(rows)


def fault(precision: str, logits: Tensor, reference: Tensor) -> str | None:
    """What is wrong with the logits, if anything is."""
    try:
        check(NAMES[precision], logits, reference)
    except SystemExit as error:
        return str(error)
    return None


def examine(path: Path, float_path: Path, precision: str, capacity: int) -> dict[str, Any]:
    """red: what is wrong, or None. Bytes of weights and state."""
    params, floats = qn.load(path), qn.load(float_path)
    tokens = random_tokens(floats, 1, SEQ)
    reference = logits_of(Case("reference", floats, tokens))
    state = qn.init_state(params.config, 1, capacity, dtype=params.embed.dtype, device="meta")
    return {
        "red": fault(precision, logits_of(Case("cpu", params, tokens)), reference),
        "weights_bytes": sum(leaf.nbytes for leaf in leaves(params)),
        "state_bytes": sum(leaf.nbytes for leaf in leaves(state)),
    }


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(json.dumps(examine(*map(Path, sys.argv[1:3]), sys.argv[3], int(sys.argv[5]))))
