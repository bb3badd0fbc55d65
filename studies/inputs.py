"""What the studies feed the delta rule: the demo model's own inputs, and random ones."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, normalize

import qnext as qn
from qnext.embedded import PROBLEMS
from qnext.evaluate import read_problems, shown
from qnext.functional import ops
from qnext.functional.blocks import L2_EPS, layer, locate, project
from qnext.functional.params import DeltaNetParams
from qnext.functional.state import Delta

RESULTS = Path(__file__).with_name("results.json")
IMAGES = Path(__file__).parents[1] / "docs" / "images"


class Inputs(NamedTuple):
    """Arguments of the delta rule; query and key are normalised and not yet scaled."""

    query: Tensor  # [batch, seq, hk, dk]
    key: Tensor  # [batch, seq, hk, dk]
    value: Tensor  # [batch, seq, hv, dv]
    g: Tensor  # [batch, seq, hv]
    beta: Tensor  # [batch, seq, hv]

    def as_fused(self) -> "Inputs":
        """As the fused calls take them: g float32, everything else rounded to bfloat16."""
        rounded = (x.bfloat16().float() for x in self)
        return Inputs(*rounded)._replace(g=self.g.float())

    def scaled(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(q, k, v, g, beta) as `delta_scan` and `delta_chunked` take them."""
        q, k, v, g, beta = (x.to(dtype) for x in self)
        return q * q.shape[-1] ** -0.5, k, v, g, beta

    def zero_state(self, dtype: torch.dtype) -> Tensor:
        """An empty state [batch, hv, dv, dk]."""
        (batch, _, hv, dv), dk = self.value.shape, self.key.shape[-1]
        return torch.zeros(batch, hv, dv, dk, dtype=dtype)


def random_inputs(
    seq: int,
    low: float,
    high: float = 0.0,
    *,
    batch: int = 1,
    hk: int = 2,
    hv: int = 4,
    dk: int = 128,
    dv: int = 128,
    seed: int = 0,
) -> Inputs:
    """Random inputs with g uniform in [low, high]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Inputs(
        query=normalize(normal(batch, seq, hk, dk), dim=-1),
        key=normalize(normal(batch, seq, hk, dk), dim=-1),
        value=normal(batch, seq, hv, dv),
        g=low + (high - low) * torch.rand(batch, seq, hv, generator=generator),
        beta=torch.rand(batch, seq, hv, generator=generator),
    )


def demo_tokens(rows: int, seq: int) -> Tensor:
    """The embedded problems with their answers, one after the other, cut into rows of `seq`."""
    text = "".join(map(shown, read_problems(PROBLEMS)))
    tokens = qn.tokenizer().encode(text)
    tokens = tokens * -(-rows * seq // len(tokens))
    return torch.tensor(tokens[: rows * seq]).view(rows, seq)


@torch.no_grad()
def demo_inputs(tokens: Tensor) -> Iterator[tuple[int, Inputs]]:
    """(layer number, inputs of its delta rule) of the demo model reading tokens [rows, seq].

    Walks the layers with the model's own functions and computes each delta net's inputs anew.
    """
    params = qn.demo()
    config = params.config
    rows, seq = tokens.shape
    state = qn.init_state(config, rows, seq)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    step = locate(config, state, state.lengths, valid)
    x = embedding(tokens, params.embed)
    hk, hv = config.linear_num_key_heads, config.linear_num_value_heads
    dk, dv = config.linear_key_head_dim, config.linear_value_head_dim
    for number, (p, past) in enumerate(zip(params.layers, state.layers, strict=True)):
        if isinstance(p.mixer, DeltaNetParams):
            assert isinstance(past, Delta)
            normed = ops.rms_norm(x=x, weight=p.input_norm, eps=config.rms_norm_eps)
            qkv, _ = project(normed, p.mixer.in_proj).split([2 * hk * dk + hv * dv, hv * dv], -1)
            qkv, _ = ops.short_conv(
                x=qkv,
                weight=p.mixer.conv,
                window=past.window,
                rows=step.row,
                offset=step.offset,
                start=step.taken,
            )
            query, key, value = qkv.split([hk * dk, hk * dk, hv * dv], -1)
            b, a = project(normed, p.mixer.gate_proj).chunk(2, dim=-1)
            g, beta = ops.delta_gates(
                a=a, b=b, A_log=p.mixer.A_log, dt_bias=p.mixer.dt_bias, valid=valid
            )
            yield (
                number,
                Inputs(
                    query=ops.l2_norm(x=query.unflatten(-1, (hk, dk)), eps=L2_EPS),
                    key=ops.l2_norm(x=key.unflatten(-1, (hk, dk)), eps=L2_EPS),
                    value=value.unflatten(-1, (hv, dv)),
                    g=g,
                    beta=beta,
                ),
            )
        x, _ = layer(p, past, x, step, config)


def stack(inputs: Sequence[Inputs]) -> Inputs:
    """Inputs of several layers as rows of one batch."""
    return Inputs(*(torch.cat(parts) for parts in zip(*inputs, strict=True)))


def relative_rms(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|; NaN where `got` is not finite."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def record(name: str, values: dict[str, Any], path: Path = RESULTS) -> None:
    """Put one study's numbers into the file of results, beside the others'."""
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = _short(values)
    path.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")


def _short(value: Any) -> Any:
    """Numbers to four digits; more would be noise."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
