"""Every rule of the cpu target fires on its sample and declines its counter-sample, and says why.

A primitive's sample is the first of its own, in float32 and in bfloat16 with pools in float32. A
counter-sample is the same in float64, unless the table says otherwise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from qnext.functional import ops
from qnext.functional.ops import PRIMITIVES
from qnext.lowering import rules
from qnext.lowering.cpu.calls import BETWEEN, KERNELS
from qnext.lowering.cpu.table import RULES
from qnext.lowering.stages import Lowered, jit
from tests.lowering.test_cpu_kernels import SMALL

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
MODEL = [name for name in KERNELS if name not in BETWEEN]
STAYS = ("g", "A_log", "dt_bias", "frequency", "x_scale", "scale", "gate_up_scale", "down_scale")
POOLS = ("state", "key_pool", "value_pool")
KERNEL = "the kernel takes"


def sample(name: str, dtype: torch.dtype, but: tuple[str, ...] = STAYS) -> dict[str, Any]:
    """A primitive's arguments in some dtype, but for those that have their own."""
    first = next(iter(PRIMITIVES[name].samples(torch.Generator().manual_seed(0))))
    return {
        k: v.to(F32 if k in but else dtype)
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for k, v in first.items()
    }


def lower(function: Callable[..., Any], **given: Any) -> Lowered:
    return jit(function, weights=()).trace(**given).lower("cpu")


def primitive(name: str, **given: Any) -> Lowered:
    """A primitive by itself, in dtypes that the model's code may never give it as well."""
    op, fixed = PRIMITIVES[name].op, {k: v for k, v in given.items() if not isinstance(v, Tensor)}

    def step(tensors: dict[str, Tensor]) -> Any:
        return op(**tensors, **fixed)

    return lower(step, tensors={k: v for k, v in given.items() if isinstance(v, Tensor)})


def fired(step: Lowered, rule: str) -> bool:
    return any(verdict.rule == rule for verdict in step.verdicts.values())


def told(step: Lowered, rule: str) -> list[str]:
    """Why a rule declined, wherever it did."""
    given = {reason for verdict in step.verdicts.values() for reason in verdict.reasons}
    return [r.removeprefix(f"{rule}: ") for r in given if r.startswith(f"{rule}: ")]


# ---- primitives

FIRST = {  # the argument that a float64 sample is declined for, and what the kernel takes
    "rms_norm": "x",
    "gated_rms_norm": "x",
    "l2_norm": "x",
    "rotary": "query",
    "short_conv": "x",
    "delta_gates": "a",
    "delta_rule": "query",
    "kv_write": "key_pool",
    "attention": "query",
    "route": "logits",
    "experts": "x",
    "quantize_tokens": "x",
    "int8_experts": "x",
}
ALONE = {"int8_linear"}  # none of its arguments may be in float64


def test_the_table_is_whole() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names) - SMALL) == len([name for name in names if name not in SMALL])
    assert set(names) == FIRST.keys() | ALONE | PATTERNS.keys() | SMALL - {"write_back"}
    assert set(MODEL) == FIRST.keys() | ALONE


@pytest.mark.parametrize("name", MODEL)
def test_it_fires_on_its_samples(name: str) -> None:
    for given in (sample(name, F32), sample(name, BF16), sample(name, BF16, STAYS + POOLS)):
        assert fired(primitive(name, **given), name)


@pytest.mark.parametrize("name", FIRST)
def test_it_declines_float64(name: str) -> None:
    step = primitive(name, **sample(name, F64))
    assert told(step, name) == [f"{FIRST[name]} is float64, {KERNEL} float32 or bfloat16"]
    assert [v.rule for v in step.verdicts.values() if v.site == name] == [None]


REASONS: dict[str, tuple[str, str, torch.dtype, str]] = {
    # by what is wrong: the primitive, its argument that has another dtype, which, and the reason
    "mixed": ("gated_rms_norm", "gate", BF16, "gate is bfloat16, x float32"),
    "mixed pools": ("attention", "value_pool", BF16, "value_pool is bfloat16, key_pool float32"),
    "window": ("short_conv", "window", BF16, "window is bfloat16, x float32"),
    "own dtype": ("delta_gates", "A_log", BF16, f"A_log is bfloat16, {KERNEL} float32"),
    "index": ("kv_write", "index", torch.int16, f"index is int16, {KERNEL} int32 or int64"),
    "flag": ("delta_gates", "valid", torch.uint8, f"valid is uint8, {KERNEL} bool"),
    "scale": ("int8_linear", "scale", BF16, f"scale is bfloat16, {KERNEL} float32"),
    "weight": ("int8_linear", "weight", torch.uint8, f"weight is uint8, {KERNEL} int8"),
}


@pytest.mark.parametrize("case", REASONS)
def test_it_declines_a_dtype_that_its_kernel_does_not_take(case: str) -> None:
    name, argument, dtype, reason = REASONS[case]
    given = sample(name, F32)
    step = primitive(name, **given | {argument: given[argument].to(dtype)})
    assert told(step, name) == [reason]


def test_it_declines_what_does_not_lie_together() -> None:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(x=x.mT, weight=weight, eps=1e-6)

    x = torch.empty(3, 5, 7)
    step = lower(norm, x=x, weight=torch.empty(5))
    assert told(step, "rms_norm") == ["x's last axis does not lie together"]
    assert fired(lower(norm, x=x[:, :1], weight=torch.empty(1)), "rms_norm")  # a single number does

    def scaled(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return ops.int8_linear(x=x, x_scale=x_scale[:, :5], weight=weight, scale=scale)

    given = {"x": torch.empty(3, 5, 7), "weight": torch.empty(11, 7), "scale": torch.empty(11)}
    given = {k: v if k == "scale" else v.to(torch.int8) for k, v in given.items()}
    step = lower(scaled, x_scale=torch.empty(3, 8), **given)
    assert told(step, "int8_linear") == ["x_scale does not lie together"]


def test_it_declines_more_axes_than_a_kernel_has() -> None:
    for axes, reasons in ((5, []), (6, ["x has 6 axes, the kernel takes 5"])):
        x, weight = torch.empty(*range(2, 2 + axes)), torch.empty(1 + axes)
        assert told(primitive("rms_norm", x=x, weight=weight, eps=1e-6), "rms_norm") == reasons


@pytest.mark.parametrize("columns", [1 << 16, (1 << 16) + 1])
def test_it_declines_sums_that_32_bits_do_not_hold(columns: int) -> None:
    few = columns == 1 << 16
    wide, out = (torch.empty(rows, columns, dtype=torch.int8) for rows in (2, 3))
    one, rows = torch.empty(2), torch.empty(3)
    step = primitive("int8_linear", x=wide, x_scale=one, weight=out, scale=rows)
    assert fired(step, "int8_linear") == few
    assert few or told(step, "int8_linear") == ["65537 columns, the kernel sums up to 65536"]
    given = sample("int8_experts", F32)
    experts = len(given["down"])
    long = {
        "x": torch.empty(len(given["x"]), columns),
        "gate_up": torch.empty(*given["gate_up"].shape[:2], columns, dtype=torch.int8),
        "down": torch.empty(experts, columns, given["down"].shape[2], dtype=torch.int8),
        "down_scale": torch.empty(experts, columns),
    }
    step = primitive("int8_experts", **given | long)
    assert fired(step, "int8_experts") == few
    assert few or told(step, "int8_experts") == ["the kernel sums up to 65536 columns"]


# ---- what lies between primitives


class Pattern(NamedTuple):
    """A function that a kernel takes the place of, and others that look like it, with reasons."""

    fires: Callable[..., Tensor]
    declines: dict[str, Callable[..., Tensor]]


OTHER = "another pattern"


def misfit(reason: str) -> str:
    return reason + f", {KERNEL} float32 or bfloat16"


# a and b are [3, 5, 7], column [3, 5, 1], weight [11, 7], bias [11], wide float64, short bfloat16
PATTERNS: dict[str, Pattern] = {
    "linear": Pattern(
        lambda a, weight, **_: linear(a, weight),
        {
            OTHER: lambda a, weight, bias, **_: linear(a, weight, bias),
            misfit("x is float64"): lambda wide, weight, **_: linear(wide, weight.double()),
            "x's last axis does not lie together": lambda weight, a, **_: linear(
                a.reshape(7, 15).mT, weight
            ),
        },
    ),
    "swiglu": Pattern(
        lambda a, b, **_: b * silu(a),
        {
            OTHER: lambda a, column, **_: silu(a) * column,
            misfit("gate is float64"): lambda wide, **_: silu(wide) * wide,
        },
    ),
    "gate": Pattern(
        lambda a, column, **_: a * column.sigmoid(),
        {
            OTHER: lambda a, column, **_: a.sigmoid() * column,  # the gate is the larger one
            misfit("x is float64"): lambda wide, **_: wide.sigmoid() * wide,
        },
    ),
    "add": Pattern(
        lambda a, b, **_: a + b,
        {
            OTHER: lambda a, column, **_: a + column,
            misfit("a is float64"): lambda wide, **_: wide + wide,
            "b is bfloat16, a float32": lambda a, short, **_: a + short,
        },
    ),
    "cast": Pattern(
        lambda a, **_: a.to(BF16),
        {
            OTHER: lambda a, **_: a.to(F64),
            "x's last axis does not lie together": lambda a, **_: a.mT.to(BF16),
        },
    ),
}


def operands() -> dict[str, Tensor]:
    whole = torch.empty(3, 5, 7)
    return {
        "a": whole,
        "b": whole,
        "column": torch.empty(3, 5, 1),
        "weight": torch.empty(11, 7),
        "bias": torch.empty(11),
        "wide": whole.double(),
        "short": whole.to(BF16),
    }


def pattern(function: Callable[..., Tensor]) -> Lowered:
    def step(
        a: Tensor,
        b: Tensor,
        column: Tensor,
        weight: Tensor,
        bias: Tensor,
        wide: Tensor,
        short: Tensor,
    ) -> Tensor:
        given = {"a": a, "b": b, "column": column, "weight": weight, "bias": bias}
        return function(**given, wide=wide, short=short)

    return lower(step, **operands())


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_between_primitives(name: str) -> None:
    row = PATTERNS[name]
    assert fired(pattern(row.fires), name)
    for reason, function in row.declines.items():
        step = pattern(function)
        assert not fired(step, name) and reason in told(step, name), told(step, name)


def test_a_gated_product_with_other_readers_is_left() -> None:
    """What else reads the gate needs it computed by itself."""
    for gate, rule in ((silu, "swiglu"), (torch.sigmoid, "gate")):

        def step(a: Tensor, b: Tensor, gate: Any = gate) -> tuple[Tensor, Tensor]:
            both = gate(a)
            return both * b, both

        lowered = lower(step, a=torch.empty(3, 5), b=torch.empty(3, 5))
        assert not fired(lowered, rule) and OTHER in told(lowered, rule)


def test_sites_alike_are_recorded_once_and_each_has_its_own_arguments() -> None:
    """What differs in nothing but which tensors are the same is not alike."""
    x, y, z = (torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i in range(3))

    def step(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return x + x, x + y, y + z, z + (z + y), (x + z) + (x + z)

    with mock.patch.object(rules, "record_call", wraps=rules.record_call) as recorded:
        lowered = lower(step, x=x, y=y, z=z)
    assert recorded.call_count == 2  # of one tensor, and of two
    assert sum(verdict.rule == "add" for verdict in lowered.verdicts.values()) >= 6
    for mine, wanted in zip(lowered.compile()(x, y, z), step(x, y, z), strict=True):
        assert torch.equal(mine, wanted)


def test_numbers_of_a_call_are_part_of_what_is_recorded() -> None:
    x, weight = torch.randn(3, 5), torch.randn(5)

    def step(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.rms_norm(x=x, weight=weight, eps=eps) for eps in (1e-6, 0.5))

    results = lower(step, x=x, weight=weight).compile()(x, weight)
    for mine, wanted in zip(results, step(x, weight), strict=True):
        torch.testing.assert_close(mine, wanted)
