"""Each primitive against a derivation of its own, written here in float64 with loops.

The delta rule has a file to itself, test_delta_rule.py, and so has the noise's statistics.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext.functional import ops
from tests.samples import relative_rms

F64 = torch.float64


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def agree(name: str, got: Tensor, want: Tensor) -> None:
    """Within the primitive's own tolerance of float64, which says why."""
    assert got.dtype == want.dtype == F64
    assert got.shape == want.shape
    assert relative_rms(got, want) <= ops.PRIMITIVES[name].tolerance[F64].relative_rms


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


# Norms.


def rows(x: Tensor) -> list[list[float]]:
    return x.flatten(0, -2).tolist()


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rms_norm_scales_by_one_plus_weight(size: float, eps: float) -> None:
    x, weight = randn(2, 5, 7) * size, randn(7)
    want = torch.zeros(10, 7, dtype=F64)
    for i, row in enumerate(rows(x)):
        rms = math.sqrt(sum(v * v for v in row) / 7 + eps)
        for j, v in enumerate(row):
            want[i, j] = v / rms * (1 + weight[j])
    agree("rms_norm", ops.rms_norm(x=x, weight=weight, eps=eps), want.view_as(x))


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_gated_rms_norm_norms_before_it_gates_and_has_a_plain_weight(eps: float) -> None:
    x, weight, gate = randn(2, 5, 3, 7), randn(7), randn(2, 5, 3, 7) * 4
    want = torch.zeros(30, 7, dtype=F64)
    for i, (row, gates) in enumerate(zip(rows(x), rows(gate), strict=True)):
        rms = math.sqrt(sum(v * v for v in row) / 7 + eps)
        for j, (v, z) in enumerate(zip(row, gates, strict=True)):
            want[i, j] = v / rms * weight[j] * z * sigmoid(z)
    got = ops.gated_rms_norm(x=x, weight=weight, gate=gate, eps=eps)
    agree("gated_rms_norm", got, want.view_as(x))


@pytest.mark.parametrize("norm", [1e-6, 1e-5, 1e-4, 1e-3, 1.0, 1e3])
def test_l2_norm_has_its_eps_inside_the_root(norm: float) -> None:
    x = randn(2, 5, 3, 7)
    x = x / x.norm(dim=-1, keepdim=True) * norm
    want = [[v / math.sqrt(sum(u * u for u in row) + 1e-6) for v in row] for row in rows(x)]
    agree("l2_norm", got := ops.l2_norm(x=x, eps=1e-6), torch.tensor(want, dtype=F64).view_as(x))
    # at a norm of 1e-3 the result is 1/sqrt(2) long; x / max(norm, eps) would make it 1
    length = torch.full((2, 5, 3), norm / math.sqrt(norm**2 + 1e-6), dtype=F64)
    agree("l2_norm", got.norm(dim=-1), length)


# Rotary.


def turn(x: Tensor, position: Tensor, frequency: Tensor, factor: float) -> Tensor:
    """Channels i and i + pairs as one complex number, multiplied by factor * e^(i * angle)."""
    pairs = len(frequency)
    angle = torch.einsum("bt,p->btp", position.double(), frequency)[:, :, None]
    turned = torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs])
    turned = turned * torch.polar(torch.full_like(angle, factor), angle)
    return torch.cat([turned.real, turned.imag, x[..., 2 * pairs :]], dim=-1)


@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("pairs", [1, 4, 7])
def test_rotary_turns_pairs_of_leading_channels(pairs: int, factor: float) -> None:
    query, key = randn(2, 5, 6, 14), randn(2, 5, 3, 14)
    position = torch.tensor([[0, 1, 2, 3, 4], [262_139, 262_140, 262_141, 262_142, 262_143]])
    frequency = torch.rand(pairs, dtype=F64)
    got = ops.rotary(query=query, key=key, position=position, frequency=frequency, factor=factor)
    for x, turned in zip((query, key), got, strict=True):
        # 1e-10: radians near 2.6e5 are multiples of 6e-11, and einsum may round them otherwise
        assert relative_rms(turned, turn(x, position, frequency, factor)) < 1e-10
        assert torch.equal(turned[..., 2 * pairs :], x[..., 2 * pairs :])  # the factor included
        assert factor != 1 or torch.equal(turned[0, 0], x[0, 0])  # position 0 turns nothing


def test_rotary_scores_depend_on_distance_alone() -> None:
    query, key = randn(1, 1, 6, 14).expand(2, 5, 6, 14), randn(1, 1, 3, 14).expand(2, 5, 3, 14)
    position = torch.tensor([[0, 3, 7, 11, 29], [100, 103, 107, 111, 129]], dtype=torch.int32)
    frequency = torch.rand(4, dtype=F64)
    q, k = ops.rotary(query=query, key=key, position=position, frequency=frequency, factor=1.0)
    scores = torch.einsum("bthd,bsgd->bhgts", q, k)
    assert relative_rms(scores[1], scores[0]) < 1e-12  # radians near 100 are multiples of 1e-14
    assert relative_rms(scores[:, :, :, 1], scores[:, :, :, 0]) > 0.1


# Keys and values in pages.


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
def test_kv_write_replaces_the_named_rows_and_no_other(
    dtype: torch.dtype, kind: torch.dtype
) -> None:
    pools = [randn(7, 4, 2, 10).to(dtype) for _ in range(2)]
    news = [randn(3, 5, 2, 10) for _ in range(2)]
    index = (torch.randperm(24)[:15] + 4).view(3, 5).to(kind)
    index[1, 3:] = 0  # padding
    want = [pool.clone() for pool in pools]
    for b, t in ((b, t) for b in range(3) for t in range(5) if index[b, t]):
        page, place = divmod(int(index[b, t]), 4)
        for pool, new in zip(want, news, strict=True):
            pool[page, place] = new[b, t].to(dtype)
    names = "key_pool", "value_pool", "key", "value"
    got = ops.kv_write(**dict(zip(names, pools + news, strict=True)), index=index)
    for written, pool in zip(got, want, strict=True):
        assert written.dtype == dtype
        assert torch.equal(written.flatten(0, 1)[1:], pool.flatten(0, 1)[1:])


# Attention.


def attend(a: dict[str, Any]) -> Tensor:
    """Softmax over the visible positions, one query at a time, looked up one key at a time."""
    out = torch.zeros_like(a["query"])
    batch, seq, hq, _ = out.shape
    page, hkv = a["key_pool"].shape[1:3]
    for b in range(batch):
        context = int(a["context"][b])
        where = [divmod(j, page) for j in range(context)]
        where = [(int(a["block_table"][b, n]), place) for n, place in where]
        for t, head in ((t, head) for t in range(seq) for head in range(hq)):
            at, group = int(a["position"][b, t]), head // (hq // hkv)
            if at >= context:
                continue
            q = a["query"][b, t, head]
            score = [a["scale"] * (q @ a["key_pool"][n, i, group]) for n, i in where[: at + 1]]
            share = torch.stack(score).softmax(0)
            for p, (n, i) in zip(share, where, strict=False):
                out[b, t, head] += p * a["value_pool"][n, i, group]
    return out


def paged(hq: int, hkv: int, context: list[int], start: list[int]) -> dict[str, Any]:
    """Three rows in pages dealt at random; whatever no row may read is NaN."""
    table = (torch.randperm(12) + 1).view(3, 4)
    pools = [torch.full((13, 7, hkv, 10), torch.nan, dtype=F64) for _ in range(2)]
    for b, length in enumerate(context):
        for j in range(length):
            for pool in pools:
                pool[table[b, j // 7], j % 7] = randn(hkv, 10)
        table[b, -(-length // 7) :] = 10**6 if length else 0  # beyond the context: any number
    return {
        "query": randn(3, 5, hq, 10),
        "key_pool": pools[0],
        "value_pool": pools[1],
        "block_table": table.int(),
        "position": torch.tensor(start)[:, None] + torch.arange(5),
        "context": torch.tensor(context),
        "scale": 0.4,
    }


HEADS = [(9, 9), (6, 2), (8, 2), (6, 1), (12, 6)]  # multi-head attention has hq == hkv
LENGTHS = {
    "prefill": ([5, 5, 5], [0, 0, 0]),
    "ragged": ([5, 2, 1], [0, 0, 0]),
    "continued": ([19, 28, 14], [14, 23, 9]),
    "across pages": ([8, 7, 6], [3, 4, 5]),
    "an empty row": ([6, 0, 11], [1, 0, 6]),
    "all empty": ([0, 0, 0], [0, 0, 0]),
    "queries before the end": ([20, 28, 15], [0, 11, 4]),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("hq", "hkv"), HEADS)
def test_attention(hq: int, hkv: int, lengths: str) -> None:
    arguments = paged(hq, hkv, *LENGTHS[lengths])
    padding = arguments["position"] >= arguments["context"][:, None]
    want = attend(arguments)
    arguments["query"][padding] = torch.nan
    got = ops.attention(**arguments)
    assert not got[padding].any()
    if not padding.all():
        agree("attention", got, want)


# The short convolution.


def convolve(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One output at a time, from the line of inputs that a sequence has seen."""
    y, window = torch.zeros_like(a["x"]), a["window"].clone()
    (batch, seq, channels), width = a["x"].shape, a["weight"].shape[1]
    for b in range(batch):
        row, offset, start = (int(a[k][b]) for k in ("rows", "offset", "start"))
        line = [*a["window"][row, offset : offset + width - 1], *a["x"][b]]
        for t, c in ((t, c) for t in range(seq) for c in range(channels)):
            total = sum(float(a["weight"][c, j] * line[t + j][c]) for j in range(width))
            y[b, t, c] = total * sigmoid(total)
        for i in range(window.shape[1]):
            window[row, i] = line[start + i] if start + i < len(line) else 0
    return y, window


def line(width: int, seq: int, drafts: int, start: int) -> dict[str, Any]:
    return {
        "x": randn(7, seq, 11),
        "weight": randn(11, width),
        "window": randn(13, width - 1 + drafts, 11),
        "rows": torch.randperm(13)[:7],
        "offset": torch.randint(0, drafts + 1, (7,), dtype=torch.int32),
        "start": torch.tensor([start, seq, 0, 1, start, seq, start], dtype=torch.int32),
    }


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize(("seq", "start"), [(1, 0), (1, 1), (8, 0), (8, 1), (8, 3), (9, 9)])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_short_conv(width: int, seq: int, start: int, drafts: int) -> None:
    arguments = line(width, seq, drafts, start)
    y, window = ops.short_conv(**arguments)
    want, kept = convolve(arguments)
    agree("short_conv", y, want)
    assert torch.equal(window, kept)  # inputs are copied; rows of other sequences stay


@pytest.mark.parametrize("cuts", [[1] * 9, [1, 2, 6], [5, 4], [2, 7]], ids=str)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_short_conv_may_be_cut_anywhere(width: int, cuts: list[int]) -> None:
    arguments = line(width, 9, 0, 9) | {"start": torch.full((7,), 9)}
    whole, final = ops.short_conv(**arguments)
    outputs = []
    for x in arguments["x"].split(cuts, dim=1):
        start = torch.full((7,), x.shape[1])
        y, window = ops.short_conv(**(arguments | {"x": x, "start": start}))
        arguments["window"] = window
        outputs.append(y)
    agree("short_conv", torch.cat(outputs, dim=1), whole)
    assert torch.equal(window, final)


@pytest.mark.parametrize("accepted", [1, 2, 3, 4, 5])
def test_short_conv_keeps_every_window_a_draft_may_be_cut_back_to(accepted: int) -> None:
    """After start = 1, offset = accepted - 1 is the window after `accepted` tokens."""
    arguments = line(3, 5, 4, 1) | {"start": torch.ones(7, dtype=torch.int32)}
    _, every = ops.short_conv(**arguments)
    cut = torch.full((7,), accepted)
    _, one = ops.short_conv(**(arguments | {"start": cut}))
    following = arguments | {"x": randn(7, 8, 11)}
    drafted, _ = ops.short_conv(**(following | {"window": every, "offset": cut - 1}))
    plain, _ = ops.short_conv(**(following | {"window": one, "offset": cut * 0}))
    assert torch.equal(drafted, plain)


# Gates.


def test_delta_gates() -> None:
    a = torch.linspace(-60, 60, 2 * 101 * 3, dtype=F64).view(2, 101, 3)
    b, A_log, dt_bias = randn(2, 101, 3) * 5, torch.tensor([-4.0, 0.3, 2.7], dtype=F64), randn(3)
    valid = torch.rand(2, 101) < 0.7
    g, beta = ops.delta_gates(a=a, b=b, A_log=A_log, dt_bias=dt_bias, valid=valid)
    want = torch.zeros_like(g), torch.zeros_like(beta)
    for t, h in ((tuple(t), h) for t in valid.nonzero().tolist() for h in range(3)):
        x = float(a[t][h] + dt_bias[h])
        want[0][t][h] = -math.exp(A_log[h]) * (max(x, 0) + math.log1p(math.exp(-abs(x))))
        want[1][t][h] = sigmoid(float(b[t][h]))
    # torch's softplus is the identity above 20, which leaves out e^-20 = 2e-9 of it
    torch.testing.assert_close(g, want[0], rtol=2e-10, atol=1e-300)
    agree("delta_gates", beta, want[1])
    assert not g[~valid].any()
    assert not beta[~valid].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_delta_gates_of_extremes_are_numbers(dtype: torch.dtype) -> None:
    a = torch.tensor([-1e30, -1e4, -90.0, 0.0, 19.9, 20.1, 90.0, 1e4, 1e30], dtype=dtype)
    gates = {"A_log": torch.tensor([-4.0, 2.7]), "dt_bias": torch.tensor([-4.0, 1.0])}
    a = a.expand(1, 2, 9).mT
    g, beta = ops.delta_gates(a=a, b=a, valid=torch.ones(1, 9, dtype=torch.bool), **gates)
    assert g.dtype == torch.float32  # of A_log: log decays are summed over time
    assert beta.dtype == dtype
    assert ((g <= 0) & g.isfinite()).all()
    assert ((beta >= 0) & (beta <= 1)).all()
    assert (g.diff(dim=1) <= 0).all()
    assert (beta.diff(dim=1) >= 0).all()


def test_delta_gates_of_padding_are_zero_whatever_padding_holds() -> None:
    a, b = randn(2, 5, 3), randn(2, 5, 3)
    valid = torch.arange(5) < torch.tensor([[5], [2]])
    a[1, 2:], b[1, 2:] = torch.nan, torch.inf
    for gate in ops.delta_gates(a=a, b=b, A_log=randn(3), dt_bias=randn(3), valid=valid):
        assert not gate[1, 2:].any()
        assert gate[0].all()


# Experts.


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("topk", [1, 3, 10])
def test_route(topk: int, renormalise: bool) -> None:
    logits = randn(5, 11) * 3
    weight, expert = ops.route(logits=logits, topk=topk, renormalise=renormalise)
    for t, row in enumerate(logits.tolist()):
        total = sum(math.exp(x) for x in row)
        best = sorted(range(11), key=lambda e: -row[e])[:topk]
        share = [math.exp(row[e]) / total for e in best]
        share = [s / sum(share) for s in share] if renormalise else share
        assert expert[t].tolist() == best
        agree("route", weight[t], torch.tensor(share, dtype=F64))


@pytest.mark.parametrize("renormalise", [True, False])
def test_route_takes_distinct_experts_of_a_tie(renormalise: bool) -> None:
    logits = torch.zeros(5, 11, dtype=F64)
    logits[:, 4] = 1
    weight, expert = ops.route(logits=logits, topk=3, renormalise=renormalise)
    assert (expert[:, 0] == 4).all()
    assert all(len(set(row)) == 3 for row in expert.tolist())
    share = torch.tensor([math.e, 1, 1], dtype=F64) / (math.e + (2 if renormalise else 10))
    agree("route", weight, share.expand(5, 3))


def test_route_of_far_logits_is_finite() -> None:
    logits = torch.linspace(-1e4, 1e4, 11).expand(5, 11)
    weight, _ = ops.route(logits=logits, topk=3, renormalise=True)
    assert weight.tolist() == [[1, 0, 0]] * 5


CHOICES = {
    "some unused": [[4, 1], [1, 3], [3, 4], [1, 4], [4, 3], [3, 1]],
    "one token": [[3, 0]],
    "all to one": [[2]] * 6,
    "all to two": [[2, 4]] * 6,
    "each to all": [[3, 1, 4, 0, 2]] * 6,  # topk == experts by intent
}


@pytest.mark.parametrize("choice", CHOICES)
def test_experts(choice: str) -> None:
    expert = torch.tensor(CHOICES[choice])
    x, weight = randn(len(expert), 7), torch.rand(expert.shape, dtype=F64)
    gate, up, down = randn(5, 4, 7), randn(5, 4, 7), randn(5, 7, 4)
    unused = [e for e in range(5) if e not in expert.unique()]
    for weights in (gate, up, down):
        weights[unused] = torch.nan
    want = torch.zeros_like(x)
    for (t, k), e in zip(torch.ones_like(expert).nonzero(), expert.flatten(), strict=True):
        hidden = torch.einsum("fd,d->f", gate[e], x[t])
        hidden = hidden / (1 + torch.exp(-hidden)) * torch.einsum("fd,d->f", up[e], x[t])
        want[t] += weight[t, k] * torch.einsum("df,f->d", down[e], hidden)
    gate_up = torch.cat([gate, up], dim=1)
    got = ops.experts(x=x, expert=expert, weight=weight, gate_up=gate_up, down=down)
    agree("experts", got, want)


# Noise.


def mix(x: int) -> int:
    """lowbias32, with Python's integers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ x >> shift) * factor % 2**32
    return x


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**62 + 5, -(2**63)])
def test_gumbel_is_its_formula(seed: int) -> None:
    positions, vocab = [0, 1, 262_143], 211
    got = ops.gumbel(seed=torch.tensor([seed] * 3), position=torch.tensor(positions), vocab=vocab)
    for position, noise in zip(positions, got.tolist(), strict=True):
        stream = mix(mix(seed % 2**32) ^ (seed >> 32) % 2**32)
        stream = mix(stream ^ mix(position))
        for token, value in enumerate(noise):
            bits = mix(mix((stream + token * 0x9E3779B9) % 2**32) ^ stream)
            want = -math.log(-math.log1p(-(bits + 0.5) / 2**32))
            # float32 rounds u by 2^-25, of which E = -log(1 - u) makes e^E and -log(E) e^E / E
            u = 2**-24 * math.exp(math.exp(-want) + want)
            assert value == pytest.approx(want, rel=1e-6, abs=1e-6 + u)
