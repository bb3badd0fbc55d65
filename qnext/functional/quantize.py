"""Params in W8A8: weights in int8 with a scale for each output channel, symmetric.

Activations are quantised where the model runs, token by token (`ops/quant.py`); nothing of them is
stored. What stays as it is, `ignore` says in the words of compressed-tensors: a module's name, or
`re:` and a regular expression that its name must begin with. docs/quantization.md has the table.
"""

import re
from collections.abc import Collection, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from qnext.errors import InputError
from qnext.functional.config import Config
from qnext.functional.layout import Entry, is_experts, layout
from qnext.functional.ops.quant import LARGEST
from qnext.functional.ops.tolerance import wide
from qnext.functional.params import Params, Quantized, empty_params, matrices
from qnext.functional.tree import is_fake, map_with_paths

SCHEMES = ("w8a8",)
PATTERN = "re:"
ROUTERS = r"re:.*\.mlp\.(gate|shared_expert_gate)$"
# The default: what decides or weighs, rather than computes, is small and stays exact.
KEPT = ("lm_head", ROUTERS, r"re:.*\.linear_attn\.in_proj_(ba|b|a)$", "mtp.fc")
# What SGLang's convert_model_qwen3_next.py keeps: b and a are quantised, the shared expert is not.
PUBLIC_CONVERTER = ("lm_head", ROUTERS, r"re:.*\.mlp\.shared_expert\.", "mtp.fc")
CHOICES = {"default": KEPT, "public": PUBLIC_CONVERTER}


def quantize(params: Params, scheme: str = "w8a8", ignore: Collection[str] | None = None) -> Params:
    """The same model with int8 matrices: scale = absmax / 127 for each row, float32.

    `ignore` names modules that keep their dtype: a list of your own, each entry of which must
    match something, or one of the `CHOICES` (default: `KEPT`), of which what matches counts.
    Works on specs as well. Raises InputError for an entry that matches nothing, for one that
    matches half of a fused matrix, and for weights that are not finite or quantised already.
    """
    if scheme not in SCHEMES:
        raise InputError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
    if not isinstance(params, Params):
        raise InputError(f"params must be a qnext Params, got {type(params).__name__}")
    found = dict(matrices(params))
    if done := [path for path, leaf in found.items() if isinstance(leaf, Quantized)]:
        raise InputError(f"params{done[0]} is quantised already: quantise the float model")
    kept = kept_paths(params.config, ignore)
    return map_with_paths(partial(_quantized, found.keys() - kept), params)


def _quantized(chosen: Collection[str], path: str, leaf: Tensor) -> Tensor | Quantized:
    return quantize_rows(leaf, f"params{path}") if path in chosen else leaf


def quantize_rows(weight: Float[Tensor, "*rows columns"], name: str = "weight") -> Quantized:
    """int8 and a scale for each row; a row of zeros has scale 1. Raises InputError for NaN, inf."""
    if is_fake(weight) or weight.ndim < 3:
        return _rows(weight, name)
    # one expert at a time: what is computed in float32 stays small beside the weights
    out = Quantized(
        torch.empty_like(weight, dtype=torch.int8),
        torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device),
    )
    for i, part in enumerate(weight):
        one = _rows(part, f"{name}[{i}]")
        out.weight[i], out.scale[i] = one.weight, one.scale
    return out


def _rows(weight: Tensor, name: str) -> Quantized:
    low, high = weight.aminmax(dim=-1, keepdim=True)
    peak = wide(torch.maximum(-low, high))
    if not is_fake(weight) and not bool(peak.isfinite().all()):
        raise InputError(f"{name} has values that are not finite: it cannot be quantised")
    scale = (peak / LARGEST).float()
    # of zeros, and of a row so small that its scale is: both are 0 in int8, with any scale
    scale = scale.masked_fill(scale == 0, 1)
    q = (weight / scale).round().clamp(-LARGEST, LARGEST)  # in float32 at least
    return Quantized(q.to(torch.int8), scale.squeeze(-1))


def dequantize(
    weight: Float[Tensor, "*rows columns"] | Quantized, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*rows columns"]:
    """The real numbers that a matrix stands for."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    return (weight.weight.float() * weight.scale[..., None]).to(dtype)


def kept_paths(
    config: Config, ignore: Collection[str] | None = None, choice: str = "default"
) -> set[str]:
    """The matrices of Params that `ignore` keeps from being quantised, or else a choice does."""
    matrix = {path for path, _ in matrices(empty_params(config, "meta"))}
    ignore = CHOICES[choice] if ignore is None else ignore
    listed, entries = Ignore(ignore), list(layout(config))
    kept = {entry.path for entry in entries if listed.keeps(entry)} & matrix
    if listed.unused and ignore not in CHOICES.values():  # a choice is made for every model
        unused = ", ".join(listed.unused)
        raise InputError(f"ignore lists {unused}, which matches nothing of this model")
    for entry in entries:
        down = entry.path.removesuffix("gate_up") + "down"
        half = entry.path.endswith(".ffn.gate_up") and (entry.path in kept) != (down in kept)
        if half and is_experts(entry.ways[0]):
            raise InputError(
                f"ignore lists one of params{entry.path} and params{down}: experts are quantised "
                "as a whole, list both or neither"
            )
    return kept


class Ignore:
    """The entries of an ignore list, and which of them have matched nothing yet."""

    def __init__(self, entries: Collection[str]) -> None:
        if isinstance(entries, str):
            raise InputError(f"ignore must be a list of names, got a string; write [{entries!r}]")
        if not isinstance(entries, Collection) or not all(isinstance(e, str) for e in entries):
            raise InputError(f"ignore must be a list of names, got {entries!r}")
        self.unused = dict.fromkeys(entries)
        self._names = {entry for entry in entries if not entry.startswith(PATTERN)}
        self._patterns = {e: _compiled(e) for e in entries if e.startswith(PATTERN)}

    def matches(self, module: str) -> bool:
        """Whether a module's name is listed."""
        hits = [entry for entry, pattern in self._patterns.items() if pattern.match(module)]
        hits += [module] if module in self._names else []
        for hit in hits:
            self.unused.pop(hit, None)
        return bool(hits)

    def keeps(self, entry: Entry) -> bool:
        """Whether a matrix is kept, by any of the names that checkpoints know it by."""
        ways = [{piece.module: self.matches(piece.module) for piece in way} for way in entry.ways]
        if any(all(hits.values()) for hits in ways):
            return True
        if listed := [module for hits in ways for module, hit in hits.items() if hit]:
            raise InputError(
                f"ignore lists {listed[0]}, but not all of params{entry.path}, which is one "
                f"matrix: list every part of it, {', '.join(_few(ways[0]))}"
            )
        return False


def _compiled(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry.removeprefix(PATTERN))
    except re.error as error:
        raise InputError(f"ignore has {entry!r}, no regular expression: {error}") from error


def _few(names: Collection[str], most: int = 4) -> Sequence[str]:
    listed = list(names)
    return listed if len(listed) <= most else [*listed[: most - 1], "..."]
