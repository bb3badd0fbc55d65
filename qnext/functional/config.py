"""The static description of a model: read from Hugging Face's config.json, never changed."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from qnext.errors import ConfigError
from qnext.functional.mesh import Block, Mesh
from qnext.functional.rope import Rope
from qnext.functional.scheme import check_quantization_config
from qnext.functional.tree import register_constant

ATTENTION, DELTA = "full_attention", "linear_attention"
PAGE = 128  # tokens a page of keys and values; what the fused attention calls want
MAY_BE_ZERO = {  # sizes of parts that a model may lack
    "intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "mtp_layers",
}


class Precision(NamedTuple):
    """Where which dtype is used; rounding happens at these seams and nowhere else."""

    compute: torch.dtype = torch.float32  # weights, activations, keys and values
    state: torch.dtype = torch.float32  # recurrent states between calls
    router: torch.dtype = torch.float32  # softmax over experts
    logits: torch.dtype = torch.float32  # what forward returns


@dataclass(frozen=True, kw_only=True)
class Config:
    """A Qwen3-Next architecture, with Hugging Face's names and defaults.

    `mtp_layers` counts the multi-token-prediction modules of the checkpoint; published configs do
    not say it, so `load` sets it from the tensors that are there. Counts are those of the whole
    model; `mesh` says what of it a rank holds, and `axes` how much that is.
    """

    vocab_size: int = 151_936
    hidden_size: int = 2048
    num_hidden_layers: int = 48
    layer_types: tuple[str, ...]
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 256
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    intermediate_size: int = 5632
    num_experts: int = 512
    num_experts_per_tok: int = 10
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32_768
    tie_word_embeddings: bool = False
    rope: Rope = field(default_factory=Rope)
    mtp_layers: int = 0
    precision: Precision = field(default_factory=Precision)
    mesh: Mesh = field(default_factory=Mesh)

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> "Config":
        """The config of a parsed config.json, of the file, or of the directory that holds one.

        Raises ConfigError for another model type, for values that contradict each other, and for
        keys that would change the mathematics in a way qnext does not compute.
        """
        values = source if isinstance(source, Mapping) else _read_json(Path(source))
        _refuse_other_models(values)
        names = [n for n in cls.__dataclass_fields__ if n in values and values[n] is not None]
        given: dict[str, Any] = {name: values[name] for name in names}
        given.pop("rope", None)
        given.pop("precision", None)
        given.pop("mesh", None)
        given["mtp_layers"] = values.get("mtp_num_hidden_layers") or 0
        _check_kinds(given)
        layers = given.get("num_hidden_layers", cls.num_hidden_layers)
        given["layer_types"] = _layer_types(values, layers)
        given["mlp_only_layers"] = tuple(given.get("mlp_only_layers", ()))
        given["rope"] = Rope.from_hf(values)
        config = cls(**given)
        _check(config)
        return config

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers and `from_hf` read back to the same architecture."""
        values = asdict(self)
        del values["rope"], values["precision"], values["mtp_layers"], values["mesh"]
        values |= {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "hidden_act": "silu",
            "attention_bias": False,
            "layer_types": list(self.layer_types),
            "mlp_only_layers": list(self.mlp_only_layers),
            "rope_parameters": self.rope.to_hf(),
            "dtype": str(self.precision.compute).removeprefix("torch."),
        }
        return values | ({"mtp_num_hidden_layers": self.mtp_layers} if self.mtp_layers else {})

    def with_precision(self, **dtypes: torch.dtype) -> "Config":
        """The same architecture computed with other dtypes."""
        return replace(self, precision=self.precision._replace(**dtypes))

    @property
    def is_moe(self) -> tuple[bool, ...]:
        """For each layer, whether its feed-forward part is a mixture of experts."""
        step = self.decoder_sparse_step
        return tuple(
            i not in self.mlp_only_layers and self.num_experts > 0 and (i + 1) % step == 0
            for i in range(self.num_hidden_layers)
        )

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of the named axes that annotations speak of; docs/glossary.md tells the words.

        Those that a mesh divides are as large as what this rank holds.
        """
        return _axes(self)

    @property
    def divided(self) -> dict[str, tuple[Block, ...]]:
        """The axes that a mesh divides, and what they are made of."""
        return _divided(self)

    @property
    def fingerprint(self) -> str:
        """A hash of the architecture, whatever precision and mesh are; names a state's model."""
        values = {k: v for k, v in asdict(self).items() if k not in ("precision", "mesh")}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


register_constant(Config)


@lru_cache(maxsize=64)  # asked several times a layer
def _axes(c: Config) -> dict[str, int]:
    ffn, shared = c.moe_intermediate_size, c.shared_expert_intermediate_size
    dv = c.linear_value_head_dim
    divided = {axis: c.mesh.spans(blocks) for axis, blocks in c.divided.items()}
    return {
        "d": c.hidden_size,
        "two_d": 2 * c.hidden_size,
        "vocab": c.vocab_size,
        "hd": c.head_dim,
        "q": c.num_attention_heads * c.head_dim,
        "dk": c.linear_key_head_dim,
        "dv": dv,
        "v": c.linear_num_value_heads * dv,
        "width": c.linear_conv_kernel_dim,
        "dense": c.intermediate_size,
        "experts": c.num_experts,
        "ffn": ffn,
        "ffn_gate_up": 2 * ffn,
        "shared": shared,
        "shared_gate_up": 2 * shared,
        "page": PAGE,
        **{axis: sum(span.size for span in spans) for axis, spans in divided.items()},
    }


@lru_cache(maxsize=64)
def _divided(c: Config) -> dict[str, tuple[Block, ...]]:
    hd, dk, dv = c.head_dim, c.linear_key_head_dim, c.linear_value_head_dim

    def heads(size: int = 1) -> Block:
        return Block("heads", c.num_attention_heads, size)

    def kv(size: int = 1) -> Block:
        return Block("heads", c.num_key_value_heads, size, repeats=True)

    def keys(size: int = 1) -> Block:
        return Block("delta_heads", c.linear_num_key_heads, size)

    def values(size: int = 1) -> Block:
        return Block("delta_heads", c.linear_num_value_heads, size)

    dense = Block("dense", c.intermediate_size)
    return {
        "hq": (heads(),),
        "hkv": (kv(),),
        "qkvg": (heads(hd), kv(hd), kv(hd), heads(hd)),
        "hk": (keys(),),
        "hv": (values(),),
        "conv": (keys(dk), keys(dk), values(dv)),
        "qkvz": (keys(dk), keys(dk), values(dv), values(dv)),
        "ba": (values(), values()),
        "dense_gate_up": (dense, dense),
        "own_experts": (Block("experts", c.num_experts),),
        "own_vocab": (Block("vocab", c.vocab_size),),
    }


def _read_json(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is no checkpoint: it has no config.json. Give the directory that "
            "holds config.json and the *.safetensors files."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a JSON object, got {type(values).__name__}")
    return values


def _refuse_other_models(values: Mapping[str, Any]) -> None:
    kind = values.get("model_type", "qwen3_next")
    if kind != "qwen3_next":
        raise ConfigError(f'model_type is {kind!r}; qnext computes "qwen3_next"')
    wanted = {"hidden_act": "silu", "attention_bias": False}
    for key, value in wanted.items():
        if values.get(key, value) != value:
            raise ConfigError(
                f"{key} = {values[key]!r} is not supported: qnext computes {key} = {value!r}"
            )
    if (quantised := values.get("quantization_config")) is not None:
        check_quantization_config(quantised)  # which tensors are int8 is said by Params, not here


def _layer_types(values: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """`layer_types` as written, or every n-th layer full attention by `full_attention_interval`."""
    if (given := values.get("layer_types")) is not None:
        return tuple(given)
    interval = values.get("full_attention_interval", 4)
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ConfigError(f"full_attention_interval must be an integer >= 1, got {interval!r}")
    return tuple(DELTA if (i + 1) % interval else ATTENTION for i in range(layers))


def _check_kinds(given: Mapping[str, Any]) -> None:
    """Raise one ConfigError that lists every value of the wrong kind; the fields say the kinds."""
    wrong: list[str] = []
    for name, value in given.items():
        kind = Config.__dataclass_fields__[name].type
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind is int:
            least = 0 if name in MAY_BE_ZERO else 1
            rule = f"an integer >= {least}"
            fits = number and isinstance(value, int) and value >= least
        elif kind is float:
            rule, fits = "a number > 0", number and 0 < value < math.inf
        elif kind is bool:
            rule, fits = "true or false", isinstance(value, bool)
        else:
            item = get_args(kind)[0]
            rule = "a list of " + {str: "strings", int: "integers"}[item]
            fits = isinstance(value, list | tuple) and all(type(v) is item for v in value)
        if not fits:
            name = "mtp_num_hidden_layers" if name == "mtp_layers" else name
            wrong.append(f"{name} must be {rule}, got {value!r}")
    if wrong:
        raise ConfigError("; ".join(wrong))


def _check(c: Config) -> None:
    """Raise one ConfigError that lists every contradiction."""
    wrong: list[str] = []
    if len(c.layer_types) != c.num_hidden_layers:
        wrong.append(
            f"layer_types lists {len(c.layer_types)} layers, "
            f"num_hidden_layers says {c.num_hidden_layers}"
        )
    if unknown := sorted({str(t) for t in c.layer_types} - {ATTENTION, DELTA}):
        wrong.append(f'layer_types knows "{ATTENTION}" and "{DELTA}", got {unknown}')
    if c.num_attention_heads % c.num_key_value_heads:
        wrong.append("num_attention_heads must be a multiple of num_key_value_heads")
    if c.linear_num_value_heads % c.linear_num_key_heads:
        wrong.append("linear_num_value_heads must be a multiple of linear_num_key_heads")
    if c.linear_conv_kernel_dim < 2:
        wrong.append("linear_conv_kernel_dim must be >= 2")
    if outside := [i for i in c.mlp_only_layers if not 0 <= i < c.num_hidden_layers]:
        wrong.append(f"mlp_only_layers names layers that do not exist: {outside}")
    if any(c.is_moe) and not 1 <= c.num_experts_per_tok <= c.num_experts:
        wrong.append(
            f"num_experts_per_tok = {c.num_experts_per_tok} must lie in 1..{c.num_experts}"
        )
    if any(c.is_moe) and not (c.moe_intermediate_size and c.shared_expert_intermediate_size):
        wrong.append("moe_intermediate_size and shared_expert_intermediate_size must be >= 1")
    if not all(c.is_moe) and not c.intermediate_size:
        wrong.append("intermediate_size must be >= 1 where a layer has no experts")
    if c.rope.partial > 1:
        wrong.append(f"partial_rotary_factor must lie in (0, 1], got {c.rope.partial}")
    elif (channels := c.rope.rotated_channels(c.head_dim)) > c.head_dim:
        wrong.append(
            f"head_dim = {c.head_dim} must be even: partial_rotary_factor = {c.rope.partial} "
            f"rotates {channels} channels"
        )
    if wrong:
        raise ConfigError("; ".join(wrong))
