"""What kernels do beside others and at the edges: rows, views, exponentials, casts, ties."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from qnext.lowering.cpu.calls import BOOL, INDEX, KERNELS
from tests.lowering.test_cpu_kernels import (
    BF16,
    DTYPES,
    F32,
    Arguments,
    attention,
    cast,
    check,
    conv,
    each_isa,
    each_name,
    experts,
    fired,
    generator,
    int8,
    kernel,
    letters,
    lowered,
    quantised,
    randn,
    reference,
    rule,
    same,
    samples,
    threads,
)
from tests.lowering.test_cpu_kernels import asked_once as asked_once
from tests.lowering.test_cpu_kernels import pytestmark as pytestmark

# --- a row by itself -----------------------------------------------------------------------------


def rows_of(name: str) -> tuple[str, ...]:
    """The arguments that have a row for each of a batch."""
    named = {
        "rotary": "query key position",
        "short_conv": "x rows offset start",
        "delta_gates": "a b valid",
        "delta_rule": "query key value g beta slots",
        "kv_write": "key value index",
        "attention": "query block_table position context",
        "route": "logits",
        "experts": "x expert weight",
        "int8_experts": "x expert weight",
        "gated_rms_norm": "x gate",
        "int8_linear": "x x_scale",
        "swiglu": "gate up",
        "add": "a b",
        "gate": "x gate",
    }
    return tuple(named.get(name, "x").split())


def batches(name: str) -> Arguments:
    """A batch, of a size at which tiles hold several tokens and several blocks are needed."""
    n, some = 67, generator()
    scales = {"x_scale": torch.rand(n, generator=some), "scale": torch.rand(69, generator=some)}
    mixture = experts(n, 130, 35)
    made: dict[str, Callable[[], Arguments]] = {
        "gated_rms_norm": lambda: {
            "x": randn(n, 133),
            "weight": randn(133),
            "gate": randn(n, 133, seed=1),
            "eps": 1e-6,
        },
        "rms_norm": lambda: {"x": randn(n, 133), "weight": randn(133), "eps": 1e-6},
        "l2_norm": lambda: {"x": randn(n, 133), "eps": 1e-6},
        "linear": lambda: {"x": randn(n, 135), "weight": randn(69, 135, seed=1)},
        "swiglu": lambda: {"gate": randn(n, 133), "up": randn(n, 133, seed=1)},
        "add": lambda: {"a": randn(n, 133), "b": randn(n, 133, seed=1)},
        "gate": lambda: {"x": randn(n, 133), "gate": randn(n, 133, seed=1)},
        "cast": lambda: {"x": randn(n, 133), "narrow": True},
        "route": lambda: {"logits": randn(n, 133), "topk": 5, "renormalise": True},
        "quantize_tokens": lambda: {"x": randn(n, 133), "rounding": "over"},
        "short_conv": lambda: conv(9, 5, 300, 4, 2),
        "delta_rule": lambda: rule(5, 7, 1, 2, 83, 37),
        "attention": lambda: attention([21, 0, 9, 150, 71], 10, 70, 2, 3, 37),
        "experts": lambda: mixture,
        "int8_experts": lambda: quantised(mixture),
        "int8_linear": lambda: {"x": int8(n, 135), "weight": int8(69, 135, seed=1)} | scales,
    }
    return made[name]() if name in made else samples(name)[0]


def touched(name: str, arguments: Arguments, made: tuple[Tensor, ...]) -> list[Tensor]:
    """A batch's rows of each result, those of a pool as well."""
    index = {"short_conv": "rows", "delta_rule": "slots", "kv_write": "index"}.get(name)
    fresh = len(made) - len(KERNELS[name].writes)
    pools = [t.flatten(0, 1) if name == "kv_write" else t for t in made[fresh:]]
    return [*made[:fresh], *(pool[arguments[index].long()] for pool in pools)]


@each_isa
@each_name
def test_a_row_is_the_same_whatever_shares_its_batch(name: str, isa: str) -> None:
    """To the bit, float32 as well: the order of a sum depends on the row alone; so do threads."""
    for dtype in DTYPES if letters(name) else (F32,):
        arguments = cast(name, batches(name), same(name, dtype))
        together = touched(name, arguments, kernel(isa, name, **arguments))
        with threads(2):
            shared = touched(name, arguments, kernel(isa, name, **arguments))
        for row in range(len(together[0])):
            mine = {k: arguments[k][row : row + 1] for k in rows_of(name)}
            alone = touched(name, arguments | mine, kernel(isa, name, **arguments | mine))
            for whole, by_two, one in zip(together, shared, alone, strict=True):
                assert torch.equal(whole[row], one[0]) and torch.equal(whole[row], by_two[row])


@pytest.mark.parametrize("count", [3, 11])
@pytest.mark.parametrize("name", ["linear", "experts", "delta_rule", "add"])
def test_threads_share_the_tasks_whatever_their_number(name: str, count: int) -> None:
    """Of more threads than there are shares some have one together; of few tasks some get none."""
    arguments = cast(name, batches(name), same(name, F32))
    alone = touched(name, arguments, kernel("native", name, **arguments))
    with threads(count):
        for _ in range(20):
            shared = touched(name, arguments, kernel("native", name, **arguments))
            assert all(map(torch.equal, shared, alone))


@each_isa
@pytest.mark.parametrize("hd", [37, 48])
def test_a_query_is_answered_the_same_whatever_shares_its_chunk(hd: int, isa: str) -> None:
    """To the bit: 24 answers go by eights or fours; those of few queries by twos and ones, too."""
    arguments = attention([21, 0, 9, 150, 71], 10, 70, 2, 3, hd)
    (whole,) = kernel(isa, "attention", **arguments)
    for count in (1, 2, 3):
        for t in range(0, 10 - count + 1, count):
            mine = {k: arguments[k][:, t : t + count] for k in ("query", "position")}
            (alone,) = kernel(isa, "attention", **arguments | mine)
            assert torch.equal(alone, whole[:, t : t + count])


# --- views ---------------------------------------------------------------------------------------

INDICES = (INDEX, BOOL)


def wider(tensor: Tensor) -> Tensor:
    """With three more columns before and two after."""
    fill = torch.nan if tensor.is_floating_point() else 1
    return torch.nn.functional.pad(tensor, (3, 2), value=fill)


def inner(tensor: Tensor) -> Tensor:
    return tensor.split([3, tensor.shape[-1] - 5, 2], dim=-1)[1]


def given_as(sample: Arguments, chosen: Arguments, back: Callable[[Tensor], Tensor]) -> Any:
    """Arguments of a step, some of them in a form from which a view of it is made."""

    def view(tensors: Arguments) -> Arguments:
        return {k: back(t) if k in chosen else t for k, t in tensors.items()}

    return {"given": sample | chosen, "view": view, "strict": False}


@each_name
def test_views_are_read_where_they_lie(name: str) -> None:
    """Parts of wider tensors, and leading axes in another order: equal to the bit."""
    sample = samples(name)[0]
    kept, want = KERNELS[name].writes, kernel("native", name, **sample)
    tensors = {k: t for k, t in sample.items() if isinstance(t, Tensor) and k not in kept}
    # whose other order leaves the last axis alone, or may be of any order
    free = {k for k, t in tensors.items() if t.ndim > 2 - (KERNELS[name].types[k] in INDICES)}
    wide = {k: wider(t) for k, t in tensors.items() if (name, k) != ("int8_linear", "x_scale")}
    turned = {k: tensors[k].transpose(0, 1).contiguous() for k in free}
    for chosen, back in ((wide, inner), (turned, lambda t: t.transpose(0, 1))):
        step, got = lowered(name, **given_as(sample, chosen, back))
        assert fired(step) == {name}
        assert all(map(torch.equal, got, want))


@each_name
def test_what_does_not_lie_together_is_left_alone(name: str) -> None:
    """The last axis of a real or int8 tensor; what is left on its reference is right as well."""
    sample = samples(name)[-1 if name == "delta_rule" else 0]  # of more than one token
    want = reference(name, sample)
    for key, wanted in KERNELS[name].types.items():
        tensor = sample[key]
        if wanted in INDICES or tensor.ndim < 2 or key in KERNELS[name].writes:
            continue
        scattered = {key: tensor.mT.contiguous()}
        if scattered[key].mT.stride(-1) == 1:
            continue  # an axis of size 1
        step, got = lowered(name, **given_as(sample, scattered, lambda t: t.mT))
        reasons = [reason for verdict in step.verdicts.values() for reason in verdict.reasons]
        assert fired(step) <= {None}
        assert f"{name}: {key}'s last axis does not lie together" in reasons
        check(name, got, want)


@pytest.mark.parametrize("shape", [(1, 5, 7), (1, 5, 1), (2, 1, 7), (2, 5, 1), (1, 1, 1)])
@pytest.mark.parametrize("columns", [1, 7])
def test_a_gate_of_stride_zero(shape: tuple[int, ...], columns: int) -> None:
    """One gate for many rows is a view like another; one for all columns must have size 1."""
    size = (2, 5, max(columns, shape[-1]))
    sample = {"x": randn(2, 5, 7), "gate": randn(*shape, seed=1)}
    expanded = given_as(sample, {"gate": sample["gate"]}, lambda t: t.expand(size))
    step, got = lowered("gate", **expanded)
    check("gate", got, (sample["x"] * sample["gate"].sigmoid(),))
    assert ("gate" in fired(step)) == (shape[-1] == size[-1])


# --- numbers -------------------------------------------------------------------------------------

ULP = 2.0**-23
TINY = 1e-35  # below it float32's exponential is 0 or infinity


def line() -> Tensor:
    """-100 to 100, their neighbours near 0 and where exponentials end, and what is no number."""
    ends = torch.tensor([88.72283, 88.72284, -87.3, -87.33655, 103.97, 0.0, 1e-30, 1e-44, 3e38])
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    return torch.cat([torch.linspace(-100, 100, 40_001), ends, -ends, odd, odd])


@each_isa
def test_exponentials_are_exact_to_a_few_ulps(isa: str) -> None:
    """As sigmoid and as silu, against float64; a vector's numbers are those of a loop's end."""
    x = line()
    one = torch.ones_like(x)
    for name, given, function in (
        ("gate", {"x": one, "gate": x}, torch.sigmoid),
        ("swiglu", {"gate": x, "up": one}, silu),
    ):
        (got,) = kernel(isa, name, **given)
        want = function(x.double())
        finite = want.isfinite()
        error = (got - want).abs()[finite]
        assert (error <= 1.5 * ULP * want.abs()[finite] + TINY).all(), name
        assert torch.equal(got[~finite].nan_to_num(), function(x[~finite]).nan_to_num())
        column = {k: v[:, None] for k, v in given.items()}
        assert torch.equal(kernel(isa, name, **column)[0][:, 0].nan_to_num(), got.nan_to_num())


@each_isa
def test_casts_are_torch_s(isa: str) -> None:
    """Every bfloat16, and float32 of any bits: ties, overflow to infinity, NaN that stays NaN."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(BF16)
    (wide,) = kernel(isa, "cast", x=bits, narrow=False)
    assert torch.equal(wide.view(torch.int32), bits.float().view(torch.int32))
    some = torch.randint(-(1 << 31), 1 << 31, (99_999,), generator=generator()).int()
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) * (1 << 16) + (1 << 15)
    x = torch.cat([some, halves, halves + 1, halves - 1]).view(F32)
    (got,) = kernel(isa, "cast", x=x, narrow=True)
    assert torch.equal(got.isnan(), x.isnan()) and x.isnan().sum() > 100
    assert torch.equal(got[~x.isnan()].view(torch.int16), x[~x.isnan()].to(BF16).view(torch.int16))


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routes(isa: str, dtype: torch.dtype) -> None:
    """Ties, many of them in bfloat16, and logits whose probabilities vanish."""
    logits = torch.cat([randn(40, 67), 30 * randn(40, 67), torch.zeros(2, 67), randn(9, 67) * 1e4])
    logits[80:82, 5] = torch.tensor([1.0, -torch.inf])
    logits = logits.to(dtype)
    ordered = logits.sort(-1, descending=True).values[:, :7]
    top = logits.topk(6)
    for renormalise in (True, False):
        given = {"logits": logits, "topk": 6, "renormalise": renormalise}
        weight, expert = kernel(isa, "route", **given)
        assert all(len(set(row)) == 6 for row in expert.tolist())
        assert expert.min() >= 0 and expert.max() < 67
        p = logits.double().softmax(-1)
        want = p.gather(-1, expert)
        want = want / want.sum(-1, keepdim=True) if renormalise else want
        # two logits 128 apart are known to 2^-24 * 128 in float32, and so are their exponentials
        tolerance = 1e-5 if dtype == F32 else 2.0**-8
        assert torch.allclose(weight.double(), want, rtol=tolerance, atol=1e-37)
        if renormalise:
            assert ((weight.double().sum(-1) - 1).abs() < 6 * tolerance).all()
        # no better expert is left out, also where logits tie: exactly, but for what is 0 in float32
        assert torch.equal(p.gather(-1, expert).float()[:80], p.topk(6).values.float()[:80])
        clear = (ordered[:, :-1] > ordered[:, 1:]).all(-1) & (p.topk(6).values > 1e-30).all(-1)
        assert clear.sum() > 10 and torch.equal(expert[clear], top.indices[clear])


@each_isa
@each_name
def test_nothing_is_computed_of_nothing(name: str, isa: str) -> None:
    """No rows at all, and no rows or columns of a weight: no division by how many there are."""
    arguments = batches(name)
    none = {k: arguments[k][:0] for k in rows_of(name)}
    for made in kernel(isa, name, **arguments | none)[: 1 if KERNELS[name].writes else None]:
        assert made.numel() == 0 or name == "kv_write"
    if name in ("linear", "int8_linear"):
        scale = {"scale": torch.ones(0)} if name == "int8_linear" else {}
        (made,) = kernel(isa, name, **arguments | {"weight": arguments["weight"][:0]} | scale)
        assert made.shape == (67, 0)
        hollow = {k: arguments[k][:, :0] for k in ("x", "weight")}
        assert not kernel(isa, name, **arguments | hollow)[0].any()
