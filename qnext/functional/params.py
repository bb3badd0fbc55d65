"""The weights of a model as a tree of NamedTuples; `config` rides inside as a constant node.

Projections that read the same input are one matrix each, their rows in whole blocks:
`qkvg` = query, key, value, output gate; `qkvz` = query, key, value, output gate z; `ba` = write
strength b, decay a; `gate_up` = gate, up. Norm weights marked zero-centred scale by 1 + w.

Every matrix that multiplies activations may be `Quantized`; the model is the same functions.
"""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from qnext.functional.config import ATTENTION, Config
from qnext.functional.tree import leaves_with_paths, map_with_paths, rebuild
from qnext.shapes import LeafHint, allocate, alternatives


class Quantized(NamedTuple):
    """A matrix, or one an expert, in int8 with a scale for each of its rows (output channels)."""

    weight: Int8[Tensor, "*rows columns"]
    scale: Float32[Tensor, "*rows"]


class AttentionParams(NamedTuple):
    """Gated grouped-query attention."""

    in_proj: Float[Tensor, "qkvg d"] | Quantized
    q_norm: Float[Tensor, " hd"]  # zero-centred
    k_norm: Float[Tensor, " hd"]  # zero-centred
    out_proj: Float[Tensor, "d q"] | Quantized


class DeltaNetParams(NamedTuple):
    """Gated DeltaNet."""

    in_proj: Float[Tensor, "qkvz d"] | Quantized
    gate_proj: Float[Tensor, "ba d"] | Quantized
    conv: Float[Tensor, "conv width"]
    A_log: Float32[Tensor, " hv"]
    dt_bias: Float32[Tensor, " hv"]
    norm: Float[Tensor, " dv"]  # plain weight
    out_proj: Float[Tensor, "d v"] | Quantized


class DenseParams(NamedTuple):
    """SwiGLU feed-forward."""

    gate_up: Float[Tensor, "dense_gate_up d"] | Quantized
    down: Float[Tensor, "d dense"] | Quantized


class MoeParams(NamedTuple):
    """Mixture of SwiGLU experts with one shared expert behind a sigmoid gate."""

    router: Float[Tensor, "experts d"] | Quantized
    gate_up: Float[Tensor, "own_experts ffn_gate_up d"] | Quantized
    down: Float[Tensor, "own_experts d ffn"] | Quantized
    shared_gate: Float[Tensor, "1 d"] | Quantized
    shared_gate_up: Float[Tensor, "shared_gate_up d"] | Quantized
    shared_down: Float[Tensor, "d shared"] | Quantized


MixerParams: TypeAlias = AttentionParams | DeltaNetParams
FfnParams: TypeAlias = MoeParams | DenseParams


class LayerParams(NamedTuple):
    input_norm: Float[Tensor, " d"]  # zero-centred
    mixer: MixerParams
    post_norm: Float[Tensor, " d"]  # zero-centred
    ffn: FfnParams


class MtpParams(NamedTuple):
    """A multi-token-prediction module: one attention layer between a joining and a final norm."""

    embed_norm: Float[Tensor, " d"]  # zero-centred
    hidden_norm: Float[Tensor, " d"]  # zero-centred
    fc: Float[Tensor, "d two_d"] | Quantized
    layer: LayerParams
    norm: Float[Tensor, " d"]  # zero-centred


class Head(NamedTuple):
    weight: Float[Tensor, "own_vocab d"] | Quantized


class Params(NamedTuple):
    """A whole model; `head` is empty where the embedding serves as the head (tied)."""

    config: Config
    embed: Float[Tensor, "vocab d"]
    layers: tuple[LayerParams, ...]
    norm: Float[Tensor, " d"]  # zero-centred
    head: tuple[Head, ...]
    mtp: tuple[MtpParams, ...]


def empty_params(config: Config, device: torch.device | str | None = None) -> Params:
    """Params of a config with uninitialised values; on device "meta" they are specs."""
    axes, compute = config.axes, config.precision.compute

    def make(shape: tuple[int, ...], hint: LeafHint) -> Tensor:
        # float64 models keep their gates in float64 as well: that is what makes them an oracle
        dtype = torch.promote_types(hint.dtype, compute) if hint.dtype else compute
        return torch.empty(shape, dtype=dtype, device=device)

    def vector() -> Tensor:
        return make((axes["d"],), LeafHint(("d",), None, "norm"))

    def layer(mixer: Callable[..., MixerParams], moe: bool) -> LayerParams:
        ffn: Callable[..., FfnParams] = MoeParams if moe else DenseParams
        return LayerParams(
            vector(), allocate(mixer, axes, make), vector(), allocate(ffn, axes, make)
        )

    kinds = [AttentionParams if k == ATTENTION else DeltaNetParams for k in config.layer_types]
    return Params(
        config=config,
        embed=make((axes["vocab"], axes["d"]), LeafHint(("vocab", "d"), None, "embed")),
        layers=tuple(layer(kind, moe) for kind, moe in zip(kinds, config.is_moe, strict=True)),
        norm=vector(),
        head=() if config.tie_word_embeddings else (allocate(Head, axes, make),),
        mtp=tuple(
            MtpParams(
                vector(),
                vector(),
                make((axes["d"], axes["two_d"]), LeafHint(("d", "two_d"), None, "fc")),
                layer(AttentionParams, config.num_experts > 0),
                vector(),
            )
            for _ in range(config.mtp_layers)
        ),
    )


def matrices(params: Params) -> Iterator[tuple[str, Tensor | Quantized]]:
    """The leaves that may be `Quantized`, with their paths."""
    yield from alternatives(params, "")


def quantized_specs(params: Params, paths: Collection[str]) -> Params:
    """Specs with the matrices at `paths` as `Quantized`, others as they are."""

    def spec(path: str, leaf: Tensor) -> Tensor | Quantized:
        if path not in paths:
            return leaf
        # `empty_like` of a meta tensor would import sympy: a second
        weight = torch.empty(leaf.shape, dtype=torch.int8, device=leaf.device)
        return Quantized(weight, torch.empty(leaf.shape[:-1], device=leaf.device))

    return map_with_paths(spec, params)


def init_params(config: Config, seed: int = 0) -> Params:
    """Random params to start training from: fan-in scaled matrices, norms that do nothing yet."""
    generator = torch.Generator().manual_seed(seed)

    def initial(path: str, spec: Tensor) -> Tensor:
        name = path.rpartition(".")[2]
        values = torch.empty(spec.shape)
        if name == "A_log":  # decay rates spread from slow to fast, as published
            values.uniform_(0.01, 16, generator=generator).log_()
        elif name == "dt_bias" or path.endswith(".mixer.norm"):
            values.fill_(1.0)
        elif name.endswith("norm"):
            values.zero_()
        elif name == "embed" or name == "router":
            values.normal_(0, 0.02, generator=generator)
        else:
            values.normal_(0, spec.shape[-1] ** -0.5, generator=generator)
        return values.to(spec.dtype)

    specs = empty_params(config, "meta")
    return rebuild(specs, [initial(path, leaf) for path, leaf in leaves_with_paths(specs)])
