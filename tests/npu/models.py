"""Tiny odd models whose sizes the fused calls take or refuse in different ways, and the demo."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import qnext as qn
from qnext.functional.tree import leaves_with_paths, map_leaves, rebuild
from qnext.lowering.npu import probe
from qnext.lowering.target import Target, of_device
from tests.samples import FUSED

BF16 = torch.bfloat16


def here() -> Target:
    """The target of the device that the tests run on."""
    found = of_device(probe.device_name())
    assert found is not None
    return found


SPECS: dict[str, dict[str, Any]] = {
    "fused": FUSED,
    # the published attention head, one key head, dense layers between, two kinds alternating
    "dense": FUSED
    | {
        "head_dim": 256,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "full_attention_interval": 2,
        "num_hidden_layers": 5,
        "mlp_only_layers": [0, 3],
        "linear_num_value_heads": 3,
    },
    # attention first, a shared expert of another width, weights that do not sum to 1, tied head
    "apart": FUSED
    | {
        "head_dim": 64,
        "num_attention_heads": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 40,
        "shared_expert_intermediate_size": 112,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "num_hidden_layers": 3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.5,
        },
    },
}
MODELS = (*SPECS, "demo")


class Case(NamedTuple):
    """A step and its arguments on the host, ready to run there."""

    function: Any
    arguments: tuple[Any, ...]


def params(name: str, state: torch.dtype = BF16, **changes: Any) -> qn.Params:
    """bfloat16 params with weights that leave nothing degenerate; the demo's are its own."""
    if name == "demo":
        loaded = qn.demo(BF16)
        config = loaded.config.with_precision(state=state)
        return loaded._replace(config=config)
    config = qn.Config.from_hf(SPECS.get(name, {}) | changes).with_precision(
        compute=BF16, state=state
    )
    drawn = qn.init_params(config, seed=3)
    generator = torch.Generator().manual_seed(4)

    def spread(path: str, leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=generator)
        if path.endswith("A_log"):  # from slow decay to fast
            return leaf.clone().uniform_(0.05, 8, generator=generator).log_()
        if path.endswith("dt_bias"):
            return noise.to(leaf.dtype)
        if path.endswith("norm"):
            return (leaf.float() + 0.2 * noise).to(leaf.dtype)
        if path.endswith("router"):
            return (2 * leaf.shape[-1] ** -0.5 * noise).to(leaf.dtype)
        if path.endswith("embed"):
            return noise.to(leaf.dtype)
        return leaf

    return rebuild(drawn, [spread(path, leaf) for path, leaf in leaves_with_paths(drawn)])


def case(kind: str, weights: qn.Params, draft: int = 2, sequences: int = 3) -> Case:
    """decode, verify (after a commit with other counts a row) or prefill of three ragged rows.

    "short" is a prefill of a few tokens that follow others. Pools have room for `sequences`.
    """
    generator = torch.Generator().manual_seed(5)
    vocab = weights.config.vocab_size

    def tokens(*shape: int) -> Tensor:
        return torch.randint(0, vocab, shape, generator=generator)

    drafts, capacity = (draft if kind == "verify" else 0), (100 if kind == "prefill" else 300)
    state = qn.narrow(qn.init_state(weights.config, sequences, capacity, draft=drafts), 3)
    if kind == "prefill":
        return Case(qn.prefill, (weights, state, tokens(3, 70), torch.tensor([70, 3, 41])))
    _, state = qn.prefill(weights, state, tokens(3, 130), torch.tensor([130, 2, 57]))
    if kind == "decode":
        return Case(qn.decode, (weights, state, tokens(3)))
    if kind == "short":
        return Case(qn.prefill, (weights, state, tokens(3, 5), torch.tensor([4, 5, 1])))
    _, pending = qn.verify(weights, state, tokens(3, draft + 1))
    state = qn.commit(pending, torch.tensor([2, 1, min(3, draft + 1)]))
    return Case(qn.verify, (weights, state, tokens(3, draft + 1)))


def copied(tree: Any) -> Any:
    """The same values in memory of their own."""
    return map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def there(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments on the device, in memory of their own."""
    return tuple(copied(qn.place(tree, "npu")) for tree in arguments)
