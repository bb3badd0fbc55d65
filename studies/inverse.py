"""Which formula inverts the triangular systems of the chunked delta rule by products alone.

`python -m studies.inverse` writes its part of studies/results.json. NPUs have matrix products but
no triangular solve; the formulas are equal on paper and not in float32.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import normalize

from qnext.functional.ops.delta_rule import CHUNK, decay_between
from qnext.lowering.npu.composed_delta import delta_theorem, unit_inverse
from studies.decay import definition
from studies.inputs import (
    RESULTS,
    Inputs,
    demo_inputs,
    demo_tokens,
    random_inputs,
    record,
    relative_rms,
)

COSINES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)


def solved(lower: Tensor) -> Tensor:
    """(I + N)^-1 by forward substitution."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype).expand_as(lower)
    return solve_triangular(eye + lower, eye, upper=False, unitriangular=True)


def product(lower: Tensor) -> Tensor:
    """(I - N)(I + N^2)(I + N^4)...: exact on paper, as N^size is 0."""
    size = lower.shape[-1]
    made, power, n = torch.eye(size, dtype=lower.dtype) - lower, lower @ lower, 2
    while n < size:
        made, power, n = made + made @ power, power @ power, 2 * n
    return made


def product_in_blocks(lower: Tensor, block: int) -> Tensor:
    """The product for blocks of the diagonal, and from these by doubling."""
    place = torch.arange(lower.shape[-1])
    row, column = place[:, None], place
    made = product(lower * (row // block == column // block))
    while block < lower.shape[-1]:
        halves = ((row // block) ^ (column // block) == 1) & (row > column)
        made, block = made - made @ (lower * halves) @ made, 2 * block
    return made


METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "forward substitution": solved,
    "product": product,
    "product in blocks of 32": lambda lower: product_in_blocks(lower, 32),
    "product in blocks of 16": lambda lower: product_in_blocks(lower, 16),
    "product in blocks of 8": lambda lower: product_in_blocks(lower, 8),
    "doubling": unit_inverse,
}


def systems(inputs: Inputs, chunk: int = CHUNK) -> Tensor:
    """N [systems, chunk, chunk] in float64 of the whole chunks of some inputs."""
    chunks, group = inputs.g.shape[1] // chunk, inputs.value.shape[2] // inputs.key.shape[2]

    def split(x: Tensor) -> Tensor:
        return x[:, : chunks * chunk].double().unflatten(1, (chunks, chunk)).movedim(2, 3)

    key = split(inputs.key).repeat_interleave(group, dim=2)
    g, beta = split(inputs.g), split(inputs.beta)
    lower = (beta[..., None] * (key @ key.mT) * decay_between(g)).tril(-1)
    return lower.flatten(0, -3)


def alike(cosine: float, seq: int = 4 * CHUNK, *, slow: float = 1e-3, **sizes: int) -> Inputs:
    """Keys with about this cosine between any two, written at full strength, hardly forgotten."""
    inputs = random_inputs(seq, -slow, **sizes)
    common = normalize(inputs.key[:, :1], dim=-1)
    own = normalize(inputs.key - (inputs.key * common).sum(-1, keepdim=True) * common, dim=-1)
    key = cosine**0.5 * common + (1 - cosine) ** 0.5 * own
    return inputs._replace(key=key, beta=0.98 + 0.02 * inputs.beta)


def errors(inputs: Inputs, chunk: int = CHUNK) -> dict[str, Any]:
    """Of each method in float32: relative RMS over all systems, and how hard these are."""
    lower = systems(inputs.as_fused(), chunk)
    narrow = lower.float()
    want = solved(narrow.double())
    eye = torch.eye(chunk, dtype=torch.float64)
    return {
        "condition": torch.linalg.cond(eye + narrow.double()).max().item(),
        "power": torch.linalg.matrix_power(narrow.double(), chunk // 2).abs().max().item(),
        **{name: relative_rms(method(narrow), want) for name, method in METHODS.items()},
    }


def theorem(inputs: Inputs) -> dict[str, float]:
    """Relative RMS of the theorem's outputs and last state as NPU targets get it, in float32."""
    inputs = inputs.as_fused()
    batch, (_, _, hv, dv), dk = inputs.g.shape[0], inputs.value.shape, inputs.key.shape[-1]
    out, pool = delta_theorem(
        **inputs._asdict(),
        state=torch.zeros(batch, hv, dv, dk),
        slots=torch.arange(batch)[:, None],
        scale=dk**-0.5,
    )
    want_out, want_state = definition(inputs)
    return {"output": relative_rms(out, want_out), "state": relative_rms(pool, want_state)}


def cases(rows: int, seq: int) -> Iterator[tuple[str, Inputs]]:
    """By name: keys ever more alike, and what the demo model's delta nets are given."""
    for cosine in COSINES:
        yield f"cosine {cosine}", alike(cosine)
    for number, inputs in demo_inputs(demo_tokens(rows, seq)):
        yield f"demo layer {number}", inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=4, help="rows of demo text")
    parser.add_argument("--seq", type=int, default=512, help="tokens of a row")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where numbers go")
    options = parser.parse_args()
    found = {
        name: {"inverse": errors(inputs), "theorem": theorem(inputs)}
        for name, inputs in cases(options.rows, options.seq)
    }
    record("inverse", found, options.results)


if __name__ == "__main__":
    main()
