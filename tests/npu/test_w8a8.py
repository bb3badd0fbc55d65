"""W8A8 on the device: integers and scales to the bit, sites within tolerance, steps counted."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional import ops
from qnext.functional.ops.quant import OVER, RECIPROCAL, TIMES
from qnext.functional.ops.tolerance import NORMS, SUMS
from qnext.functional.quantize import KEPT, PUBLIC_CONVERTER, quantize, quantize_rows
from qnext.lowering.npu.w8a8 import calls as int8
from qnext.lowering.npu.w8a8 import emit
from tests.npu.models import BF16, MODELS, case, here, params, there
from tests.npu.sites import Found, examine
from tests.npu.test_steps import KINDS, compiled, near_tie, real_rows
from tests.samples import relative_rms

GATES = [entry for entry in KEPT if "in_proj" not in entry]  # b and a are quantised as well
CHOICES: dict[str, list[str] | tuple[str, ...] | None] = {
    "default": None,
    "gates": GATES,
    "public": PUBLIC_CONVERTER,
    "all": [],
}
# Sites whose call is given what the reference is, and rounds as it does: nothing may differ, but
# where an exponential comes between: its last bit may, and with it that of a scale.
EXACT = {"tokens": TIMES, "gated_product": RECIPROCAL}
LAST_BIT = 2**-23
# The call leaves out a rounding to bf16 before int8, or makes one of 1 + w, at most 2^-8 each: of
# an integer up to 127 that is half a step, and another where the scale differs as well.
NORMED = {"add_norm_tokens", "gated_norm_tokens"}
STEPS_APART = 2


def weights(name: str, choice: str = "default", **changes: Any) -> qn.Params:
    given = params(name, **changes)
    listed = CHOICES[choice]
    if listed is not None and given.config.tie_word_embeddings:
        listed = [entry for entry in listed if entry != "lm_head"]
    if listed is not None and not given.mtp:
        listed = [entry for entry in listed if entry != "mtp.fc"]
    return quantize(given, ignore=listed)


def drawn(*shape: int, size: float = 1.0) -> Tensor:
    return (torch.randn(shape) * size).to(BF16)


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(g.cpu(), w) for g, w in zip(got, want, strict=True))


def tokens(x: Tensor, rounding: str) -> tuple[Tensor, Tensor]:
    return ops.quantize_tokens(x=x, rounding=rounding)


# Calls beside the three roundings, on the same float32 values: integers and scales to the bit.


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_dynamic_quant_multiplies_by_127_over_max(size: float) -> None:
    x = drawn(5, 3, 96, size=size)
    assert same(int8.npu_dynamic_quant(x=x.npu()), tokens(x, TIMES))


def test_the_norm_is_quantised_before_it_is_rounded() -> None:
    x, residual, gamma = drawn(7, 96), drawn(7, 96), drawn(96).abs() + 0.5
    given = {"x": x.npu(), "residual": residual.npu(), "gamma": gamma.npu(), "eps": 1e-6}
    q, scale, total = int8.npu_add_rms_norm_dynamic_quant(**given)
    f = x.float() + residual.float()
    normed = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + 1e-6) * gamma.float()
    assert same((q, scale), tokens(normed, TIMES))
    assert torch.equal(total.cpu(), f.to(BF16))


def test_swiglu_divides_by_max_over_127() -> None:
    x = drawn(9, 80)
    gate, up = x.float().chunk(2, -1)
    want = tokens(gate / (1 + torch.exp(-gate)) * up, OVER)
    assert same(int8.npu_dequant_swiglu_quant(x=x.npu()), want)


def test_routing_quantises_tokens_and_sorts_them() -> None:
    x = drawn(6, 32)
    expert = torch.rand(6, 5).argsort(-1)[:, :2].int()
    rows, scale, where, counts = int8.npu_init_routing_quant(
        x=x.npu(), expert=expert.npu(), experts=5
    )
    q, token_scale = tokens(x, TIMES)
    order = expert.flatten().argsort(stable=True)
    assert same((rows, scale), (q[order // 2], token_scale[order // 2]))
    assert torch.equal(where.cpu().long()[order], torch.arange(12))
    assert torch.equal(counts.cpu(), expert.flatten().bincount(minlength=5))


def test_the_experts_first_product_multiplies_by_the_reciprocal() -> None:
    """Two experts of which one has no token; weights in FRACTAL_NZ of sizes that fill no block."""
    x, scale = tokens(drawn(7, 40), TIMES)
    made = quantize_rows(torch.randn(2, 68, 40))
    q, q_scale = int8.npu_grouped_matmul_swiglu_quant(
        x=x.npu(),
        x_scale=scale.npu(),
        weight=emit.nz(made.weight.npu()),
        scale=made.scale.npu(),
        counts=torch.tensor([0, 7]).npu(),
    )
    sums = (x.long() @ made.weight[1].long().T).float()
    gate, up = (sums * scale[:, None] * made.scale[1]).chunk(2, -1)
    assert same((q, q_scale), tokens(gate / (1 + torch.exp(-gate)) * up, RECIPROCAL))


def test_products_are_exact_sums_rounded_once() -> None:
    x, scale = tokens(drawn(5, 72), TIMES)
    made = quantize_rows(torch.randn(50, 72))
    given = {"x": x.npu(), "x_scale": scale.npu(), "scale": made.scale.npu()}
    got = int8.npu_quant_matmul(weight=emit.nz(made.weight.npu()), **given)
    want = ops.int8_linear(x=x, x_scale=scale, weight=made.weight, scale=made.scale)
    assert torch.equal(got.cpu(), want.to(BF16))


def test_a_token_of_zeros_has_scale_zero_and_product_zero() -> None:
    """What its integers are no page says: here they are none of 0, and times 0 they are 0."""
    x = drawn(3, 64)
    x[1] = 0
    for q, scale in (
        int8.npu_dynamic_quant(x=x.npu()),
        int8.npu_dequant_swiglu_quant(x=torch.cat([x, x], -1).npu()),
    ):
        assert float(scale[1]) == 0 and bool(q[1].cpu().any())
        made = quantize_rows(torch.randn(48, 64))
        y = int8.npu_quant_matmul(
            x=q, x_scale=scale, weight=emit.nz(made.weight.npu()), scale=made.scale.npu()
        )
        assert not y[1].cpu().any() and bool(y[0].cpu().any())


# FRACTAL_NZ.


@pytest.mark.parametrize("shape", [(64, 96), (50, 70), (3, 33, 18)])
@pytest.mark.parametrize("dtype", [torch.int8, BF16])
def test_a_cast_format_holds_the_same_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    import torch_npu

    weight = torch.randint(-127, 128, shape).to(dtype)
    made = int8.npu_format_cast(weight=weight.npu())
    assert torch_npu.get_npu_format(made) == int8.NZ
    assert torch.equal(made.cpu(), weight)
    assert torch_npu._C._npu_getOption("ALLOW_INTERNAL_FORMAT") != b"enable"  # as it was


def test_weights_are_packed_once_in_the_cube_s_order() -> None:
    import torch_npu

    given = case("decode", weights("fused"), sequences=15)
    step = compiled(given)
    step(*there(given.arguments))
    packed = [leaf for leaf in step._packed[1] if leaf.dtype == torch.int8]
    formats = Counter(int(torch_npu.get_npu_format(leaf)) for leaf in packed)
    assert formats.keys() == {int8.NZ}
    # in and out of each mixer, and both of all experts together
    assert formats[int8.NZ] == 4 * given.arguments[0].config.num_hidden_layers


# Steps.


def far(found: Found) -> bool:
    """Whether a result is farther from the reference than it may be."""
    exact = found.rule in EXACT and found.match.inputs["rounding"] == EXACT[found.rule]
    if found.got.dtype == torch.int8:
        apart = (found.got.int() - found.want.int()).abs()
        apart = apart[(found.want != 0).any(-1)]  # of zeros: see above
        return bool((apart > (0 if exact else STEPS_APART)).any())
    if exact:
        return not found.error <= (LAST_BIT if found.rule == "gated_product" else 0)
    if found.rule == "int8_experts":
        clear = without_ties(found)
        return not relative_rms(found.got[clear], found.want[clear]) <= SUMS[BF16].relative_rms
    return not found.error <= (NORMS if found.rule in NORMED else SUMS)[BF16].relative_rms


def without_ties(found: Found) -> Tensor:
    """The tokens whose k-th and next logits differ: of equal ones either expert is right."""
    given, k = found.match.inputs, found.match.inputs["topk"]
    ordered = found.values[given["logits"]].sort(-1, descending=True).values
    clear = ordered[:, k - 1] > ordered[:, k]
    assert clear.any()
    return clear


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_integers_and_scales_are_the_reference_s(name: str, kind: str) -> None:
    given = case(kind, weights(name), sequences=15)
    found = [f for f in examine(given.function, given.arguments, here()) if _is_int8(f)]
    wrong = [f for f in found if far(f)]
    ties = [f for f in wrong if f.rule == "int8_mixture" and near_tie(f)]
    assert [(f.rule, f.error) for f in wrong if f not in ties] == []
    assert len(ties) <= 1  # none or a single one in a step of a few dozen tokens
    assert {"tokens", "products", "gated_norm_tokens"} <= {f.rule for f in found}


def _is_int8(found: Found) -> bool:
    return found.rule in {*EXACT, *NORMED, "products", "int8_mixture", "int8_experts"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_as_near_to_the_float_model_as_the_reference(kind: str) -> None:
    """bf16 roundings that differ flip integers, as if tokens had been quantised anew.

    So the step may be as far from the quantised reference as that is from the float model, and no
    farther from the float model than it (a tenth more by chance). Without experts, whose choice
    may turn on a rounding.
    """
    plain = params("fused", num_experts=0)
    given, exact = case(kind, quantize(plain), sequences=15), case(kind, plain)
    want, truth = (each.function(*each.arguments)[0] for each in (given, exact))
    got = compiled(given)(*there(given.arguments))[0].cpu()
    worth = relative_rms(want, truth)
    assert relative_rms(got, want) < worth
    assert relative_rms(got, truth) < 1.1 * worth


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "choice"), [*zip(MODELS, CHOICES, strict=True)])
def test_captured_equals_eager_and_nodes_are_as_predicted(
    name: str, choice: str, kind: str
) -> None:
    given = case(kind, weights(name, choice), sequences=15)
    step = compiled(given)  # strict: nothing fell back
    mine = there(given.arguments)
    captured = step.capture(*mine)
    tasks = captured.launches()
    assert len(tasks) == step.lowered.cost_analysis()["launches"]
    logits, state = captured(*mine)
    want, want_state = step(*there(given.arguments))
    assert torch.equal(logits.cpu(), want.cpu())
    for (path, got), (_, expected) in zip(real_rows(state), real_rows(want_state), strict=True):
        assert torch.equal(got, expected), path


# the first norm follows no sum: where nothing else reads it, its tokens are a launch more
@pytest.mark.parametrize(("choice", "delta_net", "first"), [("gates", 18, 1), ("default", 19, 0)])
def test_launches_of_the_published_depth(choice: str, delta_net: int, first: int) -> None:
    """48 layers of tiny width: delta nets of at most 18 (20 where b and a stay), 11 and 10."""
    given = weights("fused", choice, num_hidden_layers=48)
    blocks = 36 * delta_net + 12 * 11 + 48 * 10
    for kind, once in (("decode", 15), ("verify", 19)):
        each = case(kind, given)
        step = compiled(each)
        tasks = step.capture(*there(each.arguments)).launches()
        count = Counter(tasks)
        predicted = step.lowered.cost_analysis()["launches"]
        assert len(tasks) == predicted == blocks + once + first
        assert count["aclnnGroupedMatmulSwigluQuantWeightNzV2"] == 48
        assert count["aclnnGroupedMatmulWeightNz"] == 48
        assert count["aclnnQuantMatmulWeightNz"] == 96


def test_no_step_reads_anything_back() -> None:
    from qnext.lowering.softnpu import bridge

    given = case("decode", weights("fused"), sequences=90)
    step = compiled(given)
    arguments = there(given.arguments)
    step(arguments[0], *there(given.arguments[1:]))  # packs the weights
    before = bridge.counters()
    step(*arguments)
    after = bridge.counters()
    assert after.d2h == before.d2h and after.synchronizations == before.synchronizations


def test_speculation_is_one_graph_in_int8_as_well() -> None:
    given = weights("demo")
    state = qn.narrow(qn.init_state(given.config, 9, 300, draft=1), 3)
    _, state = qn.prefill(given, state, torch.tensor([[5, 7, 11], [13, 17, 2], [19, 23, 3]]))

    def step(params: qn.Params, state: qn.State, tokens: Tensor) -> tuple[Tensor, Tensor, qn.State]:
        return qn.speculate(params, state, tokens, 1)

    arguments = (given, state, torch.tensor([29, 31, 37]))
    made = qn.jit(step, donate="state").trace(*arguments).lower(here(), strict=True).compile()
    mine = there(arguments)
    captured = made.capture(*mine)
    assert len(captured.launches()) == made.lowered.cost_analysis()["launches"]
    got, count, _ = captured(*mine)
    want, want_count, _ = made(*there(arguments))
    assert torch.equal(got.cpu(), want.cpu()) and torch.equal(count.cpu(), want_count.cpu())
