"""The demo model that travels with the package: a small, complete, trained Qwen3-Next.

`examples/train_demo.py` makes it; `problems.jsonl` holds 200 problems it was never trained on.
"""

from pathlib import Path

import torch

from qnext.functional.checkpoint import load
from qnext.functional.params import Params
from qnext.text import Tokenizer

MODEL = Path(__file__).parent / "model"
PROBLEMS = Path(__file__).parent / "problems.jsonl"


def demo(dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Params:
    """Params of the demo model; stored in bfloat16, computed in float32 unless told otherwise."""
    return load(MODEL, dtype=dtype, device=device, progress=False)


def tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint's directory, or the demo's. Raises TokenizerError."""
    return Tokenizer.from_directory(MODEL if path is None else path)
