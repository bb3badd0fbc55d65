"""Odd little models for tests: no two axes of a model are of equal size, so no transpose can hide.

Each spec is a transformers-style config dictionary; `oracle(spec)` builds transformers' own model
with it, with weights that leave nothing degenerate.
"""

from typing import Any

import torch

BASE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 14,
    "linear_conv_kernel_dim": 4,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 18,
    "shared_expert_intermediate_size": 22,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
ODD: dict[str, dict[str, Any]] = {
    "base": {},
    "gqa1": {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 16},
    "gqa4": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 20},
    "one_kv_head": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 28},
    "dense_layers": {"mlp_only_layers": [0, 2]},
    "sparse_step": {"decoder_sparse_step": 2, "num_hidden_layers": 5},
    "all_dense": {"num_experts": 0},
    "tied": {"tie_word_embeddings": True},
    "attention_first": {
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "num_hidden_layers": 3,
    },
    "only_attention": {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2},
    "only_delta": {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2},
    "interval2": {"full_attention_interval": 2, "num_hidden_layers": 5},
    "conv3": {"linear_conv_kernel_dim": 3},
    "conv2": {"linear_conv_kernel_dim": 2, "linear_num_value_heads": 3},
    "wide_values": {"linear_num_key_heads": 2, "linear_num_value_heads": 8},
    "raw_topk": {"norm_topk_prob": False, "num_experts_per_tok": 2},
    "all_rotary": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 1.0,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear_rope": {
        "rope_parameters": {
            "rope_type": "linear",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "factor": 3.0,
        }
    },
    "loose_eps": {"rms_norm_eps": 1e-3},
}

# sizes that every fused call of an NPU takes
FUSED: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 48,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "intermediate_size": 80,
}


def spec(name: str) -> dict[str, Any]:
    """The whole config dictionary of an odd model."""
    return BASE | ODD[name]


def oracle(name: str, seed: int = 0) -> Any:
    """transformers' float32 model of an odd spec, weights spread so that every part matters."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(seed)
    config = Qwen3NextConfig(**spec(name), experts_implementation="eager")
    model = Qwen3NextForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for path, leaf in model.named_parameters():
            _spread(path, leaf, generator)
    return model


def _spread(path: str, leaf: torch.Tensor, generator: torch.Generator) -> None:
    if path.endswith("A_log"):
        leaf.uniform_(0.05, 8, generator=generator).log_()
    elif path.endswith("dt_bias"):
        leaf.uniform_(-4, 1, generator=generator)
    elif "norm" in path:  # zero-centred norms are 0 at first, the gated norm is 1
        leaf.add_(torch.empty_like(leaf).normal_(0, 0.2, generator=generator))
    elif path.endswith("embed_tokens.weight"):
        leaf.normal_(0, 1, generator=generator)
    elif "conv1d" in path:
        leaf.normal_(0, 0.5, generator=generator)
    elif path.endswith("mlp.gate.weight"):
        leaf.normal_(0, 2 * leaf.shape[-1] ** -0.5, generator=generator)
    else:
        leaf.normal_(0, leaf.shape[-1] ** -0.5, generator=generator)


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """RMS of the difference over RMS of what is wanted, in float64."""
    got, want = got.double(), want.double()
    return ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()
