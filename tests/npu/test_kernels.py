"""Each kernel against a formula of its own in float64, and each broken contract refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from qnext.lowering.softnpu import bridge

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32
ONE = 2**-8  # relative error of one rounding to bf16


def there(*tensors: Tensor) -> list[Tensor]:
    return [tensor.npu() for tensor in tensors]


def refused(call: Callable[[], Any], rule: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The call fails with CANN's code, and the rule is printed with the operator's name."""
    with pytest.raises(RuntimeError, match="161002"):
        call()
    told = capfd.readouterr().err
    assert "softnpu: aclnn" in told and "refused: " in told and rule in told


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    got, want = got.cpu().double(), want.double()
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()  # a NaN is not


X = torch.arange(-6.0, 6).view(3, 4) / 4 + 0.1
N = torch.arange(2, 14).view(3, 4)
INDEX = torch.tensor([2, 0])
PLAIN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "add": lambda x, n, i: x + x * 2,
    "add scalar": lambda x, n, i: x + 1,
    "sub": lambda x, n, i: torch.sub(x, x[:1], alpha=3),
    "sub scalar": lambda x, n, i: x - 1.5,
    "rsub": lambda x, n, i: 1 - x,
    "mul": lambda x, n, i: x * x[:, :1],
    "mul scalar": lambda x, n, i: x * 3,
    "div": lambda x, n, i: x / x[:1],
    "div scalar": lambda x, n, i: x / 3,
    "neg": lambda x, n, i: -x,
    "exp": lambda x, n, i: x.exp(),
    "log": lambda x, n, i: x.abs().log(),
    "log1p": lambda x, n, i: x.abs().log1p(),
    "sigmoid": lambda x, n, i: x.sigmoid(),
    "silu": lambda x, n, i: F.silu(x),
    "softplus": lambda x, n, i: F.softplus(x),
    "cos": lambda x, n, i: x.cos() + x.sin(),
    "rsqrt": lambda x, n, i: x.abs().rsqrt() + x.abs().sqrt(),
    "pow": lambda x, n, i: x**2 + x.pow(3),
    "tanh": lambda x, n, i: x.tanh(),
    "clamp": lambda x, n, i: x.clamp(-0.5, 0.5),
    "clamp min": lambda x, n, i: x.clamp(min=0.25),
    "clamp max": lambda x, n, i: x.clamp(max=0.25),
    "where": lambda x, n, i: torch.where(n > 4, x, x + 1),
    "where scalar": lambda x, n, i: torch.where(n > 4, x, 0.0),
    "masked fill": lambda x, n, i: x.masked_fill(n > 4, -torch.inf),
    "compare": lambda x, n, i: (n == n[:1]) | (n != 3) & (n >= 4) ^ (n < 5),
    "compare tensors": lambda x, n, i: (x > x[:1]) & (x <= x[:, :1]) | ~(x < x[1:2]),
    "logical": lambda x, n, i: torch.logical_or(n > 3, torch.logical_not(torch.logical_and(n, n))),
    "bits": lambda x, n, i: (n & 5) ^ (n >> 1) | 8,
    "bits of tensors": lambda x, n, i: (n & n[:1]) ^ n,
    "shift": lambda x, n, i: n >> (n % 3),
    "floor divide": lambda x, n, i: n // 3 + n // n[:1],
    "remainder": lambda x, n, i: n % 4 + n % n[:1],
    "maximum": lambda x, n, i: torch.maximum(x, -x) + torch.minimum(x, -x),
    "cast": lambda x, n, i: x.to(torch.bfloat16).float() + n.to(torch.float32) + x.long(),
    "fill": lambda x, n, i: torch.zeros_like(x) + torch.ones_like(x) + torch.full_like(x, 7),
    "arange": lambda x, n, i: torch.arange(2, 9, 3, device=x.device),
    "cat": lambda x, n, i: torch.cat([x, x[:1], x * 2]),
    "stack": lambda x, n, i: torch.stack([x, -x], 1),
    "index select": lambda x, n, i: x.index_select(0, i),
    "index": lambda x, n, i: x[i] + x[i, i[:1]][:, None] + x[:, i][1, 1],
    "index mask": lambda x, n, i: x.index_put((i,), x[:2]),
    "index put": lambda x, n, i: x.index_put((i, i + 1), x[0, :2]),
    "index add": lambda x, n, i: x.index_add(0, i, x[:2]),
    "gather": lambda x, n, i: x.gather(1, n % 4),
    "scatter": lambda x, n, i: x.scatter(1, n[:, :1] % 4, x[:, :1]),
    "scatter value": lambda x, n, i: x.scatter(1, n[:, :1] % 4, 5.0),
    "scatter add": lambda x, n, i: x.scatter_add(1, n % 2, x),
    "embedding": lambda x, n, i: F.embedding(i, x),
    "sum": lambda x, n, i: x.sum(-1) + x.sum() + x.sum((0, 1)) + n.sum(),
    "mean": lambda x, n, i: x.mean(-1, keepdim=True),
    "max": lambda x, n, i: x.max() + x.amax(-1) + x.min() + x.amin(-1),
    "max of a dim": lambda x, n, i: x.max(-1).values + x.max(-1).indices,
    "argmax": lambda x, n, i: x.argmax(-1),
    "any": lambda x, n, i: (x > 1).any(-1) | (x > -1).all(-1),
    "any of all": lambda x, n, i: (x > 1).any() | (x > -1).all(),
    "cumsum": lambda x, n, i: x.cumsum(-1) + n.cumsum(0),
    "topk": lambda x, n, i: x.topk(2).values + x.topk(2).indices,
    "sort": lambda x, n, i: x.sort(dim=-1, descending=True, stable=True).values,
    "argsort": lambda x, n, i: x.argsort(dim=-1, descending=True),
    "softmax": lambda x, n, i: x.softmax(-1) + x.log_softmax(-1),
    "logsumexp": lambda x, n, i: x.logsumexp(-1),
    "one hot": lambda x, n, i: F.one_hot(i, 5),
    "repeat": lambda x, n, i: x.repeat(2, 3),
    "repeat interleave": lambda x, n, i: x.repeat_interleave(2, 1),
    "pad": lambda x, n, i: F.pad(x, (1, 2), value=3.0),
    "flip": lambda x, n, i: x.flip(0),
    "triu": lambda x, n, i: x.triu(1) + x.tril(0),
    "mm": lambda x, n, i: x @ x.t(),
    "linear": lambda x, n, i: F.linear(x, x[:2], x[0, :2]),
    "addmm": lambda x, n, i: torch.addmm(x[:, :3], x, x.t()),
    "bmm": lambda x, n, i: x[None].expand(2, 3, 4) @ x.t()[None].expand(2, 4, 3),
    "scalar to a power": lambda x, n, i: 2.0**x,
    "eye": lambda x, n, i: torch.eye(3, device=x.device) + x.sum(),
    "bincount": lambda x, n, i: n.flatten().bincount(minlength=20),
    "index copy": lambda x, n, i: x.index_copy(0, i, x[:2]),
    "solve triangular": lambda x, n, i: torch.linalg.solve_triangular(
        x[:, :3].tril(-1), x, upper=False, unitriangular=True
    ),
    "solve from the right": lambda x, n, i: torch.linalg.solve_triangular(
        x[:, :3].triu(1), x.t(), upper=True, left=False, unitriangular=True
    ),
    "attention": lambda x, n, i: F.scaled_dot_product_attention(
        x.repeat(2, 16, 16).view(2, 6, 8, 64) / 9,
        x.repeat(2, 16, 8).view(2, 6, 4, 64)[:, :2] / 7,
        x.repeat(2, 16, 8).view(2, 6, 4, 64)[:, 4:] / 5,
        (n.repeat(1, 8).view(1, 1, 8, 12) % 3 != 1)[..., :4],
        enable_gqa=True,
    ),
    "einsum": lambda x, n, i: torch.einsum("ij,kj->ik", x, x[:2]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_aten(name: str) -> None:
    want = PLAIN[name](X, N, INDEX)
    got = PLAIN[name](*there(X, N, INDEX))
    assert got.dtype == want.dtype
    if want.is_floating_point():
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-6)  # float32 sums of 12
    else:
        assert torch.equal(got.cpu(), want)


def test_rms_norms() -> None:
    x, res, gamma = torch.randn(5, 64).to(BF16), torch.randn(5, 64).to(BF16), torch.rand(64) + 0.5
    y, rstd = torch_npu.npu_rms_norm(*there(x, gamma), 1e-6)
    want = (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    close(rstd, want, 1e-6)
    close(y, x.double() * want * gamma.double(), ONE)
    low = gamma.to(BF16)
    y, _, total = torch_npu.npu_add_rms_norm(*there(x, res, low), 1e-6)
    assert torch.equal(total.cpu(), x + res)
    s = (x + res).double()
    want = s * (s.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * low.double()
    close(y, want, 2 * ONE)


def test_norms_refuse(capfd: pytest.CaptureFixture[str]) -> None:
    x, gamma = there(torch.randn(5, 64).to(BF16), torch.ones(64))
    refused(lambda: torch_npu.npu_add_rms_norm(x, x, gamma), "gamma must be of", capfd)
    refused(lambda: torch_npu.npu_rms_norm(x.float(), gamma.to(BF16)), "gamma must be of", capfd)


def delta(tokens: int, nk: int = 2, nv: int = 4, dk: int = 32, dv: int = 48) -> dict[str, Tensor]:
    return {
        "query": F.normalize(torch.randn(tokens, nk, dk), dim=-1).to(BF16),
        "key": F.normalize(torch.randn(tokens, nk, dk), dim=-1).to(BF16),
        "value": torch.randn(tokens, nv, dv).to(BF16),
        "beta": torch.rand(tokens, nv).to(BF16),
        "g": -torch.rand(tokens, nv),
        "state": torch.randn(9, nv, dv, dk).to(BF16),
    }


def scan(it: dict[str, Tensor], state: Tensor, rows: range) -> tuple[Tensor, list[Tensor]]:
    """The recurrence in float64, as the state's transpose."""
    memory, outs, states = state.double().mT, [], []
    for t in rows:
        k, q = (it[n][t].double().repeat_interleave(2, 0) for n in ("key", "query"))
        memory = memory * it["g"][t].double().exp()[:, None, None]
        seen = torch.einsum("hkv,hk->hv", memory, k)
        change = (it["value"][t].double() - seen) * it["beta"][t].double()[:, None]
        memory = memory + torch.einsum("hk,hv->hkv", k, change)
        outs.append(torch.einsum("hkv,hk->hv", memory, q) * 0.25)
        states.append(memory.mT)
    return torch.stack(outs), states


def recur(it: dict[str, Tensor], lengths: list[int], slots: list[int], taken: list[int]) -> Any:
    on = {name: tensor.npu() for name, tensor in it.items()}
    out = torch_npu.npu_recurrent_gated_delta_rule(
        **on,
        scale=0.25,
        actual_seq_lengths=torch.tensor(lengths, dtype=I32).npu(),
        ssm_state_indices=torch.tensor(slots, dtype=I32).npu(),
        num_accepted_tokens=torch.tensor(taken, dtype=I32).npu(),
    )
    return out.cpu(), on["state"].cpu()


def test_recurrent_delta_rule() -> None:
    it = delta(6)
    slots = [7, 3, 5, 1, 8, 0]
    out, state = recur(it, [3, 0, 2], slots, [2, 1, 1])
    for first, length, start in ((0, 3, 3), (3, 2, 1)):
        want, states = scan(it, it["state"][start], range(first, first + length))
        close(out[first : first + length], want, 2 * ONE)
        for t, each in enumerate(states):
            close(state[slots[first + t]], each, 2 * ONE)
    assert out[5].isnan().all()  # beyond the lengths: undefined
    assert torch.equal(state[[0, 2, 4, 6]], it["state"][[0, 2, 4, 6]])


@pytest.mark.parametrize(
    "lengths, slots, taken, rule",
    [
        ([9], list(range(9)), [1], "lengths must be 0..8"),
        ([2, 2], [0, 1, 2], [1, 1], "lengths must sum"),
        ([2, 1], [0, 1, 1], [1, 1], "slots must be distinct"),
        ([2, 1], [0, 1, 9], [1, 1], "ssm_state_indices must be in 0..8"),
        ([2, 1], [0, 1, 2], [3, 1], "accepted must be 1..2"),
        ([2, 1], [0, 1, 2], [0, 1], "accepted must be 1..2"),
    ],
)
def test_recurrent_delta_rule_refuses(
    lengths: list[int], slots: list[int], taken: list[int], rule: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    refused(lambda: recur(delta(len(slots)), lengths, slots, taken), rule, capfd)


def test_delta_state_of_float32_needs_the_capability(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = delta(1)
    it["state"] = it["state"].float()
    refused(lambda: recur(it, [1], [4], [1]), "state must be of torch.bfloat16", capfd)
    monkeypatch.setitem(bridge.CAPABILITIES, "state_float32", True)
    _, state = recur(it, [1], [4], [1])
    close(state[4], scan(it, it["state"][4], range(1))[1][0], 1e-5)


def test_chunked_delta_rule_is_the_recurrence() -> None:
    it, lengths = delta(79, dk=128, dv=128), [70, 9]
    state = it.pop("state")[:2]
    on = {name: tensor.npu() for name, tensor in it.items()}
    out, final = torch_npu.npu_chunk_gated_delta_rule(
        **on,
        initial_state=state.npu(),
        actual_seq_lengths=torch.tensor(lengths, dtype=I32).npu(),
        scale=0.25,
    )
    for row, span in enumerate((range(70), range(70, 79))):
        want, states = scan(it, state[row], span)
        close(out[span.start : span.stop], want, 2e-2)  # every stage is rounded to bf16
        close(final[row], states[-1], 2e-2)


HEADS, KV, DIM = 4, 2, 64


def exact(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """[l, heads, dim] over [s, kv, dim] in float64; hidden [l, s]."""
    k, v = (t.double().repeat_interleave(HEADS // KV, 1) for t in (k, v))
    scores = torch.einsum("lnd,snd->nls", q.double(), k) / 8
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("nls,snd->lnd", scores.softmax(-1), v)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: str, **more: Any) -> Tensor:
    more = {name: x.npu() if isinstance(x, Tensor) else x for name, x in more.items()}
    return torch_npu.npu_fused_infer_attention_score_v2(
        *there(q, k, v), input_layout=layout, num_query_heads=HEADS,
        num_key_value_heads=KV, softmax_scale=1 / 8, **more,
    )[0].cpu()  # fmt: skip


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH"])
@pytest.mark.parametrize("mode", ["none", "full", "causal"])
def test_dense_attention(layout: str, mode: str) -> None:
    q = torch.randn(2, 3, HEADS, DIM).to(BF16)
    k, v = (torch.randn(2, 7, KV, DIM).to(BF16) for _ in "kv")
    lay = {
        "BSND": lambda t: t,
        "BNSD": lambda t: t.transpose(1, 2).contiguous(),
        "BSH": lambda t: t.flatten(2),
    }[layout]
    mask = torch.rand(2, 1, 3, 7) < 0.4
    mask[..., 0] = False
    more: dict[str, Any] = {}
    if mode == "full":
        more = {"atten_mask": mask}
    elif mode == "causal":
        more = {"atten_mask": torch.ones(2048, 2048, dtype=torch.bool).triu(1), "sparse_mode": 3}
    got = attend(lay(q), lay(k), lay(v), layout, **more)
    causal = torch.ones(3, 7, dtype=torch.bool).triu(5)
    for row in range(2):
        hidden = {"none": None, "full": mask[row, 0], "causal": causal}[mode]
        want = exact(q[row], k[row], v[row], hidden)
        have = got[row].transpose(0, 1) if layout == "BNSD" else got[row].view(3, HEADS, DIM)
        close(have, want, 2 * ONE)


def test_attention_refuses(capfd: pytest.CaptureFixture[str]) -> None:
    q, k = torch.randn(3, HEADS, 256).to(BF16), torch.randn(7, KV, 256).to(BF16)
    ends = {"actual_seq_qlen": [3], "actual_seq_kvlen": [7]}
    refused(lambda: attend(q, k, k, "TND", **ends), "TND takes head dims", capfd)
    q, k = q[None], k[None]
    refused(lambda: attend(q, k, k, "BSND", sparse_mode=3), "needs its mask", capfd)
    small = torch.ones(3, 7, dtype=torch.bool)
    call = lambda: attend(q, k, k, "BSND", sparse_mode=3, atten_mask=small)  # noqa: E731
    refused(call, "sparse_mode 3 takes [2048, 2048]", capfd)
    pages, table = torch.randn(4, 128, KV * 256).to(BF16), torch.tensor([[4]], dtype=I32)
    paged = {"block_table": table, "actual_seq_kvlen": [9], "block_size": 128}
    refused(lambda: attend(q, pages, pages, "BSND", **paged), "block_table must be in 0..3", capfd)


def test_scatter_and_rotary(capfd: pytest.CaptureFixture[str]) -> None:
    k, v = torch.randn(3, KV, 32).to(BF16), torch.randn(3, KV, 32).to(BF16)
    keys, values = there(*torch.zeros(2, 4, 16, KV, 32).to(BF16))

    def write(slots: list[int], mode: str = "Norm") -> None:
        where = torch.tensor(slots, dtype=I32).npu()
        torch_npu.npu_scatter_pa_kv_cache(*there(k, v), keys, values, where, cache_mode=mode)

    write([17, 40, 3])
    for t, (page, place) in enumerate(((1, 1), (2, 8), (0, 3))):
        assert torch.equal(keys.cpu()[page, place], k[t])
        assert torch.equal(values.cpu()[page, place], v[t])
    refused(lambda: write([17, 17, 3]), "slots must be distinct", capfd)
    refused(lambda: write([17, 64, 3]), "slot_mapping must be in 0..63", capfd)
    write([0, 0, 17])  # page 0 is scratch
    cache, at = torch.randn(9, 32).to(BF16), torch.tensor([8, 0, 3])
    q, _ = torch_npu.npu_mrope(*there(at, k.flatten(1), v.flatten(1), cache), 32)
    cos, sin = cache[at].double()[:, None].chunk(2, -1)
    a, b = k.double().chunk(2, -1)
    close(q.view(3, KV, 32), torch.cat([a * cos - b * sin, b * cos + a * sin], -1), ONE)
    bad = there(at + 1, k.flatten(1), v.flatten(1), cache)
    refused(lambda: torch_npu.npu_mrope(*bad, 32), "positions must be in 0..8", capfd)


def test_experts(capfd: pytest.CaptureFixture[str]) -> None:
    x, logits = torch.randn(5, 16).to(BF16), torch.randn(5, 7)
    weight = torch.randn(7, 16, 24).to(BF16)
    scale, chosen, _ = torch_npu.npu_moe_gating_top_k_softmax_v2(logits.npu(), k=3, renorm=1)
    best = logits.double().topk(3)
    close(scale, best.values.softmax(-1), 1e-6)
    assert torch.equal(chosen.cpu().long(), best.indices)
    rows, places, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x.npu(), chosen, expert_num=7, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[0, 7], row_idx_type=0,
    )  # fmt: skip
    assert torch.equal(counts.cpu(), torch.bincount(best.indices.flatten(), minlength=7))

    def product(groups: Tensor) -> Tensor:
        more = {"split_item": 3, "group_type": 0, "group_list_type": 1}
        return torch_npu.npu_grouped_matmul([rows], [weight.npu()], group_list=groups, **more)[0]

    out = torch_npu.npu_moe_finalize_routing(
        product(counts), None, None, None, scale.to(BF16), places, None, drop_pad_mode=2
    )
    each = torch.einsum("th,tkhn->tkn", x.double(), weight[best.indices].double())
    close(out, (each * best.values.softmax(-1)[..., None]).sum(1), 4 * ONE)
    refused(lambda: product(counts + 1), "groups must sum to at most 15 rows", capfd)


def test_w8a8(capfd: pytest.CaptureFixture[str]) -> None:
    x, weight = torch.randn(5, 64).to(BF16), torch.randint(-127, 128, (64, 24), dtype=torch.int8)
    scale = torch.rand(24)
    q, per_row = torch_npu.npu_dynamic_quant(x.npu())
    peak = x.double().abs().amax(-1) / 127
    close(per_row, peak, 1e-6)
    close(q.cpu() * peak[:, None], x, 1 / 254)  # half a step
    y = torch_npu.npu_quant_matmul(
        *(q, weight.npu(), scale.npu()), pertoken_scale=per_row, output_dtype=BF16
    )
    close(y, (q.cpu().double() @ weight.double()) * scale * peak[:, None], ONE)
    # of zeros the pages give a scale, 1 / inf, and integers that are rounded from 0 * inf
    q, per_row = torch_npu.npu_dynamic_quant(x.npu() * 0)
    assert not per_row.cpu().any() and bool(q.cpu().any())
    float_x = x.float().npu()
    refused(lambda: torch_npu.npu_dynamic_quant(float_x), "x must be of", capfd)
