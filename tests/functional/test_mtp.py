"""The multi-token-prediction module against a derivation with loops, from checkpoint tensors.

The derivation reads the tensors that `save` wrote, by their published names, in float64; it shares
no code with qnext.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import qnext as qn
from qnext.functional.model import trunk
from qnext.functional.tree import leaves, leaves_with_paths, map_leaves, rebuild
from tests.samples import BASE, ODD, relative_rms, spec

EXACT = 1e-7  # float64, but for rotary angles: float32 by definition, off by 2^-24
CLOSE = 1e-5  # float32 sums in another order
BATCH, D = 5, 40  # BATCH is the size of no axis of MODELS
MODELS: dict[str, dict[str, Any]] = {
    "two_heads_a_group": {},
    "four_heads_a_group": {"num_attention_heads": 8, "head_dim": 20},
    "one_kv_head": ODD["one_kv_head"],
    "all_rotary": ODD["all_rotary"],
    "raw_topk": ODD["raw_topk"],
    "tied": ODD["tied"],
    "dense": {"num_experts": 0},
}
NAMES = {  # of serving_inventory: what a published checkpoint calls the module's tensors
    "mtp.fc.weight",
    "mtp.pre_fc_norm_embedding.weight",
    "mtp.pre_fc_norm_hidden.weight",
    "mtp.norm.weight",
    "mtp.layers.0.input_layernorm.weight",
    "mtp.layers.0.post_attention_layernorm.weight",
    *(f"mtp.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"),
    *(f"mtp.layers.0.self_attn.{x}_norm.weight" for x in "qk"),
    "mtp.layers.0.mlp.gate.weight",
    "mtp.layers.0.mlp.shared_expert_gate.weight",
    *(f"mtp.layers.0.mlp.shared_expert.{x}_proj.weight" for x in ("gate", "up", "down")),
    *(
        f"mtp.layers.0.mlp.experts.{e}.{x}_proj.weight"
        for e in range(BASE["num_experts"])
        for x in ("gate", "up", "down")
    ),
}


def lively(config: qn.Config) -> qn.Params:
    """Random params in which every norm and every gate matters."""
    params, generator = qn.init_params(config, seed=1), torch.Generator().manual_seed(2)

    def shaken(path: str, leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
        size = 0.3 if path.endswith("norm") else 1.0 if path == ".embed" else 0.0
        return noise / math.sqrt(D) if path.endswith("router") else leaf + size * noise

    return rebuild(params, [shaken(path, leaf) for path, leaf in leaves_with_paths(params)])


class Model(NamedTuple):
    params: qn.Params
    tensors: dict[str, Tensor]  # as saved


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    kinds = dict.fromkeys(["compute", "state", "router", "logits"], torch.float64)
    config = qn.Config.from_hf(BASE | MODELS[request.param])
    params = lively(replace(config, mtp_layers=1).with_precision(**kinds))
    path = tmp_path_factory.mktemp("mtp")
    qn.save(params, path)
    return Model(params, load_file(path / "model.safetensors"))


@pytest.fixture(scope="module")
def hybrid() -> qn.Params:
    """A float32 model of both kinds of layers."""
    return lively(replace(qn.Config.from_hf(spec("base")), mtp_layers=1))


def gemma_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * (1 + weight)


def rotated(x: Tensor, position: int, config: qn.Config) -> Tensor:
    """Channels i and i + half turn by position * theta^(-2 i / channels)."""
    channels = int(x.shape[0] * config.rope.partial)
    half, out = math.ceil(channels / 2), x.clone()
    for i in range(half):
        angle = position * config.rope.theta ** (-2 * i / channels)
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i + half] * cos + x[i] * sin
    return out


def swiglu(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    gate, up = w[f"{name}.gate_proj.weight"] @ x, w[f"{name}.up_proj.weight"] @ x
    return w[f"{name}.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def feed_forward(x: Tensor, w: dict[str, Tensor], config: qn.Config) -> Tensor:
    if config.num_experts == 0:
        return swiglu(x, w, "mtp.layers.0.mlp")
    score = (w["mtp.layers.0.mlp.gate.weight"] @ x).exp()
    score = score / score.sum()
    chosen = sorted(range(config.num_experts), key=lambda e: -score[e])
    chosen = chosen[: config.num_experts_per_tok]
    total = sum(score[e] for e in chosen) if config.norm_topk_prob else 1.0
    out = torch.sigmoid(w["mtp.layers.0.mlp.shared_expert_gate.weight"] @ x) * swiglu(
        x, w, "mtp.layers.0.mlp.shared_expert"
    )
    for e in chosen:
        out = out + score[e] / total * swiglu(x, w, f"mtp.layers.0.mlp.experts.{e}")
    return out


def derivation(model: Model, hidden: Tensor, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """(logits, hidden') of one sequence of pairs: hidden [pairs, d], the tokens that follow."""
    w, c = model.tensors, model.params.config
    eps, hd = c.rms_norm_eps, c.head_dim
    group = c.num_attention_heads // c.num_key_value_heads
    attn = "mtp.layers.0.self_attn."
    keys: list[list[Tensor]] = []
    values: list[Tensor] = []
    result = []
    for t, (h, token) in enumerate(zip(hidden, tokens, strict=True)):
        joined = [
            gemma_norm(w["model.embed_tokens.weight"][token], w[NORM_E], eps),
            gemma_norm(h, w[NORM_H], eps),
        ]
        x = w["mtp.fc.weight"] @ torch.cat(joined)
        n = gemma_norm(x, w["mtp.layers.0.input_layernorm.weight"], eps)
        k = (w[f"{attn}k_proj.weight"] @ n).view(-1, hd)
        keys.append([rotated(gemma_norm(i, w[f"{attn}k_norm.weight"], eps), t, c) for i in k])
        values.append((w[f"{attn}v_proj.weight"] @ n).view(-1, hd))
        mixed = []
        for j, rows in enumerate((w[f"{attn}q_proj.weight"] @ n).view(-1, 2 * hd)):
            q = rotated(gemma_norm(rows[:hd], w[f"{attn}q_norm.weight"], eps), t, c)
            score = torch.stack([q @ keys[s][j // group] / math.sqrt(hd) for s in range(t + 1)])
            share = (score - score.max()).exp() / (score - score.max()).exp().sum()
            seen = sum(share[s] * values[s][j // group] for s in range(t + 1))
            mixed.append(seen * torch.sigmoid(rows[hd:]))
        x = x + w[f"{attn}o_proj.weight"] @ torch.cat(mixed)
        n = gemma_norm(x, w["mtp.layers.0.post_attention_layernorm.weight"], eps)
        x = x + feed_forward(n, w, c)
        result.append(gemma_norm(x, w["mtp.norm.weight"], eps))
    out = torch.stack(result)
    return out @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T, out


NORM_E, NORM_H = "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"


def pairs(params: qn.Params, count: int) -> tuple[Tensor, Tensor]:
    """Hidden states and tokens of `count` pairs a row."""
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(BATCH, count, D, generator=generator).to(params.embed.dtype)
    return hidden, torch.randint(0, 211, (BATCH, count), generator=generator)


def wanted(model: Model, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    rows = [derivation(model, h, t.tolist()) for h, t in zip(hidden, tokens, strict=True)]
    return torch.stack([logits for logits, _ in rows]), torch.stack([out for _, out in rows])


@pytest.mark.parametrize("split", [[7], [3, 4], [1] * 7], ids=["whole", "chunks", "steps"])
def test_the_derivation(model: Model, split: list[int]) -> None:
    hidden, tokens = pairs(model.params, 7)
    state, parts = qn.init_state(model.params.config, BATCH, 7), []
    for h, t in zip(hidden.split(split, dim=1), tokens.split(split, dim=1), strict=True):
        logits, out, state = qn.mtp(model.params, state, h, t)
        parts.append((logits, out))
    for got, want in zip(zip(*parts, strict=True), wanted(model, hidden, tokens), strict=True):
        assert relative_rms(torch.cat(got, 1), want) < EXACT
    assert state.mtp_lengths.tolist() == [7] * BATCH
    assert state.lengths.tolist() == [0] * BATCH


def test_ragged_rows(model: Model) -> None:
    """Two ragged calls, an empty row in each; padded pairs hold garbage of every kind."""
    (hidden, tokens), counts = (
        pairs(model.params, 8),
        torch.tensor([[3, 1], [0, 4], [4, 0], [1, 3], [4, 4]]),
    )
    state, got = qn.init_state(model.params.config, BATCH, 8), [[] for _ in range(BATCH)]
    for call in (0, 1):
        first = counts[:, :call].sum(1, keepdim=True)
        at = (first + torch.arange(4)).clamp(max=7)
        padding = torch.arange(4) >= counts[:, call, None]
        h = hidden.take_along_dim(at[..., None], 1).masked_fill(padding[..., None], torch.nan)
        t = tokens.take_along_dim(at, 1).masked_fill(padding, 10**9)
        logits, _, state = qn.mtp(model.params, state, h, t, counts[:, call])
        for row in range(BATCH):
            got[row].append(logits[row, : counts[row, call]])
    for row, total in enumerate(counts.sum(1).tolist()):
        want, _ = derivation(model, hidden[row, :total], tokens[row, :total].tolist())
        assert relative_rms(torch.cat(got[row]), want) < EXACT
    assert state.mtp_lengths.tolist() == counts.sum(1).tolist()


def test_chained(model: Model) -> None:
    """A draft of four: hidden' stands for the next hidden state, its best token follows."""
    hidden, tokens = pairs(model.params, 3)
    state = qn.init_state(model.params.config, BATCH, 7)
    logits, out, state = qn.mtp(model.params, state, hidden, tokens)
    for _ in range(4):
        hidden = torch.cat([hidden, out[:, -1:]], dim=1)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        logits, out, state = qn.mtp(model.params, state, hidden[:, -1:], tokens[:, -1:])
        want = wanted(model, hidden, tokens)
        assert relative_rms(logits[:, 0], want[0][:, -1]) < EXACT
        assert relative_rms(out[:, 0], want[1][:, -1]) < EXACT


def test_beside_the_model(hybrid: qn.Params) -> None:
    """Fed with the model's own hidden states; neither part of the state disturbs the other."""
    tokens = torch.randint(0, 211, (BATCH, 131))
    lengths = torch.tensor([131, 1, 70, 2, 128])
    empty = qn.init_state(hybrid.config, BATCH, 140)
    hidden, state = trunk(hybrid, empty, tokens, lengths.int())
    arguments = (hybrid, state, hidden[:, :-1], tokens[:, 1:], lengths - 1)
    before = [(leaf, leaf.clone(), leaf._version) for leaf in leaves(arguments)]
    logits, _, after = qn.mtp(*arguments)
    for leaf, copy, version in before:
        assert torch.equal(leaf, copy) and leaf._version == version
    assert all(map(torch.equal, leaves(logits), leaves(qn.mtp(*arguments)[0])))
    assert after.mtp_lengths.tolist() == (lengths - 1).tolist()
    kept = after._replace(mtp_lengths=state.mtp_lengths, mtp=state.mtp)
    assert all(map(torch.equal, leaves(kept), leaves(state)))
    new = tokens[:, 0]
    want, got = qn.decode(hybrid, state, new), qn.decode(hybrid, after, new)
    assert torch.equal(got[0], want[0])
    assert all(map(torch.equal, leaves(got[1].mtp), leaves(after.mtp)))


def test_scratch_is_never_read(hybrid: qn.Params) -> None:
    hidden, tokens = pairs(hybrid, 9)
    lengths = torch.tensor([9, 0, 4, 1, 6])
    state = qn.init_state(hybrid.config, BATCH, 140)
    spoilt = state._replace(
        mtp=map_leaves(lambda pool: torch.full_like(pool, torch.nan), state.mtp)
    )
    for _ in range(2):
        want, _, state = qn.mtp(hybrid, state, hidden, tokens, lengths)
        got, _, spoilt = qn.mtp(hybrid, spoilt, hidden, tokens, lengths)
        for row, count in enumerate(lengths.tolist()):
            assert torch.equal(got[row, :count], want[row, :count])


def test_select_and_fork_carry_the_module(hybrid: qn.Params) -> None:
    hidden, tokens = pairs(hybrid, 6)
    _, _, state = qn.mtp(hybrid, qn.init_state(hybrid.config, BATCH, 140), hidden, tokens)
    want, _, _ = qn.mtp(hybrid, state, hidden[:, :2], tokens[:, :2])
    rows = [4, 2, 2]
    got, _, _ = qn.mtp(hybrid, qn.select(state, rows), hidden[rows, :2], tokens[rows, :2])
    assert relative_rms(got, want[rows]) < CLOSE


@pytest.mark.parametrize("module", [0, 1, -1])
def test_a_model_without_the_module_says_so(hybrid: qn.Params, module: int) -> None:
    params = hybrid
    if module == 0:
        params = hybrid._replace(config=replace(hybrid.config, mtp_layers=0), mtp=())
    hidden, tokens = pairs(params, 2)
    state = qn.init_state(params.config, BATCH, 7)
    count = params.config.mtp_layers
    with pytest.raises(qn.InputError, match=f"has {count} MTP modules, module {module} is not"):
        qn.mtp(params, state, hidden, tokens, None, module)


def test_what_does_not_fit_is_refused(hybrid: qn.Params) -> None:
    hidden, tokens = pairs(hybrid, 6)
    state = qn.init_state(hybrid.config, BATCH, 7)
    with pytest.raises(
        qn.InputError, match=r"hidden must be .*\[5, 6, 40\] to go with tokens, got \[5, 5, 40\]"
    ):
        qn.mtp(hybrid, state, hidden[:, :5], tokens)
    _, _, state = qn.mtp(hybrid, state, hidden, tokens)
    with pytest.raises(qn.CapacityError, match="row 0 holds 6 tokens and would hold 12"):
        qn.mtp(hybrid, state, hidden, tokens)


def test_saved_and_loaded(hybrid: qn.Params, tmp_path: Path) -> None:
    """The tensors have their published names, come back bit for bit, and hinder nobody."""
    from transformers import Qwen3NextForCausalLM

    qn.save(hybrid, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name for name in stored if name.startswith("mtp")} == NAMES
    assert stored["mtp.fc.weight"].shape == (D, 2 * D)
    again = qn.load(tmp_path)
    assert again.config == hybrid.config
    assert all(map(torch.equal, leaves(again), leaves(hybrid)))
    theirs = Qwen3NextForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    tokens = torch.randint(0, 211, (BATCH, 19))
    logits, _ = qn.forward(hybrid, qn.init_state(hybrid.config, BATCH, 19), tokens)
    with torch.no_grad():
        assert relative_rms(logits, theirs(tokens, use_cache=False).logits) < CLOSE
