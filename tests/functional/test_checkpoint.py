"""Checkpoints: every way of holding the weights, every defect named, nothing half-written."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.checkpoint.shards import DTYPES, headers
from qnext.functional.checkpoint.stream import Reader
from qnext.functional.tree import leaves_with_paths, map_leaves
from tests.samples import spec
from tests.stored import INDEX, SINGLE, Tensors, assert_same, read, write


def lines(error: pytest.ExceptionInfo[BaseException]) -> list[str]:
    return [line.strip() for line in str(error.value).splitlines()[1:]]


@pytest.fixture
def base(checkpoints: Any, tmp_path: Path) -> Callable[..., Path]:
    """base(change, ...) -> a fresh copy of the base checkpoint, its tensors changed."""

    def make(change: Callable[[Tensors], Any] = id, shards: int = 1, name: str = "copy") -> Path:
        tensors = read(checkpoints("base")[1])
        change(tensors)
        return write(tmp_path / name, tensors, spec("base"), shards)

    return make


# --- the ways of holding a model -------------------------------------------------------------


def blocks(rows: list[Tensor], *sizes: int) -> list[list[Tensor]]:
    """Rows dealt out in turns of the given sizes, until none is left."""
    dealt: list[list[Tensor]] = [[] for _ in sizes]
    while rows:
        for block, size in zip(dealt, sizes, strict=True):
            block += rows[:size]
            rows = rows[size:]
    return dealt


def unfuse(tensors: Tensors, config: qn.Config, apart: bool) -> None:
    """Replace in_proj_qkvz and in_proj_ba by tensors of whole blocks: qkv and z, or q, k, v, z."""
    ratio = config.linear_num_value_heads // config.linear_num_key_heads
    dk, dv = config.linear_key_head_dim, ratio * config.linear_value_head_dim
    for name in [n for n in tensors if "in_proj_" in n]:
        prefix, rows = name.rpartition("in_proj_")[0], list(tensors.pop(name))
        if "qkvz" in name:
            q, k, v, z = blocks(rows, dk, dk, dv, dv)
            parts = {"q": q, "k": k, "v": v} if apart else {"qkv": q + k + v}
            parts["z"] = z
        else:
            parts = dict(zip("ba", blocks(rows, ratio, ratio), strict=True))
        for part, block in parts.items():
            tensors[f"{prefix}in_proj_{part}.weight"] = torch.stack(block)


@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("apart", [False, True], ids=["qkv+z", "q+k+v+z"])
@pytest.mark.parametrize("name", ["base", "wide_values", "conv2"])
def test_projections_in_blocks(
    checkpoints: Any, tmp_path: Path, name: str, apart: bool, shards: int
) -> None:
    _, path, params = checkpoints(name)
    tensors = read(path)
    unfuse(tensors, params.config, apart)
    assert not any("qkvz" in n or n.endswith("_ba.weight") for n in tensors)
    assert_same(qn.load(write(tmp_path / "split", tensors, spec(name), shards)), params)


@pytest.mark.parametrize("name", ["base", "sparse_step"])
def test_stacked_experts(checkpoints: Any, tmp_path: Path, name: str) -> None:
    model, path, params = checkpoints(name)
    tensors = dict(model.state_dict())  # transformers holds them stacked and stores them apart
    assert any(n.endswith("experts.gate_up_proj") for n in tensors)
    assert not any(n.endswith("experts.gate_up_proj") for n in read(path))
    assert_same(qn.load(write(tmp_path / "stacked", tensors, spec(name))), params)


def add_mtp(tensors: Tensors) -> None:
    """An MTP module after the names of published checkpoints: the last layer's twin."""
    d = tensors["model.norm.weight"].numel()
    for name in [n for n in tensors if n.startswith("model.layers.3.")]:
        tensors[f"mtp.layers.0.{name.removeprefix('model.layers.3.')}"] = tensors[name] + 1
    tensors["mtp.fc.weight"] = torch.randn(d, 2 * d)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        tensors[f"mtp.{name}.weight"] = torch.randn(d)


def test_mtp_module(base: Callable[..., Path], checkpoints: Any) -> None:
    path, plain = base(add_mtp, shards=3), checkpoints("base")[2]
    params, stored = qn.load(path), read(path)
    assert params.config == dataclasses.replace(plain.config, mtp_layers=1)
    assert_same(params._replace(config=plain.config, mtp=()), plain)
    (module,) = params.mtp
    for leaf, name in zip(module, ("pre_fc_norm_embedding", "pre_fc_norm_hidden"), strict=False):
        assert leaf.equal(stored[f"mtp.{name}.weight"])
    assert module.fc.equal(stored["mtp.fc.weight"])
    assert module.norm.equal(stored["mtp.norm.weight"])
    twin = map_leaves(lambda leaf: leaf + 1, params.layers[3])
    for (where, a), (_, b) in zip(
        leaves_with_paths(module.layer), leaves_with_paths(twin), strict=True
    ):
        assert a.equal(b), where
    qn.save(params, path)
    assert_same(qn.load(path), params)
    assert read(path).keys() == stored.keys()


def test_config_that_promises_an_mtp_module(base: Callable[..., Path], checkpoints: Any) -> None:
    path = base()
    (path / "config.json").write_text(json.dumps(spec("base") | {"mtp_num_hidden_layers": 1}))
    assert_same(qn.load(path), checkpoints("base")[2])


def test_two_mtp_modules_cannot_be_stored(checkpoints: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(checkpoints("base")[2].config, mtp_layers=2)
    with pytest.raises(qn.CheckpointError, match="at most one MTP module, this model has 2"):
        qn.save(qn.init_params(config), tmp_path)


def test_tied_embeddings(checkpoints: Any, tmp_path: Path) -> None:
    _, path, params = checkpoints("tied")
    tensors = read(path)
    assert params.head == () and "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    with pytest.raises(qn.CheckpointError) as error:
        qn.load(write(tmp_path / "both", tensors, spec("tied")))
    assert lines(error) == ["unexpected: lm_head.weight [211, 40]"]


# --- dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_converts(checkpoints: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    _, path, params = checkpoints("base")
    got = qn.load(path, dtype)
    assert (got.config.precision.compute, got.config.precision.logits) == (dtype, dtype)
    for (name, a), (_, b) in zip(leaves_with_paths(got), leaves_with_paths(params), strict=True):
        kept = name.endswith(("A_log", "dt_bias"))
        assert a.dtype == (torch.promote_types(dtype, torch.float32) if kept else dtype), name
        assert a.equal(b.to(a.dtype)), name
    qn.save(got, tmp_path)
    assert_same(qn.load(tmp_path), got)  # without dtype=: as stored
    assert (
        qn.forward(got, qn.init_state(got.config, 1, 5), torch.ones(1, 5).long())[0].dtype == dtype
    )


def test_bfloat16_throughout(base: Callable[..., Path]) -> None:
    path = base(lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    params, stored = qn.load(path), read(path)
    assert params.embed.dtype == params.config.precision.compute == torch.bfloat16
    gate = params.layers[0].mixer.A_log
    assert gate.dtype == torch.float32
    assert gate.equal(stored["model.layers.0.linear_attn.A_log"].float())


def mix(tensors: Tensors) -> None:
    """bfloat16 but for the gates, as published, and a float32 norm, a float16 matrix and gate."""
    for name in tensors:
        if "A_log" not in name:
            tensors[name] = tensors[name].bfloat16()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    tensors["model.layers.1.linear_attn.dt_bias"] = tensors[
        "model.layers.1.linear_attn.dt_bias"
    ].half()


def test_mixed_dtypes(base: Callable[..., Path]) -> None:
    path, hint = base(mix), r"; load\(path, dtype=...\) would convert it"
    with pytest.raises(qn.CheckpointError) as error:
        qn.load(path)
    for line, want in zip(
        sorted(lines(error)),
        (
            f"lm_head.weight is F16, not bfloat16{hint}",
            f"model.layers.1.linear_attn.dt_bias is F16, not bfloat16 or float32{hint}",
            f"model.norm.weight is F32, not bfloat16{hint}",
        ),
        strict=True,
    ):
        assert re.fullmatch(f"wrong dtype: {want}", line)
    assert qn.load(path, torch.bfloat16).norm.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64], ids=str)
def test_dtype_must_be_a_float(checkpoints: Any, dtype: torch.dtype) -> None:
    with pytest.raises(qn.InputError, match=f"dtype must be one of .*bfloat16.* got {dtype}"):
        qn.load(checkpoints("base")[1], dtype)


# --- what is wrong, all of it in one error -----------------------------------------------------


def damage(tensors: Tensors) -> None:
    del tensors["model.layers.0.linear_attn.conv1d.weight"]
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    tensors["model.layers.9.input_layernorm.weight"] = torch.ones(40)
    tensors["model.layers.3.self_attn.q_norm.weight"] = torch.ones(25)
    tensors["model.layers.3.self_attn.k_proj.weight"] = torch.ones(40, 48)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()


@pytest.mark.parametrize("shards", [1, 4])
def test_one_error_lists_every_difference(base: Callable[..., Path], shards: int) -> None:
    with pytest.raises(
        qn.CheckpointError, match=r"does not hold the model of its config\.json"
    ) as e:
        qn.load(base(damage, shards))
    assert sorted(lines(e)) == [
        "missing: model.layers.0.linear_attn.conv1d.weight [144, 1, 4]",
        "missing: model.layers.2.mlp.experts.5.up_proj.weight [18, 40]",
        "unexpected: model.layers.9.input_layernorm.weight [40]",
        "wrong dtype: lm_head.weight is F16, not float32; load(path, dtype=...) would convert it",
        "wrong dtype: model.norm.weight is I8, not float32",
        "wrong shape: model.layers.3.self_attn.k_proj.weight is [40, 48], not [48, 40]",
        "wrong shape: model.layers.3.self_attn.q_norm.weight is [25], not [24]",
    ]


def test_a_long_list_is_cut_and_counted(base: Callable[..., Path]) -> None:
    with pytest.raises(qn.CheckpointError) as error:
        qn.load(base(lambda t: [t.pop(n) for n in list(t) if ".experts." in n]))
    assert len(lines(error)) == 41 and lines(error)[-1] == f"... and {4 * 7 * 3 - 40} more"


def test_lost_and_broken_shards_are_listed_together(base: Callable[..., Path]) -> None:
    path = base(shards=4)
    (path / "part-1.safetensors").unlink()
    (path / "part-3.safetensors").write_bytes((path / "part-3.safetensors").read_bytes()[:-1])
    with pytest.raises(qn.CheckpointError) as error:
        qn.load(path)
    missing, broken = lines(error)
    assert missing == f"missing shard: part-1.safetensors, named by {INDEX}"
    assert broken.startswith("corrupt or truncated shard: part-3.safetensors (")


def header(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut in the size": lambda raw: raw[:5],
    "cut after the size": lambda raw: raw[:8],
    "cut in the header": lambda raw: raw[: header(raw) // 2],
    "cut after the header": lambda raw: raw[: header(raw)],
    "cut in the data": lambda raw: raw[: (header(raw) + len(raw)) // 2],
    "last byte lost": lambda raw: raw[:-1],
    "one byte more": lambda raw: raw + b"\0",
    "huge size": lambda raw: b"\xff" * 8 + raw[8:],
    "size off by one": lambda raw: (header(raw) - 7).to_bytes(8, "little") + raw[8:],
    "header not text": lambda raw: raw[:20] + b"\xff\xfe" + raw[22:],
    "header not JSON": lambda raw: raw[:8] + b"[" + raw[9:],
    "unknown dtype": lambda raw: raw.replace(b'"F32"', b'"F99"', 1),
    "garbage": lambda raw: bytes(range(256)) * 20,
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("defect", BROKEN)
def test_broken_shard(base: Callable[..., Path], defect: str, shards: int) -> None:
    path = base(shards=shards)
    file = path / ("part-1.safetensors" if shards > 1 else SINGLE)
    file.write_bytes(BROKEN[defect](file.read_bytes()))
    with pytest.raises(qn.CheckpointError, match=f"corrupt or truncated shard: {file.name} "):
        qn.load(path)


NORM = "model.norm.weight"
INDEXES: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "entry lost": (lambda m: m.pop(NORM), f"missing index entry: {NORM} is in part-. but not in"),
    "entry of nothing": (lambda m: m.update(x="part-0.safetensors"), "x is not in part-0"),
    "entry misplaced": (
        lambda m: m.update({NORM: "part-0.safetensors"}),
        f"{NORM} is not in part-0",
    ),
    "file unknown": (lambda m: m.update({NORM: "part-9.safetensors"}), "missing shard: part-9"),
}


@pytest.mark.parametrize("defect", INDEXES)
def test_index_and_shards_must_agree(base: Callable[..., Path], defect: str) -> None:
    path, (change, message) = base(shards=2), INDEXES[defect]
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    assert weight_map[NORM] == "part-1.safetensors"
    change(weight_map)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(qn.CheckpointError, match=message.replace(". but", r"\S* but")) as error:
        qn.load(path)
    assert INDEX in str(error.value) and len(lines(error)) == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_index_that_is_none(base: Callable[..., Path], text: str) -> None:
    path = base(shards=2)
    (path / INDEX).write_text(text)
    with pytest.raises(qn.CheckpointError, match=f"{INDEX} is no index: .*weight_map"):
        qn.load(path)


def test_places_that_hold_no_checkpoint(base: Callable[..., Path], tmp_path: Path) -> None:
    path = base()
    for file in (path / SINGLE, path / "config.json"):
        with pytest.raises(qn.CheckpointError, match=f"{file.name} is a file; give the directory"):
            qn.load(file)
    (path / SINGLE).rename(path / "pytorch_model.bin")
    with pytest.raises(
        qn.CheckpointError, match=f"is no checkpoint: .*neither {SINGLE} nor {INDEX}"
    ):
        qn.load(path)
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "nowhere"):
        with pytest.raises(qn.ConfigError, match=f"{nothing} is no checkpoint: .*no config.json"):
            qn.load(tmp_path / nothing)


def spoil(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.experts.4.up_proj.weight"][17, 39] = torch.nan
    tensors["model.layers.3.self_attn.q_proj.weight"][0, 0] = -torch.inf
    tensors["model.layers.0.linear_attn.A_log"][5] = torch.inf


def test_check_finite(base: Callable[..., Path]) -> None:
    path = base(spoil)
    assert qn.load(path).layers[1].ffn.gate_up[4, 18 + 17, 39].isnan()
    with pytest.raises(qn.CheckpointError) as error:
        qn.load(path, check_finite=True)
    assert sorted(lines(error)) == [
        "not finite: model.layers.0.linear_attn.A_log",
        "not finite: model.layers.1.mlp.experts.4.up_proj.weight",
        "not finite: model.layers.3.self_attn.q_proj.weight",
    ]


def test_check_finite_after_conversion(base: Callable[..., Path]) -> None:
    path = base(lambda t: t["lm_head.weight"].fill_(1e6))
    qn.load(path, check_finite=True)
    with pytest.raises(qn.CheckpointError, match=r"not finite: lm_head\.weight$"):
        qn.load(path, torch.float16, check_finite=True)


def test_a_shard_cut_off_while_it_is_read(base: Callable[..., Path]) -> None:
    file = base() / SINGLE
    stored = headers(file)
    last = max(stored, key=lambda name: stored[name].begin)
    with file.open("r+b") as shard:
        shard.truncate(file.stat().st_size - 1)
    rows = torch.empty(stored[last].shape, dtype=DTYPES[stored[last].dtype])
    with pytest.raises(qn.CheckpointError, match=f"ends within {re.escape(last)}: it became"):
        Reader(stored).read(last, 0, rows)
