"""The gated delta rule: the scan against a loop, the chunks and the pools against the scan."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qnext.functional import ops
from qnext.functional.ops.delta_rule import SCAN_UP_TO, delta_chunked, delta_scan
from tests.samples import relative_rms

F64 = torch.float64
EXACT = 1e-12  # float64: the same sums of up to some hundred terms in another order
HK, HV, DK, DV = 3, 6, 7, 11


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def decay(kind: str, *shape: int) -> Tensor:
    """Log decays: `wild` mixes none at all with such as leave nothing."""
    if kind == "none":
        return torch.zeros(shape, dtype=F64)
    mild = -torch.rand(shape, dtype=F64)
    if kind == "mild":
        return mild
    if kind == "strong":
        return 30 * mild
    choice = torch.randint(0, 4, shape)
    values = torch.tensor([0.0, -1e-4, -1e4, -torch.inf if kind == "infinite" else -1.0])
    return values.double()[choice]


DECAYS = ("mild", "strong", "none", "wild", "infinite")


def sequence(seq: int, kind: str = "mild", batch: int = 2) -> dict[str, Tensor]:
    """Arguments of delta_scan and delta_chunked, with an initial state."""
    key = randn(batch, seq, HK, DK)
    return {
        "q": randn(batch, seq, HK, DK),
        "k": key / key.norm(dim=-1, keepdim=True),
        "v": randn(batch, seq, HV, DV),
        "g": decay(kind, batch, seq, HV),
        "beta": torch.rand(batch, seq, HV, dtype=F64),
        "state": randn(batch, HV, DV, DK),
    }


def upto(a: dict[str, Tensor], end: int, start: int = 0) -> dict[str, Tensor]:
    return {k: v if k == "state" else v[:, start:end] for k, v in a.items()}


def call(seq: int, writes: int = 1, kind: str = "mild", batch: int = 2) -> dict[str, Any]:
    """Arguments of the primitive: a pool of 13 states, of which every row has its own."""
    a = sequence(seq, kind, batch)
    return {
        "query": a["q"],
        "key": a["k"],
        "value": a["v"],
        "g": a["g"],
        "beta": a["beta"],
        "state": randn(1 + 12, HV, DV, DK),
        "slots": torch.randperm(12)[: batch * writes].view(batch, writes) + 1,
        "scale": 0.4,
    }


def cut(a: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    whole = {"state", "slots", "scale"}
    return {k: v if k in whole else v[:, start:end] for k, v in a.items()}


# The definition.


def loop(a: dict[str, Tensor], scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Head by head and token by token, element by element of the state [dv, dk]."""
    out = torch.zeros_like(a["v"])
    states = torch.zeros(*a["v"].shape[:3], DV, DK, dtype=F64)
    batch, seq, _, _ = out.shape
    for b, h in ((b, h) for b in range(batch) for h in range(HV)):
        head = h // (HV // HK)
        state = a["state"][b, h].clone()
        for t in range(seq):
            q, k, v = a["q"][b, t, head], a["k"][b, t, head], a["v"][b, t, h]
            state = torch.exp(a["g"][b, t, h]) * state  # before the read
            read = torch.einsum("vk,k->v", state, k)
            state = state + torch.einsum("v,k->vk", a["beta"][b, t, h] * (v - read), k)
            out[b, t, h] = scale * torch.einsum("vk,k->v", state, q)
            states[b, t, h] = state
    return out, states


@pytest.mark.parametrize("kind", DECAYS)
def test_the_scan_is_the_recurrence(kind: str) -> None:
    a = sequence(19, kind)
    for got, want in zip(delta_scan(**a), loop(a), strict=True):
        assert relative_rms(got, want) < EXACT


@pytest.mark.parametrize("seq", [1, 5, SCAN_UP_TO, SCAN_UP_TO + 1, 67])
def test_the_primitive_is_the_recurrence(seq: int) -> None:
    a = call(seq)
    names = {"query": "q", "key": "k", "value": "v", "g": "g", "beta": "beta"}
    slot = a["slots"][:, 0]
    plain = {short: a[name] for name, short in names.items()} | {"state": a["state"][slot]}
    want, states = loop(plain, a["scale"])
    out, pool = ops.delta_rule(**a)
    assert relative_rms(out, want) < EXACT
    assert relative_rms(pool[slot], states[:, -1]) < EXACT


def test_a_written_value_is_read_back() -> None:
    """beta = 1 stores v under k whatever was there: S k = v, with S value-first."""
    a = sequence(1) | {"beta": torch.ones(2, 1, HV, dtype=F64)}
    out, states = delta_scan(**(a | {"q": a["k"]}))
    assert relative_rms(out, a["v"]) < EXACT
    heads = a["k"][:, 0].repeat_interleave(HV // HK, dim=1)
    assert relative_rms(torch.einsum("bhvk,bhk->bhv", states[:, 0], heads), a["v"][:, 0]) < EXACT


def test_the_update_of_padding_is_the_identity() -> None:
    a = sequence(5)
    a |= {"g": a["g"] * 0, "beta": a["beta"] * 0}
    _, states = delta_scan(**a)
    assert all(torch.equal(states[:, t], a["state"]) for t in range(5))
    assert torch.equal(delta_chunked(**a, chunk=16)[1], a["state"])


# The chunked form is a theorem about the scan.


def same(a: dict[str, Tensor], chunk: int, lengths: Any) -> None:
    out, states = delta_scan(**a)
    for length in lengths:
        got, last = delta_chunked(**upto(a, length), chunk=chunk)
        assert got.shape == out[:, :length].shape
        assert relative_rms(got, out[:, :length]) < EXACT, length
        assert relative_rms(last, states[:, length - 1]) < EXACT, length


@pytest.mark.parametrize("kind", DECAYS)
def test_chunks_of_16_at_every_length(kind: str) -> None:
    same(sequence(3 * 16 + 1, kind), 16, range(1, 3 * 16 + 2))


@pytest.mark.parametrize("kind", DECAYS)
def test_chunks_of_64_at_some_lengths(kind: str) -> None:
    same(sequence(3 * 64 + 1, kind), 64, [1, 2, 17, 63, 64, 65, 100, 127, 128, 129, 192, 193])


# with nothing written, a strong decay leaves nothing to compare
@pytest.mark.parametrize(
    ("beta", "kind"), [(0.0, "none"), (0.0, "mild"), *((1.0, kind) for kind in DECAYS)]
)
def test_chunks_of_extreme_writes(beta: float, kind: str) -> None:
    a = sequence(129, kind)
    same(a | {"beta": torch.full_like(a["beta"], beta)}, 64, [64, 65, 129])


@pytest.mark.parametrize("kind", ["none", "mild", "wild"])
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_chunks_of_one_repeated_key(beta: float, kind: str) -> None:
    """k_i . k_j = 1: no entry of the triangular system is smaller than its decay."""
    a = sequence(129, kind)
    a["k"] = a["k"][:, :1].expand_as(a["k"])
    same(a | {"beta": torch.full_like(a["beta"], beta)}, 64, [64, 65, 129])


@pytest.mark.parametrize("first", [-1e4, -1e6, -torch.inf])
@pytest.mark.parametrize("at", [0, 5, 63, 64])
def test_float32_keeps_small_decays_behind_a_huge_one(at: int, first: float) -> None:
    """A difference of running sums near 1e4 would round the decays after it to 1e-3."""
    a = sequence(130)
    a["g"] = -0.01 * torch.rand_like(a["g"])
    a["g"][:, at] = first
    narrow = {k: v.float() for k, v in a.items()}
    out, states = delta_scan(**{k: v.double() for k, v in narrow.items()})
    got, last = delta_chunked(**narrow)
    # 5e-6: 24-bit mantissa, sums over channels and time in another order
    assert relative_rms(got, out) < 5e-6
    assert relative_rms(last, states[:, -1]) < 5e-6
    assert relative_rms(got[:, at + 1 :], out[:, at + 1 :]) < 5e-6


@pytest.mark.parametrize("kind", DECAYS)
def test_float32_chunks_stay_near_the_float64_scan(kind: str) -> None:
    narrow = {k: v.float() for k, v in sequence(193, kind).items()}
    out, states = delta_scan(**{k: v.double() for k, v in narrow.items()})
    got, last = delta_chunked(**narrow)
    assert relative_rms(got, out) < 5e-6
    assert relative_rms(last, states[:, -1]) < 5e-6


@pytest.mark.parametrize("kind", ["mild", "strong", "wild", "infinite"])
@pytest.mark.parametrize("seq", [16, 37])
def test_gradients_of_chunks_are_those_of_the_scan(seq: int, kind: str) -> None:
    a = sequence(seq, kind)
    weights, last_weights = randn(2, seq, HV, DV), randn(2, HV, DV, DK)

    def gradients(chunked: bool) -> tuple[Tensor, ...]:
        leaves = {k: v.clone().requires_grad_() for k, v in a.items()}
        if chunked:
            out, last = delta_chunked(**leaves, chunk=16)
        else:
            out, states = delta_scan(**leaves)
            last = states[:, -1]
        loss = (out * weights).sum() + (last * last_weights).sum()
        return torch.autograd.grad(loss, tuple(leaves.values()))

    for name, got, want in zip(a, gradients(True), gradients(False), strict=True):
        assert got.isfinite().all(), name
        assert want.any(), name
        assert relative_rms(got, want) < 1e-11, name  # sums of products of sums


# The primitive: splits, slots and pools.


@pytest.mark.parametrize("kind", ["mild", "wild"])
@pytest.mark.parametrize("at", [1, 16, 17, 64, 70, 99])
def test_a_sequence_may_be_split_anywhere(at: int, kind: str) -> None:
    a = call(100, kind=kind)
    whole, pool = ops.delta_rule(**a)
    first, halfway = ops.delta_rule(**cut(a, 0, at))
    second, final = ops.delta_rule(**(cut(a, at, 100) | {"state": halfway}))
    assert relative_rms(torch.cat([first, second], dim=1), whole) < EXACT
    assert relative_rms(final, pool) < EXACT


@pytest.mark.parametrize("seq", [5, 70])
def test_a_row_alone_is_the_row_in_its_batch(seq: int) -> None:
    a = call(seq)
    out, pool = ops.delta_rule(**a)
    per_row = {"query", "key", "value", "g", "beta", "slots"}
    for b in range(2):
        alone = {k: v[b : b + 1] if k in per_row else v for k, v in a.items()}
        row, row_pool = ops.delta_rule(**alone)
        assert relative_rms(row[0], out[b]) < EXACT
        slot = a["slots"][b, 0]
        assert relative_rms(row_pool[slot], pool[slot]) < EXACT


@pytest.mark.parametrize("seq", [4, 5])
def test_a_write_a_token_is_running_token_by_token(seq: int) -> None:
    a = call(seq, writes=seq)
    out, pool = ops.delta_rule(**a)
    state = a["state"]
    for t in range(seq):
        from_slot, to_slot = a["slots"][:, :1], a["slots"][:, t : t + 1]
        step = cut(a, t, t + 1) | {"state": state, "slots": from_slot}
        one, after = ops.delta_rule(**step)
        assert relative_rms(one, out[:, t : t + 1]) < EXACT
        assert relative_rms(pool[to_slot], after[from_slot]) < EXACT
        state = after
    unnamed = [slot for slot in range(13) if slot not in a["slots"]]
    assert torch.equal(pool[unnamed], a["state"][unnamed])


@pytest.mark.parametrize(("seq", "writes"), [(5, 1), (5, 5), (70, 1)])
def test_slots_may_be_anywhere(seq: int, writes: int) -> None:
    a = call(seq, writes)
    out, pool = ops.delta_rule(**a)
    place = torch.randperm(13)
    moved = torch.empty_like(a["state"])
    moved[place] = a["state"]
    out_moved, pool_moved = ops.delta_rule(**(a | {"state": moved, "slots": place[a["slots"]]}))
    assert torch.equal(out_moved, out)
    assert torch.equal(pool_moved[place], pool)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("seq", [1, 5, 70])
def test_other_slots_keep_every_bit(seq: int, kind: torch.dtype) -> None:
    a = call(seq)
    a["state"][0] = torch.nan  # nobody reads scratch,
    before = a["state"].clone()
    out, pool = ops.delta_rule(**(a | {"slots": a["slots"].to(kind)}))
    others = [slot for slot in range(1, 13) if slot not in a["slots"]]
    assert torch.equal(pool[others], before[others])
    assert pool[0].isnan().all()
    assert out.isfinite().all()
    assert torch.equal(a["state"].nan_to_num(), before.nan_to_num())
    for slot in a["slots"].flatten():
        assert (pool[slot] != before[slot]).any()


@pytest.mark.parametrize("seq", [5, 70])
def test_padding_rows_share_the_scratch_slot(seq: int) -> None:
    """Rows of a bucket that nobody occupies all write to slot 0; the others do not notice."""
    a = call(seq, batch=4)
    a["slots"][1] = a["slots"][3] = 0
    out, pool = ops.delta_rule(**a)
    rows = torch.tensor([0, 2])
    per_row = {"query", "key", "value", "g", "beta", "slots"}
    alone = {k: v[rows] if k in per_row else v for k, v in a.items()}
    want, want_pool = ops.delta_rule(**alone)
    assert relative_rms(out[rows], want) < EXACT
    assert relative_rms(pool[1:], want_pool[1:]) < EXACT


@pytest.mark.parametrize("seq", [1, 5, 70])
@pytest.mark.parametrize("value", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_round_at_the_edges_alone(pool: torch.dtype, value: torch.dtype, seq: int) -> None:
    """Whatever comes in, the work is float32: the result is that of float32, rounded once."""
    a = call(seq)
    narrow = ("query", "key", "value")
    a |= {k: a[k].to(value) for k in narrow} | {k: a[k].float() for k in ("g", "beta")}
    a["state"] = a["state"].to(pool)
    want, want_pool = ops.delta_rule(**(a | {k: a[k].float() for k in (*narrow, "state")}))
    out, after = ops.delta_rule(**a)
    assert (out.dtype, after.dtype) == (value, pool)
    assert torch.equal(after, want_pool.to(pool))
    assert torch.equal(out, want.to(value))
