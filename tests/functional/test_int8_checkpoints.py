"""int8 in files: what `save` writes and others read, what others write and `load` reads or refuses.

The names and the order of rows are checked against transformers' own files; scales of a matrix are
all different wherever their order could be lost.
"""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.layout import layout
from qnext.functional.params import empty_params, matrices
from qnext.functional.quantize import PUBLIC_CONVERTER, dequantize, quantize
from qnext.functional.tree import leaves_with_paths, map_with_paths
from tests.samples import BASE
from tests.sequences import model
from tests.stored import INDEX, SINGLE, Tensors, assert_same, read, write

BF16, F32 = torch.bfloat16, torch.float32
Change = Callable[[Tensors, dict[str, Any]], Any]  # of tensors and of the JSON beside them


def lines(error: pytest.ExceptionInfo[BaseException]) -> list[str]:
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def spaced(path: str, leaf: Tensor) -> Tensor:
    """Scales become numbers that bfloat16 holds, in each matrix no two the same."""
    if not path.endswith(".scale"):
        return leaf
    n = torch.arange(leaf.numel()).view(leaf.shape)
    scale = torch.ldexp(128.0 + n % 128, n // 128 - 16)
    assert scale.unique().numel() == scale.numel() and torch.equal(scale.to(BF16).float(), scale)
    return scale


@pytest.fixture(scope="module")
def params() -> qn.Params:
    """A model with an MTP module, its large matrices int8."""
    return map_with_paths(spaced, quantize(model(mtp_num_hidden_layers=1)))


@pytest.fixture(scope="module")
def whole() -> qn.Params:
    """The same with every matrix int8, those of b and a, of routers and of heads as well."""
    return map_with_paths(spaced, quantize(model(mtp_num_hidden_layers=1), ignore=[]))


# --- what we write ------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [10**9, 50_000], ids=["single", "sharded"])
@pytest.mark.parametrize("ignore", [None, []], ids=["default", "all"])
@pytest.mark.parametrize("name", ["base", "dense_layers", "tied"])
def test_round_trip(checkpoints: Any, tmp_path: Path, name: str, ignore: Any, limit: int) -> None:
    want = quantize(checkpoints(name)[2], ignore=ignore)
    a, b = tmp_path / "a", tmp_path / "b"
    qn.save(want, a, max_shard_bytes=limit)
    assert (a / SINGLE).exists() == (limit == 10**9)
    qn.save(qn.load(a), b, max_shard_bytes=limit)
    assert_same(qn.load(b), want)
    for file in sorted(a.iterdir()):
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name


LARGE = re.compile(r".*\.((q|k|v|o|out|gate|up|down)_proj|in_proj_qkvz)\.weight")


def test_tensors_and_config(checkpoints: Any, tmp_path: Path) -> None:
    """Beside transformers' own file: rows quantised where they are, the rest as it was."""
    _, source, floats = checkpoints("base")
    qn.save(quantize(floats), tmp_path)
    want, got = read(source), read(tmp_path)
    int8 = {name for name in want if LARGE.fullmatch(name)}
    assert got.keys() == want.keys() | {f"{name}_scale" for name in int8}
    for name in want.keys() - int8:
        assert got[name].dtype == F32 and torch.equal(got[name], want[name]), name
    for name in int8:
        rows, scale = want[name].numpy(), got[f"{name}_scale"]
        assert (scale.dtype, list(scale.shape)) == (F32, [len(rows), 1]), name
        assert np.array_equal(scale, np.abs(rows).max(-1, keepdims=True) / np.float32(127)), name
        assert got[name].dtype == torch.int8
        assert np.array_equal(got[name], np.rint(rows / scale.numpy())), name
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    modules = {n.removesuffix(".weight") for n in want.keys() - int8 if n.endswith(".weight")}
    assert config["ignore"] == sorted(n for n in modules if not n.endswith("norm"))


def dequantised(params: qn.Params) -> qn.Params:
    """The float model that int8 params stand for."""
    found = dict(leaves_with_paths(params)) | dict(matrices(params))
    specs = empty_params(params.config, "meta")
    return map_with_paths(lambda path, spec: dequantize(found[path], spec.dtype), specs)


@pytest.mark.parametrize("ignore", [None, PUBLIC_CONVERTER, []], ids=["default", "public", "all"])
def test_compressed_tensors_reads_what_we_save(tmp_path: Path, ignore: Any) -> None:
    """Its package finds each int8 matrix by our config, and makes of it the numbers we mean."""
    from compressed_tensors.entrypoints.convert.converters.ct_dequantizer import (
        CompressedTensorsDequantizer,
    )

    params = map_with_paths(spaced, quantize(model(mtp_num_hidden_layers=1), ignore=ignore))
    qn.save(params, tmp_path / "int8")
    qn.save(dequantised(params), tmp_path / "float")
    reader = CompressedTensorsDequantizer(tmp_path / "int8", dtype=F32)
    got, want = reader.validate(read(tmp_path / "int8")), read(tmp_path / "float")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == F32 and torch.equal(got[name], tensor), name


def test_compressed_tensors_reads_our_config(params: qn.Params, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    qn.save(params, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(values)
    (scheme,) = config.config_groups.values()
    assert (config.format, scheme.format, scheme.targets) == (*["int-quantized"] * 2, ["Linear"])
    for part, strategy in ((scheme.weights, "channel"), (scheme.input_activations, "token")):
        assert (part.num_bits, part.type, part.symmetric) == (8, "int", True)
        assert (part.strategy, part.dynamic) == (strategy, strategy == "token")
    assert scheme.output_activations is None and config.kv_cache_scheme is None


# --- what others write ---------------------------------------------------------------------------

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
SCHEME: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": INT8 | {"strategy": "channel", "dynamic": False, "group_size": None},
            "input_activations": INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}
IGNORE = ["lm_head", "mtp.fc", r"re:.*\.mlp\.(gate|shared_expert_gate)$", r"re:.*in_proj_(ba|b|a)$"]


def stored(
    params: qn.Params, way: int = 0, column: bool = True, dtype: torch.dtype = F32
) -> Tensors:
    """Params in the `way`-th form that each matrix may have in a checkpoint (or its last)."""
    leaves, tensors = dict(leaves_with_paths(params)), {}
    for entry in layout(params.config):
        int8 = f"{entry.path}.scale" in leaves
        weight = leaves[f"{entry.path}.weight" if int8 else entry.path]
        for piece in entry.ways[min(way, len(entry.ways) - 1)]:
            tensors[piece.name] = piece.written_from(weight).clone()
            if int8:
                beside = piece._replace(shape=(*piece.shape[:-1], *([1] * column)))
                scale = beside.written_from(leaves[f"{entry.path}.scale"])
                tensors[f"{piece.name}_scale"] = scale.to(dtype, copy=True)
    return tensors


FORMS = [
    ["in_proj_qkvz.weight_scale", "in_proj_ba.weight_scale", "experts.6.up_proj.weight_scale"],
    ["in_proj_z.weight_scale", "in_proj_qkv.weight_scale", "experts.gate_up_proj_scale"],
    ["in_proj_k.weight_scale", "in_proj_a.weight_scale", "experts.down_proj.weight_scale"],
]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("column", [False, True], ids=["[out]", "[out, 1]"])
@pytest.mark.parametrize("way", [0, 1, 2], ids=["published", "split, stacked", "apart, stacked"])
def test_19_scales_follow_their_rows(
    whole: qn.Params, tmp_path: Path, way: int, column: bool, dtype: torch.dtype, shards: int
) -> None:
    """Bug 19: scales in the order of a fused projection (SGLang issue 21698)."""
    tensors = stored(whole, way, column, dtype)
    for ending in FORMS[way]:
        scales = [tensor for name, tensor in tensors.items() if name.endswith(ending)]
        assert scales and all((scale.shape[-1] == 1) == column for scale in scales)
        assert all(scale.dtype == dtype for scale in scales)
    assert "mtp.fc.weight_scale" in tensors
    path = write(tmp_path / "theirs", tensors, BASE | {"quantization_config": SCHEME}, shards)
    assert_same(qn.load(path), whole)


def test_dtype_leaves_int8_and_scales_alone(params: qn.Params, tmp_path: Path) -> None:
    config = BASE | {"quantization_config": SCHEME | {"ignore": IGNORE}}
    got = qn.load(write(tmp_path / "theirs", stored(params), config), BF16)
    for (path, a), (_, b) in zip(leaves_with_paths(got), leaves_with_paths(params), strict=True):
        kept = path.endswith(("A_log", "dt_bias", ".scale")) or b.dtype == torch.int8
        assert a.dtype == (b.dtype if kept else BF16) and torch.equal(a, b.to(a.dtype)), path


# --- ModelSlim -----------------------------------------------------------------------------------

DESCRIPTION, SLIM = "quant_model_description.json", "quant_model_weight_w8a8_dynamic"


def modelslim(
    path: Path,
    params: qn.Params,
    change: Change = lambda tensors, description: None,
    shards: int = 1,
) -> Path:
    """A checkpoint as ModelSlim's W8A8_DYNAMIC has it, its tensors and description changed."""
    tensors = stored(params)
    for name in [name for name in tensors if name.endswith("_scale")]:
        tensors[name.replace("_scale", "_offset")] = torch.zeros_like(tensors[name])
    description: dict[str, Any] = {"model_quant_type": "W8A8_DYNAMIC", "version": "1.0.0"}
    for name in tensors:
        int8 = f"{re.sub('_(scale|offset)$', '', name)}_scale" in tensors
        description[name] = "W8A8_DYNAMIC" if int8 else "FLOAT"
    change(tensors, description)
    write(path, tensors, BASE, shards)
    for file in list(path.glob("*.safetensors*")):
        if file.name == INDEX:
            file.write_text(file.read_text().replace("part-", f"{SLIM}-"))
        file.rename(path / file.name.replace("part-", f"{SLIM}-").replace("model.", f"{SLIM}."))
    (path / DESCRIPTION).write_text(json.dumps(description))
    return path


@pytest.mark.parametrize("shards", [1, 2])
def test_modelslim(params: qn.Params, tmp_path: Path, shards: int) -> None:
    path = modelslim(tmp_path / "slim", params, shards=shards)
    tail = [".safetensors"] if shards == 1 else ["-0.safetensors", "-1.safetensors", INDEX[5:]]
    assert sorted(f.name for f in path.glob(f"{SLIM}*")) == [f"{SLIM}{end}" for end in tail]
    assert_same(qn.load(path), params)


Q, K = (f"model.layers.3.self_attn.{part}_proj.weight" for part in "qk")
SLIM_ERRORS: dict[str, tuple[Change, str]] = {
    "offset": (lambda t, d: t[f"{Q}_offset"][7].fill_(1), f"not symmetric: {Q}_offset is not zero"),
    "says FLOAT": (lambda t, d: d.update({Q: "FLOAT"}), f"{Q} is I8, {DESCRIPTION} says FLOAT"),
    "says nothing": (lambda t, d: d.pop(Q), f"{Q} is I8, {DESCRIPTION} says nothing"),
    "says int8": (
        lambda t, d: d.update({"lm_head.weight": "W8A8_DYNAMIC"}),
        f"lm_head.weight is F32, {DESCRIPTION} says W8A8_DYNAMIC",
    ),
    "static": (
        lambda t, d: d.update({Q: "W8A8"}),
        f"{Q} is W8A8 by {DESCRIPTION}: qnext computes W8A8_DYNAMIC and FLOAT",
    ),
    "not there": (
        lambda t, d: d.update({"model.layers.4.x.weight": "FLOAT"}),
        f"{DESCRIPTION} lists model.layers.4.x.weight, which the checkpoint does not have",
    ),
}


@pytest.mark.parametrize("name", SLIM_ERRORS)
def test_modelslim_contradictions(params: qn.Params, tmp_path: Path, name: str) -> None:
    change, message = SLIM_ERRORS[name]
    with pytest.raises(qn.CheckpointError) as error:
        qn.load(modelslim(tmp_path / "slim", params, change))
    assert lines(error) == [message]


# --- errors --------------------------------------------------------------------------------------


def floated(*endings: str) -> Change:
    """A change that stores some int8 tensors as float."""

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith(endings)]:
            tensors[name] = tensors[name] * tensors.pop(f"{name}_scale")

    return change


def ignoring(name: str) -> Change:
    module = name.removesuffix(".weight")
    return lambda tensors, config: config["quantization_config"]["ignore"].append(module)


def holding(name: str, tensor: Tensor) -> Change:
    return lambda tensors, config: tensors.update({name: tensor})


CONFIG = "quantization_config of config.json"
EMBED, FIRST = "model.embed_tokens.weight", "model.layers.0.linear_attn.in_proj_qkvz.weight"
B = "model.layers.1.linear_attn.in_proj_b"
PAIR = "layers[1].ffn.gate_up and layers[1].ffn.down"
DOWN = [f"layers.1.mlp.experts.{e}.down_proj.weight" for e in range(7)]
ERRORS: dict[str, tuple[Change, str]] = {
    "no scale": (
        lambda tensors, config: tensors.pop(f"{Q}_scale"),
        f"int8 without scale: {Q} needs {Q}_scale",
    ),
    "a scale a tensor": (
        holding(f"{Q}_scale", torch.ones(1)),
        f"wrong shape: {Q}_scale is [1], not [192, 1]",
    ),
    "a scale in int8": (
        holding(f"{Q}_scale", torch.ones(192, 1, dtype=torch.int8)),
        f"wrong dtype: {Q}_scale is I8, not floating point",
    ),
    "25, a NaN scale": (
        lambda tensors, config: tensors[f"{Q}_scale"][5].fill_(torch.nan),
        f"not finite: {Q}_scale",
    ),
    "half a projection": (floated(K), f"half quantised: {Q} is I8, {K} is F32: one matrix"),
    "half of experts": (floated(*DOWN), f"half quantised: {PAIR} must both be int8, or neither"),
    "ignored": (ignoring(Q), f"{Q} is I8, though the {CONFIG} ignores it"),
    "row 11, names of split tensors": (
        ignoring(B),
        f"ignore of {CONFIG} lists {B}, which matches nothing in the checkpoint",
    ),
    "no word of it": (
        lambda tensors, config: config.pop("quantization_config"),
        f"int8 without a word of it: {FIRST} is I8, but config.json has no quantization_config "
        f"and there is no {DESCRIPTION}",
    ),
    "left over": (
        holding("lm_head.weight_scale", torch.ones(211, 1)),
        "unexpected: lm_head.weight_scale [211, 1]",
    ),
    "embedding": (
        holding(EMBED, torch.ones(211, 40, dtype=torch.int8)),
        f"wrong dtype: {EMBED} is I8, not float32",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(params: qn.Params, tmp_path: Path, name: str) -> None:
    change, message = ERRORS[name]
    tensors = stored(params)
    config = BASE | {"quantization_config": SCHEME | {"ignore": [*IGNORE]}}
    assert_same(qn.load(write(tmp_path / "good", tensors, config)), params)
    change(tensors, config)
    with pytest.raises(qn.CheckpointError) as error:
        qn.load(write(tmp_path / "bad", tensors, config))
    assert lines(error)[0] == message


def test_half_quantised_experts(params: qn.Params, tmp_path: Path) -> None:
    layer = params.layers[2]
    half = layer._replace(ffn=layer.ffn._replace(down=dequantize(layer.ffn.down)))
    params = params._replace(layers=(*params.layers[:2], half, *params.layers[3:]))
    message = r"params\.layers\[2\]\.ffn\.gate_up and \.down must both be Quantized, or neither"
    with pytest.raises(qn.InputError, match=message):
        qn.save(params, tmp_path)
    with pytest.raises(qn.InputError, match=message):
        qn.decode(params, qn.init_state(params.config, 2, 3), torch.tensor([1, 2]))


GROUP = "config_groups.group_0"
OTHERS: dict[str, tuple[str, Any]] = {
    "fp8": (f"{GROUP}.weights.type", "float"),
    "4 bits": (f"{GROUP}.weights.num_bits", 4),
    "groups": (f"{GROUP}.weights.strategy", "group"),
    "a zero point": (f"{GROUP}.weights.symmetric", False),
    "static": (f"{GROUP}.input_activations.dynamic", False),
    "a scale a tensor": (f"{GROUP}.input_activations.strategy", "tensor"),
    "4 bits of activations": (f"{GROUP}.input_activations.num_bits", 4),
    "weights only": (f"{GROUP}.input_activations", None),
    "outputs": (f"{GROUP}.output_activations", INT8),
    "keys and values": ("kv_cache_scheme", INT8),
    "GPTQ": ("quant_method", "gptq"),
    "packed": ("format", "pack-quantized"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_schemes_are_refused(name: str) -> None:
    """By the config alone, and the message names the key."""
    path, value = OTHERS[name]
    *outer, key = path.split(".")
    scheme = deepcopy(SCHEME)
    qn.Config.from_hf(BASE | {"quantization_config": scheme})
    place = scheme
    for part in outer:
        place = place[part]
    place[key] = value
    named = path.removeprefix("config_groups.")
    with pytest.raises(qn.ConfigError, match=rf"is not W8A8 .*: {re.escape(named)} "):
        qn.Config.from_hf(BASE | {"quantization_config": scheme})
