"""Reading config.json: both spellings, transformers' defaults and choices, and every refusal."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextDecoderLayer,
    Qwen3NextRotaryEmbedding,
    Qwen3NextSparseMoeBlock,
)

import qnext as qn
from qnext.functional.config import ATTENTION, DELTA
from qnext.functional.rope import Rope
from qnext.functional.tree import leaves, rebuild
from tests.samples import BASE, ODD, spec

CPU = torch.device("cpu")
RIDES_ALONG = ("precision", "mesh")
ARCHITECTURE = [f.name for f in dataclasses.fields(qn.Config) if f.name not in RIDES_ALONG]
SHARED = [n for n in ARCHITECTURE if n in Qwen3NextConfig.__dataclass_fields__]
SHARED = [n for n in SHARED if n not in ("layer_types", "mlp_only_layers")]


def read(**values: Any) -> qn.Config:
    return qn.Config.from_hf(BASE | values)


# --- where a config comes from ---------------------------------------------------------------


def test_dict_file_and_directory_give_the_same_config(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(BASE))
    want = qn.Config.from_hf(BASE)
    assert want.vocab_size == 211
    for source in (file, tmp_path, str(file), str(tmp_path)):
        assert qn.Config.from_hf(source) == want


def test_from_hf_does_not_change_its_argument() -> None:
    values = spec("yarn")
    before = json.dumps(values)
    qn.Config.from_hf(values)
    assert json.dumps(values) == before


@pytest.mark.parametrize("name", SHARED)
def test_default_is_that_of_transformers(name: str) -> None:
    assert getattr(qn.Config.from_hf({}), name) == getattr(Qwen3NextConfig(), name)


def test_defaults_of_layers_and_rope_are_those_of_transformers() -> None:
    ours, theirs = qn.Config.from_hf({}), Qwen3NextConfig()
    assert len(SHARED) > 15
    assert list(ours.layer_types) == theirs.layer_types
    assert list(ours.mlp_only_layers) == theirs.mlp_only_layers
    assert ours.rope.to_hf() == theirs.rope_parameters


def test_null_means_the_default() -> None:
    nulls: dict[str, Any] = dict.fromkeys([*SHARED, "layer_types", "mlp_only_layers"])
    nulls |= dict.fromkeys(
        ["rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"]
    )
    assert qn.Config.from_hf(nulls) == qn.Config.from_hf({})


# --- layers ----------------------------------------------------------------------------------

KINDS = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
LAYER_KEYS: dict[str, dict[str, Any]] = {
    "default": {"num_hidden_layers": 9},
    "interval 1": {"full_attention_interval": 1, "num_hidden_layers": 3},
    "interval 3": {"full_attention_interval": 3, "num_hidden_layers": 8},
    "layer_types": {"layer_types": KINDS},
    "both": {"layer_types": KINDS, "full_attention_interval": 2},
}


@pytest.mark.parametrize("case", LAYER_KEYS)
def test_layer_kinds_are_those_of_transformers(case: str) -> None:
    values = BASE | LAYER_KEYS[case]
    assert list(qn.Config.from_hf(values).layer_types) == Qwen3NextConfig(**values).layer_types


FFN_KEYS: dict[str, dict[str, Any]] = {
    "all experts": {},
    "step 2": {"decoder_sparse_step": 2},
    "step 3 but not layer 5": {"decoder_sparse_step": 3, "mlp_only_layers": [5]},
    "dense 0 and 6": {"mlp_only_layers": [0, 6]},
    "all dense by list": {"mlp_only_layers": list(range(7))},
    "no experts": {"num_experts": 0},
    "step beyond the end": {"decoder_sparse_step": 8},
}


@pytest.mark.parametrize("case", FFN_KEYS)
def test_experts_are_where_transformers_has_them(case: str) -> None:
    values = BASE | {"num_hidden_layers": 7} | FFN_KEYS[case]
    theirs = Qwen3NextConfig(**values)
    with torch.device("meta"):
        want = tuple(
            isinstance(Qwen3NextDecoderLayer(theirs, i).mlp, Qwen3NextSparseMoeBlock)
            for i in range(7)
        )
    assert qn.Config.from_hf(values).is_moe == want


# --- rotary positions ------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
NESTED: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "theta 1e7": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5},
    "whole head": {"rope_type": "default", "partial_rotary_factor": 1.0},
    "integer theta": {"rope_type": "default", "rope_theta": 10_000},
    "linear 3": {"rope_type": "linear", "factor": 3.0},
    "linear 2.5": {"rope_type": "linear", "factor": 2.5, "partial_rotary_factor": 0.7},
    "linear 1": {"rope_type": "linear", "factor": 1},
    "linear ignores attention_factor": {
        "rope_type": "linear",
        "factor": 3.0,
        "attention_factor": 0.7,
    },
    "yarn 4": YARN,
    "yarn 1": YARN | {"factor": 1.0},
    "yarn 1.5": YARN | {"factor": 1.5, "partial_rotary_factor": 1.0},
    "yarn 32 of long": YARN
    | {
        "factor": 32,
        "rope_theta": 1e7,
        "original_max_position_embeddings": 262_144,
        "partial_rotary_factor": 1.0,
    },
    "yarn truncate": YARN | {"truncate": False, "partial_rotary_factor": 1.0},
    "yarn mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 1.3},
    "yarn mscale alone": YARN | {"mscale": 0.707},
    "yarn attention_factor": YARN | {"attention_factor": 0.7, "mscale": 2.0, "mscale_all_dim": 1.0},
    "yarn betas": YARN | {"beta_fast": 20, "beta_slow": 2, "partial_rotary_factor": 1.0},
    "yarn null betas": YARN | {"beta_fast": None, "beta_slow": None, "attention_factor": None},
    "yarn original from max_position_embeddings": {"rope_type": "yarn", "factor": 8.0},
    "yarn factor from the ratio": YARN | {"factor": None},
    "spelled type": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}
FLAT: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta": {"rope_theta": 1e6},
    "partial": {"partial_rotary_factor": 0.5, "rope_theta": 5e4},
    "null scaling": {"rope_theta": 1e6, "rope_scaling": None},
    "scaling by type": {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "scaling by rope_type": {
        "rope_theta": 1e6,
        "partial_rotary_factor": 1.0,
        "rope_scaling": YARN,
    },
    "outer original_max_position_embeddings": {
        "original_max_position_embeddings": 128,
        "rope_parameters": YARN,
    },
    "inner theta before outer": {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e5}},
}
ROPES = {name: {"rope_parameters": part} for name, part in NESTED.items()} | FLAT


# 20 makes 5 channels of a quarter, where transformers' yarn fails
HEADS = [(n, d) for n in ROPES for d in (24, 18, 20, 256) if d != 20 or "yarn" not in str(ROPES[n])]


@pytest.mark.parametrize(("case", "head_dim"), HEADS)
def test_frequencies_are_those_of_transformers(case: str, head_dim: int) -> None:
    values = BASE | {"head_dim": head_dim} | copy.deepcopy(ROPES[case])
    ours = qn.Config.from_hf(values).rope
    theirs = Qwen3NextRotaryEmbedding(Qwen3NextConfig(**values))  # which changes its arguments
    got = ours.frequencies(head_dim, CPU)
    assert got.dtype == torch.float32
    assert ours.rotated_channels(head_dim) == 2 * len(got) == 2 * len(theirs.inv_freq)
    torch.testing.assert_close(got, theirs.inv_freq, rtol=2e-7, atol=0)  # two ulp
    if ours.kind != "yarn":
        assert got.equal(theirs.inv_freq)
    assert ours.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_yarn_on_an_odd_number_of_channels() -> None:
    rope = Rope.from_hf({"rope_parameters": YARN})
    base = [rope.theta ** -(i / 5) for i in (0, 2, 4)]  # head_dim 20, a quarter rotated
    low, high = (
        5 * math.log(64 / (beta * 2 * math.pi)) / (2 * math.log(rope.theta)) for beta in (32, 1)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), 4)
    ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(3)]
    want = [b * (1 - r) + b / 4 * r for b, r in zip(base, ramp, strict=True)]
    assert ramp[1] not in (0, base[1])
    assert rope.frequencies(20, CPU).tolist() == pytest.approx(want, rel=1e-6)


# --- what is refused -------------------------------------------------------------------------


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": values}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'.*qwen3_next"),
    "attention_bias": ({"attention_bias": True}, "attention_bias = True.*= False"),
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'.*'silu'"),
    "quantized": ({"quantization_config": {"bits": 4}}, "not W8A8 .*config_groups is missing"),
    "rope_type": (rope(rope_type="llama3", factor=8.0), "'llama3' is not known.*linear, yarn"),
    "rope type": ({"rope_scaling": {"type": "dynamic"}}, "'dynamic' is not known"),
    "linear without factor": (rope(rope_type="linear"), '"linear" needs "factor" >= 1.*got None'),
    "yarn without factor": (rope(rope_type="yarn"), '"yarn" needs "factor" >= 1.*got None'),
    "small factor": (rope(rope_type="yarn", factor=0.5), '"factor" >= 1.*got 0.5'),
    "factor a string": (rope(rope_type="linear", factor="4"), "factor must be a number.*'4'"),
    "theta a string": (rope(rope_theta="big"), "rope_theta must be a number > 1, got 'big'"),
    "theta 0": ({"rope_theta": 0}, "rope_theta must be a number > 1, got 0"),
    "theta true": ({"rope_theta": True}, "rope_theta must be a number > 1, got True"),
    "theta infinite": ({"rope_theta": math.inf}, "rope_theta must be a number"),
    "partial 0": ({"partial_rotary_factor": 0.0}, "partial_rotary_factor must be a number > 0"),
    "partial beyond 1": (rope(partial_rotary_factor=1.5), r"partial_rotary_factor.*\(0, 1\].*1.5"),
    "mscale": (rope(**YARN, mscale="1"), "mscale must be a number"),
    "beta": (rope(**YARN, beta_fast=-1), "beta_fast must be a number > 0, got -1"),
    "original": (
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=0),
        "original_max_position_embeddings must be a number > 0, got 0",
    ),
    "rope a list": ({"rope_scaling": [1, 2]}, r"rope_scaling must be one object.*\[1, 2\]"),
    "rope by kind": (rope(full_attention={"rope_theta": 1e6}), "rope_parameters must be one obj"),
    "odd head": ({"head_dim": 15} | rope(partial_rotary_factor=1.0), "head_dim = 15 must be even"),
    "layers and kinds": ({"layer_types": KINDS * 2}, "lists 8 layers, num_hidden_layers says 4"),
    "unknown kind": ({"layer_types": [*KINDS[:3], "window"]}, "layer_types knows.*'window'"),
    "kinds a string": ({"layer_types": "full_attention"}, "layer_types must be a list of strings"),
    "kinds of numbers": ({"layer_types": [1, 2, 3, 4]}, "layer_types must be a list of strings"),
    "interval 0": ({"full_attention_interval": 0}, "full_attention_interval must be an integer"),
    "interval true": ({"full_attention_interval": True}, "full_attention_interval.*got True"),
    "heads": ({"num_attention_heads": 5}, "num_attention_heads must be a multiple of num_key_val"),
    "delta heads": ({"linear_num_value_heads": 7}, "linear_num_value_heads must be a multiple of"),
    "convolution": ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim must be >= 2"),
    "dense beyond": ({"mlp_only_layers": [1, 4]}, r"mlp_only_layers names.*do not exist: \[4\]"),
    "dense negative": ({"mlp_only_layers": [-1]}, r"mlp_only_layers names.*\[-1\]"),
    "dense a number": ({"mlp_only_layers": 2}, "mlp_only_layers must be a list of integers"),
    "dense strings": ({"mlp_only_layers": ["2"]}, "mlp_only_layers must be a list of integers"),
    "too many chosen": ({"num_experts_per_tok": 8}, r"num_experts_per_tok = 8 must lie in 1..7"),
    "none chosen": ({"num_experts_per_tok": 0}, r"num_experts_per_tok = 0 must lie in 1..7"),
    "expert size": ({"moe_intermediate_size": 0}, "moe_intermediate_size and shared.* >= 1"),
    "dense size": (
        {"intermediate_size": 0, "mlp_only_layers": [1]},
        "intermediate_size must be >= 1",
    ),
    "eps 0": ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a number > 0, got 0.0"),
    "eps a string": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number > 0, got '1e-6'"),
    "eps not a number": ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a number > 0"),
    "tied a string": ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or"),
    "norm_topk a number": ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
    "mtp a string": ({"mtp_num_hidden_layers": "1"}, "mtp_num_hidden_layers must be an integer"),
    "negative experts": ({"num_experts": -1}, "num_experts must be an integer >= 0, got -1"),
}
INTEGER_FIELDS = [f.name for f in dataclasses.fields(qn.Config) if f.type is int]


@pytest.mark.parametrize("case", REFUSED)
def test_refusal(case: str) -> None:
    values, message = REFUSED[case]
    with pytest.raises(qn.ConfigError, match=message):
        read(**values)


@pytest.mark.parametrize("bad", ["40", 40.0, True, -3, [40]], ids=str)
@pytest.mark.parametrize("name", [n for n in INTEGER_FIELDS if n != "mtp_layers"])
def test_sizes_must_be_integers(name: str, bad: object) -> None:
    with pytest.raises(qn.ConfigError, match=f"{name} must be an integer >= [01], got "):
        read(**{name: bad})


def test_one_error_lists_everything() -> None:
    with pytest.raises(qn.ConfigError) as kinds:
        read(vocab_size="a", head_dim=2.5, norm_topk_prob="no", mlp_only_layers=3)
    for name in ("vocab_size", "head_dim", "norm_topk_prob", "mlp_only_layers"):
        assert name in str(kinds.value)
    with pytest.raises(qn.ConfigError) as contradictions:
        read(num_attention_heads=3, linear_num_value_heads=4, layer_types=KINDS[:2])
    for name in ("num_attention_heads", "linear_num_value_heads", "layer_types lists 2"):
        assert name in str(contradictions.value)


FILES = {
    "broken": ("{", "cannot be read as JSON"),
    "empty": ("", "cannot be read as JSON"),
    "list": ("[1, 2]", "must hold a JSON object, got list"),
    "null": ("null", "must hold a JSON object, got NoneType"),
    "not text": (b"\xff\xfe\x00\x80", "cannot be read as JSON"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_hold_no_config(case: str, tmp_path: Path) -> None:
    content, message = FILES[case]
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(qn.ConfigError, match=f"config.json {message}"):
        qn.Config.from_hf(tmp_path)


@pytest.mark.parametrize("place", [".", "nowhere"])
def test_no_config_json(place: str, tmp_path: Path) -> None:
    with pytest.raises(qn.ConfigError, match=r"no checkpoint: it has no config\.json.*directory"):
        qn.Config.from_hf(tmp_path / place)


# --- writing, and what a config is -----------------------------------------------------------


@pytest.mark.parametrize("name", ODD)
def test_to_hf_is_read_back_by_us_and_by_transformers(name: str) -> None:
    config = qn.Config.from_hf(spec(name))
    written = json.loads(json.dumps(config.to_hf()))
    assert qn.Config.from_hf(written) == config
    theirs = Qwen3NextConfig(**written)
    for field in SHARED:
        assert getattr(theirs, field) == getattr(config, field), field
    assert theirs.layer_types == list(config.layer_types)
    assert theirs.mlp_only_layers == list(config.mlp_only_layers)
    want = Qwen3NextRotaryEmbedding(Qwen3NextConfig(**spec(name)))
    got = Qwen3NextRotaryEmbedding(theirs)
    assert got.inv_freq.equal(want.inv_freq)
    assert got.attention_scaling == want.attention_scaling


@pytest.mark.parametrize("case", ROPES)
def test_every_rope_survives_a_round_trip(case: str) -> None:
    config = read(**ROPES[case])
    assert qn.Config.from_hf(config.to_hf()) == config


def test_mtp_layers_and_dtype_are_written() -> None:
    config = dataclasses.replace(read(), mtp_layers=1).with_precision(compute=torch.bfloat16)
    assert config.to_hf()["dtype"] == "bfloat16"
    assert qn.Config.from_hf(config.to_hf()).mtp_layers == 1
    assert "mtp_num_hidden_layers" not in read().to_hf()


def other(name: str, value: Any) -> Any:
    """A value of the same type that differs."""
    if name == "rope":
        return dataclasses.replace(value, theta=value.theta + 1)
    if name == "layer_types":
        return tuple(ATTENTION if kind == DELTA else DELTA for kind in value)
    if isinstance(value, bool):
        return not value
    return (*value, 1) if isinstance(value, tuple) else value + 1


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_fingerprint_changes_with_the_architecture(name: str) -> None:
    config = read()
    changed = dataclasses.replace(config, **{name: other(name, getattr(config, name))})
    assert changed.fingerprint != config.fingerprint


def test_fingerprint_is_that_of_the_whole_model() -> None:
    config = qn.Config.from_hf(spec("gqa4"))
    part = dataclasses.replace(config, mesh=qn.Mesh(tp=2, rank=1, whole=("vocab", "delta_heads")))
    assert part.fingerprint == config.fingerprint and part.to_hf() == config.to_hf()
    assert part.axes["hq"] == 4 and config.axes["hq"] == 8


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Rope)])
def test_fingerprint_changes_with_the_rope(name: str) -> None:
    config = qn.Config.from_hf(spec("yarn"))
    values: dict[str, Any] = {"kind": "linear", "truncate": False, "original_positions": 77}
    value = values.get(name, 77.0)
    changed = dataclasses.replace(config, rope=dataclasses.replace(config.rope, **{name: value}))
    assert changed.fingerprint != config.fingerprint


@pytest.mark.parametrize("name", qn.Precision._fields)
def test_fingerprint_does_not_change_with_precision(name: str) -> None:
    config = read()
    changed = config.with_precision(**{name: torch.bfloat16})
    assert changed != config
    assert changed.fingerprint == config.fingerprint


def test_configs_are_values() -> None:
    config = read()
    assert {config: 1}[read()] == 1
    assert hash(config) == hash(read()) and config != read(vocab_size=212)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rope.theta = 3.0  # type: ignore[misc]


def test_config_is_a_constant_node_of_trees() -> None:
    tree = (torch.ones(2), read(), torch.zeros(3))
    assert len(leaves(tree)) == 2
    assert rebuild(tree, [1, 2]) == (1, read(), 2)
    assert leaves(read()) == []
