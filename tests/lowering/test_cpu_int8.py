"""int8 on the cpu target: integers and scales are equal to the bit in every set of instructions."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from qnext.functional import ops
from qnext.functional.blocks import own
from qnext.functional.mesh import Span
from qnext.functional.ops.quant import OVER, RECIPROCAL, TIMES
from qnext.lowering.cpu.table import LONGEST_INT8
from tests.lowering.test_cpu_kernels import (
    DTYPES,
    F32,
    TOKENS,
    Arguments,
    each_isa,
    experts,
    fired,
    generator,
    int8,
    kernel,
    lowered,
    quantised,
    randn,
)
from tests.lowering.test_cpu_kernels import asked_once as asked_once
from tests.lowering.test_cpu_kernels import pytestmark as pytestmark

ROUNDINGS = (TIMES, OVER, RECIPROCAL)
rounded = pytest.mark.parametrize("rounding", ROUNDINGS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# columns and rows: less than a vector of 16 or of 64 bytes, whole ones, and what is left over
MATRICES = [(1, 130), (15, 3), (63, 1), (64, 66), (130, 63), (257, 5), (1031, 130)]

# --- products ------------------------------------------------------------------------------------


def exact(x: Tensor, weight: Tensor) -> np.ndarray:
    return x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T


def operands(tokens: int, columns: int, rows: int) -> tuple[Tensor, Tensor]:
    """Any integers, weights of -128 among them; the first of both are the extremes."""
    x, weight = int8(tokens, columns), int8(rows, columns, seed=1, least=-128)
    x[0], weight[0] = 127, -128
    return x, weight


@each_isa
def test_sums_are_exact(isa: str) -> None:
    """Scales of 1 and sums below 2^24, where float32 is exact."""
    for tokens, (columns, rows) in product(TOKENS, MATRICES):
        x, weight = operands(tokens, columns, rows)
        ones = {"x_scale": torch.ones(tokens), "scale": torch.ones(rows)}
        (got,) = kernel(isa, "int8_linear", x=x, weight=weight, **ones)
        want = exact(x, weight)
        assert np.abs(want).max() < 1 << 24
        assert np.array_equal(got.numpy(), want), (tokens, columns, rows)


@each_isa
@pytest.mark.parametrize("sign", [1, -1])
def test_the_longest_sum(isa: str, sign: int) -> None:
    """Of greatest products, each of the same sign: 2^30 of weights -128, and no overflow."""
    weight = torch.tensor([-128, 127, -127], dtype=torch.int8)[:, None].expand(3, LONGEST_INT8)
    x = torch.full((5, LONGEST_INT8), 127 * sign, dtype=torch.int8)
    ones = {"x_scale": torch.ones(5), "scale": torch.ones(3)}
    (got,) = kernel(isa, "int8_linear", x=x, weight=weight.contiguous(), **ones)
    assert np.array_equal(got.numpy(), exact(x, weight).astype(np.float32))


def test_a_longer_sum_is_left_alone() -> None:
    ones = {"x_scale": torch.ones(2), "scale": torch.ones(3)}
    for columns, rule in ((LONGEST_INT8, "int8_linear"), (LONGEST_INT8 + 1, None)):
        sample = {"x": int8(2, columns), "weight": int8(3, columns, seed=1)} | ones
        step, (got,) = lowered("int8_linear", sample, strict=False)
        assert fired(step) == {rule}
        assert np.array_equal(got.numpy(), exact(sample["x"], sample["weight"]).astype(np.float32))


@each_isa
def test_scaled_sums_are_the_definition_s(isa: str) -> None:
    """The token's scale first, then the row's: three numbers multiplied in one order only."""
    x, weight = operands(35, 257, 66)
    x_scale, scale = (torch.rand(n, generator=generator()) for n in (35, 66))
    sample = {"x": x.view(5, 7, 257), "x_scale": x_scale.view(5, 7), "weight": weight}
    (got,) = kernel(isa, "int8_linear", **sample, scale=scale)
    assert torch.equal(got, ops.int8_linear(**sample, scale=scale))
    ones = sample | {"x_scale": torch.ones(5, 7)}
    other_order = ops.int8_linear(**ones, scale=scale) * sample["x_scale"][..., None]
    assert not torch.equal(got, other_order)  # it would show


def test_scales_that_do_not_lie_together() -> None:
    """Those of tokens are left to the reference."""
    x, weight = operands(5, 33, 7)
    sample = {"x": x, "x_scale": torch.rand(5, 3), "weight": weight, "scale": torch.rand(7)}
    view = lambda t: t | {"x_scale": t["x_scale"][:, 1]}  # noqa: E731
    step, (got,) = lowered("int8_linear", sample, view=view, strict=False)
    (verdict,) = step.verdicts.values()
    assert verdict.rule is None and "not lie together" in verdict.reasons[0]
    assert torch.equal(got, ops.int8_linear(**view(sample)))


# --- tokens --------------------------------------------------------------------------------------


def tokens() -> Iterator[Tensor]:
    """Of several widths: any magnitude, zeros, next to nothing, the greatest, ties."""
    powers = torch.tensor(
        [1.0, 1e-4, 30, 0, 1e-30, 1e30, 1e-36, 1.5e-36, 1e-38, 1e-41, 1e-44, 1e37]
    )
    for columns in (1, 7, 64, 131):
        yield randn(1200, columns, seed=columns) * powers.repeat(100)[:, None]
    huge = 3e38 * (2 * torch.rand(99, 33, generator=generator()) - 1)
    huge[:, 4] = 3e38
    yield huge
    ties = torch.cat([torch.tensor([127.0, -127]), torch.arange(-127, 127) + 0.5])
    yield ties * 2.0 ** torch.arange(-90, 90)[:, None]
    # halves of many maxima, which three roundings turn three ways
    peak = torch.linspace(1, 2, 3000)[:, None]
    yield torch.cat([peak, peak * ((torch.arange(60) + 0.5) / 127)], dim=1)


def bits(scale: Tensor) -> Tensor:
    return scale.view(torch.int32)


@each_isa
@rounded
@each_dtype
def test_tokens_are_the_definition_s(isa: str, rounding: str, dtype: torch.dtype) -> None:
    for x in tokens():
        given = {"x": x.to(dtype), "rounding": rounding}
        q, scale = kernel(isa, "quantize_tokens", **given)
        want_q, want_scale = ops.quantize_tokens(**given)
        assert torch.equal(q, want_q) and torch.equal(bits(scale), bits(want_scale))


@each_isa
@rounded
@each_dtype
def test_what_is_no_number_shows_in_its_scale(isa: str, rounding: str, dtype: torch.dtype) -> None:
    """A token of NaN, wherever it stands and of either sign, and of no other token."""
    for columns in (1, 17, 130):
        x = randn(columns + 1, columns).to(dtype)
        x[:-1].diagonal().fill_(torch.nan)
        x[::2] = -x[::2]
        q, scale = kernel(isa, "quantize_tokens", x=x, rounding=rounding)
        want_q, want_scale = ops.quantize_tokens(x=x[-1], rounding=rounding)
        assert scale[:-1].isnan().all()
        assert torch.equal(q[-1], want_q) and torch.equal(scale[-1], want_scale)


def test_the_three_roundings_differ() -> None:
    """The tokens above tell them apart."""
    *_, x = tokens()
    q = [kernel("native", "quantize_tokens", x=x, rounding=rounding)[0] for rounding in ROUNDINGS]
    assert not (torch.equal(q[0], q[1]) or torch.equal(q[1], q[2]) or torch.equal(q[0], q[2]))


# --- experts -------------------------------------------------------------------------------------


def mixtures() -> Iterator[Arguments]:
    for count, sizes in product(TOKENS, [(7, 3), (64, 33), (130, 66), (15, 31), (33, 1)]):
        yield quantised(experts(count, *sizes))


@each_isa
@each_dtype
def test_experts(isa: str, dtype: torch.dtype) -> None:
    """Nearly every token to float32's error; an exponential's last bit may turn an integer over.

    Then the token is off by up to 1/127 of one of `ffn` terms of its sum.
    """
    off = total = 0
    for sample in mixtures():
        given = sample | {"x": sample["x"].to(dtype), "weight": sample["weight"].to(dtype)}
        (got,) = kernel(isa, "int8_experts", **given)
        want = ops.int8_experts(**given)
        assert got.dtype == dtype
        error = (got.double() - want.double()).norm(dim=-1) / want.double().norm(dim=-1)
        limit = 5e-6 if dtype == F32 else 1.5e-2
        assert (error < 2e-2).all()
        off, total = off + int((error > limit).sum()), total + len(error)
    assert total > 1000 and off <= total // 100


@each_isa
def test_experts_to_the_bit(isa: str) -> None:
    """One expert a token, and gates so large that silu is the identity: no integer is in doubt.

    More experts are added up with fused multiply-adds where the machine has them.
    """
    sample = quantised(experts(9, 130, 33, topk=1))
    sample["x"] = torch.zeros(9, 130)
    sample["x"][:, 0] = torch.tensor([1.0, 0.25, 3e-5] * 3)
    sample["gate_up"][:, :33, 0] = 127
    sample["gate_up_scale"].fill_(1e8)
    (got,) = kernel(isa, "int8_experts", **sample)
    assert torch.equal(got, ops.int8_experts(**sample)) and (got != 0).any(-1).all()


@each_isa
def test_experts_that_nobody_chose_do_not_matter(isa: str) -> None:
    sample = quantised(experts(9, 130, 33))
    blank = dict(sample)
    blank["expert"] = sample["expert"] + (sample["expert"] >= 2)  # nobody chooses expert 2 of six
    for name in ("gate_up", "gate_up_scale", "down", "down_scale"):
        values = sample[name]
        hole = torch.full_like(values[:1], torch.nan if values.is_floating_point() else -128)
        blank[name] = torch.cat([values[:2], hole, values[2:]])
    (got,) = kernel(isa, "int8_experts", **blank)
    assert torch.equal(got, kernel(isa, "int8_experts", **sample)[0])


@each_isa
@pytest.mark.parametrize("first", [0, 2, 5])
@pytest.mark.parametrize("tokens", [1, 9, 65])
def test_experts_of_other_ranks_add_nothing(isa: str, tokens: int, first: int) -> None:
    """Of a rank that holds two of five experts, or none that anybody chose."""
    whole = experts(tokens, 130, 33)
    for sample in (whole, quantised(whole)):
        name = "int8_experts" if "down_scale" in sample else "experts"
        weights = [n for n in sample if n.startswith(("gate_up", "down"))]
        held = {n: sample[n][first : first + 2] if first < 5 else sample[n][:2] for n in weights}
        place = own(sample["expert"], Span(first, 2))
        given = sample | held | {"expert": place}
        (got,) = kernel(isa, name, **given)
        want = getattr(ops, name)(**given)
        assert (got - want).norm() <= 2e-2 * want.norm()
        resting = (place == 2).all(dim=1)
        assert not got[resting].any() and (first < 5 or bool(resting.all()))
