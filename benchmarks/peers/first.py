"""Load a checkpoint and compute its first token on the cpu target; the seconds as JSON.

    python -m benchmarks.peers.first MODEL THREADS

Imports are inside the functions, as they are timed.
"""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import qnext as qn


def kept() -> list[str]:
    """What W8A8 leaves in floats where the head is in int8 too, as q8_0 has it."""
    from qnext.functional.quantize import KEPT

    return [name for name in KEPT if name not in ("lm_head", "mtp.fc")]


def convert(path: Path, precision: str) -> "qn.Params":
    """The checkpoint as `precision` has it."""
    import torch

    import qnext as qn

    if precision == "bf16":
        return qn.load(path, dtype=torch.bfloat16)
    params = qn.load(path)
    return qn.quantize(params, ignore=kept()) if precision == "q8_0" else params


def first_token(path: Path, threads: int) -> dict[str, float]:
    """Seconds of importing qnext, and of all that lies between that and a token."""
    began = time.perf_counter()
    import torch

    import qnext as qn

    imported = time.perf_counter()
    torch.set_num_threads(threads)
    params = qn.load(path, mapped=True)
    state = qn.init_state(params.config, batch=1, capacity=2, dtype=params.embed.dtype)
    arguments = (params, state, torch.ones(1, 1, dtype=torch.int64))
    # strict: a machine without a compiler is no reason to time the reference
    step = qn.jit(qn.prefill, donate="state", target="cpu").compile(*arguments, strict=True)
    logits, _ = step(*arguments)
    token = int(logits.argmax(-1))
    ended = time.perf_counter()
    return {
        "import_seconds": imported - began,
        "first_seconds": ended - imported,
        "token": token,
    }


if __name__ == "__main__":
    print(json.dumps(first_token(Path(sys.argv[1]), int(sys.argv[2]))))
