"""Checkpoints with the 80B model's widths, written by rows with little in memory at a time."""

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

import qnext as qn
from qnext.functional.checkpoint.shards import write_json
from qnext.functional.checkpoint.stream import ShardWriter, Spec, rows_at_once
from qnext.functional.layout import layout
from tests.stored import INDEX

SHARD = 4_000_000_000  # bytes a file, as published
Value = Callable[[str], float]  # a tensor's name -> what its random rows are multiplied by


def large_config(layers: int) -> qn.Config:
    """Layers of Qwen3-Next-80B-A3B: its widths are the defaults."""
    config = qn.Config.from_hf({"num_hidden_layers": layers})
    return config.with_precision(compute=torch.bfloat16)


def large_specs(config: qn.Config) -> dict[str, Spec]:
    """The tensors of a published checkpoint."""
    pieces = [piece for entry in layout(config) for piece in entry.ways[0]]
    return {p.name: Spec("F32" if "A_log" in p.name else "BF16", p.shape) for p in pieces}


def size(specs: Mapping[str, Spec]) -> int:
    return sum(each.nbytes for each in specs.values())


def generate(path: Path, config: qn.Config, deviation: Value) -> None:
    """A checkpoint of normal values of the given deviation, in shards."""
    path.mkdir()
    shards: list[dict[str, Spec]] = [{}]
    for name, each in large_specs(config).items():
        if size(shards[-1]) + each.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = each
    where, block, at = dict[str, str](), torch.randn(5_000_000).bfloat16(), random.Random(0)
    for i, specs in enumerate(shards):
        file = path / f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        writer = ShardWriter(file, specs)
        for name, each in specs.items():
            for rows in _rows(each, block, at):
                writer.write(name, rows * deviation(name))
        writer.close()
        where |= dict.fromkeys(specs, file.name)
    write_json(path / INDEX, {"weight_map": where})
    write_json(path / "config.json", config.to_hf())


def _rows(each: Spec, block: Tensor, at: random.Random) -> Iterator[Tensor]:
    """Rows cut from one random block, each run at another place."""
    step = rows_at_once(each.nbytes // each.shape[0])
    for begin in range(0, each.shape[0], step):
        shape = (min(step, each.shape[0] - begin), *each.shape[1:])
        length = torch.Size(shape).numel()
        first = at.randrange(len(block) - length)
        rows = block[first : first + length].view(shape)
        yield rows.float() if each.dtype == "F32" else rows
