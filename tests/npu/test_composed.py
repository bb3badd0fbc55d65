"""Compositions on the device: beside their definitions, captured, and counted."""

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import qnext as qn
from qnext.functional import ops
from qnext.functional.ops import PRIMITIVES
from qnext.functional.ops.tolerance import SUMS
from qnext.functional.quantize import quantize_rows
from qnext.lowering.npu import composed, composed_delta, emit, ranks
from qnext.lowering.npu.w8a8 import emit as w8a8
from tests.lowering.test_composed_rules import (
    close,
    close_pools,
    forget_unused,
    narrowed,
    rule_inputs,
    samples,
)
from tests.npu.models import BF16, case, here, params, there
from tests.npu.sites import examine
from tests.npu.test_steps import KINDS, compiled, near_tie, real_rows
from tests.samples import relative_rms

F32 = torch.float32


def device(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments on the device, in memory of their own."""
    return {k: v.npu() if isinstance(v, Tensor) else v for k, v in given.items()}


@pytest.mark.parametrize("pairs", [4, 7])
def test_rotary(pairs: int) -> None:
    for sample in samples("rotary"):  # heads of 14 channels
        given = narrowed(sample | {"frequency": torch.rand(pairs)}, "frequency")
        want = PRIMITIVES["rotary"].reference(**given)
        for got, right in zip(composed.rotary(**device(given)), want, strict=True):
            close("rotary", got.cpu(), right)


@pytest.mark.parametrize("context", [[7, 5, 4], [3, 0, 2]])
def test_attention(context: list[int]) -> None:
    for sample in samples("attention"):
        given = narrowed(sample | {"context": torch.tensor(context)})
        forget_unused(given)
        got = composed.attention(**device(given), padded=True).cpu()
        assert got.isfinite().all()
        close("attention", got, PRIMITIVES["attention"].reference(**given))


@pytest.mark.parametrize("state", [F32, BF16], ids=str)
def test_delta_rules(state: torch.dtype) -> None:
    for sample in samples("delta_rule"):
        given = narrowed(sample, "g", "state")
        given["state"] = given["state"].to(state)
        want, pool = PRIMITIVES["delta_rule"].reference(**given)
        each = given["slots"].shape[1] > 1
        short = each or given["value"].shape[1] == 1
        rule = composed_delta.delta_scan if short else composed_delta.delta_theorem
        out, after = rule(**device(given))
        close("delta_rule", out.cpu(), want)
        close_pools(after.cpu(), pool, given)


@pytest.mark.parametrize("seq", [1, 3, 70])
def test_rows_of_padding_share_scratch(seq: int) -> None:
    given = rule_inputs(seq, 1.0)
    rule = composed_delta.delta_theorem if seq > 8 else composed_delta.delta_scan
    out, pool = rule(**device(given))
    want, after = PRIMITIVES["delta_rule"].reference(**given)
    real = given["slots"][:, 0] != 0
    close("delta_rule", out.cpu()[real], want[real])
    close_pools(pool.cpu(), after, given)


def test_gumbel() -> None:
    """Logarithms are the device's own: equal to a rounding of float32, not to the bit."""
    for sample in samples("gumbel"):
        got = composed.gumbel(**device(sample)).cpu()
        close("gumbel", got, PRIMITIVES["gumbel"].reference(**sample))


def mixture_inputs(shared: int) -> dict[str, Tensor]:
    """13 tokens and a mixture of seven experts of width 32, with a shared one of this width."""
    tokens, d, experts, ffn = 13, 48, 7, 32
    sizes = {
        "x": (tokens, d),
        "router": (experts, d),
        "shared_gate": (1, d),
        "gate_up": (experts, 2 * ffn, d),
        "down": (experts, d, ffn),
        "shared_gate_up": (2 * shared, d),
        "shared_down": (d, shared),
    }
    given = {k: (torch.randn(shape) * shape[-1] ** -0.5).to(BF16) for k, shape in sizes.items()}
    return given | {"x": torch.randn(sizes["x"]).to(BF16)}


@pytest.mark.parametrize("renormalise", [True, False])
def test_mixture_apart(renormalise: bool) -> None:
    given = mixture_inputs(shared=80)
    got = composed.mixture_apart(**device(given), topk=3, renormalise=renormalise).cpu()

    w = {k: v.float() for k, v in given.items()}
    # the weights of experts are decided by logits as the call gets them, rounded
    logits = linear(w["x"], w["router"]).to(BF16).float()
    weight, expert = ops.route(logits=logits, topk=3, renormalise=renormalise)
    routed = ops.experts(
        x=w["x"], expert=expert, weight=weight, gate_up=w["gate_up"], down=w["down"]
    )
    beside = linear(ops.swiglu(linear(w["x"], w["shared_gate_up"])), w["shared_down"])
    want = routed + linear(w["x"], w["shared_gate"]).sigmoid() * beside
    assert relative_rms(got, want) <= SUMS[BF16].relative_rms


@pytest.mark.parametrize("renormalise", [True, False])
def test_mixtures_of_ranks_add_up(renormalise: bool) -> None:
    """Each rank's part of the sum, the shared expert with the first of them."""
    given = mixture_inputs(shared=32)
    how = {"topk": 3, "renormalise": renormalise, "group": "", "size": 1}
    parts = []
    for first, count in ((0, 3), (3, 1), (4, 3)):
        held = {name: given[name][first : first + count] for name in ("gate_up", "down")}
        part = ranks.mixture_held(**device(given | held), first=first, **how)
        parts.append(part.cpu().float())
    want = emit.mixture(**device(given), topk=3, renormalise=renormalise).cpu().float()
    assert relative_rms(sum(parts), want) <= SUMS[BF16].relative_rms
    assert all(relative_rms(part, want) > 0.1 for part in parts)


@pytest.mark.parametrize("int8", [False, True])
def test_experts_of_ranks_add_up(int8: bool) -> None:
    tokens, d, count, ffn = 13, 48, 7, 32
    logits = torch.randn(tokens, count).to(BF16)
    x = torch.randn(tokens, d).to(BF16)
    weights = [torch.randn(count, 2 * ffn, d) * d**-0.5, torch.randn(count, d, ffn) * ffn**-0.5]
    up, down = (quantize_rows(w.to(BF16)) for w in weights)
    given = {"gate_up": weights[0].to(BF16), "down": weights[1].to(BF16)}
    if int8:
        given = {"gate_up": up.weight, "gate_up_scale": up.scale}
        given |= {"down": down.weight, "down_scale": down.scale}
    emitted = w8a8.experts_held if int8 else ranks.experts_held
    parts = []
    for first, own in ((0, 3), (3, 1), (4, 3)):
        held = {name: weight[first : first + own] for name, weight in given.items()}
        told = device({"x": x, "logits": logits} | held)
        parts.append(emitted(**told, topk=3, renormalise=True, first=first).cpu().float())
    weight, expert = ops.route(logits=logits.float(), topk=3, renormalise=True)
    reference = ops.int8_experts if int8 else ops.experts
    want = reference(x=x, expert=expert, weight=weight.to(BF16), **given)
    assert relative_rms(sum(parts), want) <= SUMS[BF16].relative_rms
    assert all(relative_rms(part, want) > 0.1 for part in parts)


# Single primitives as captured steps: one node of the graph a launch, nothing read by the host.


def captured(function: Callable[..., Any], given: dict[str, Any]) -> tuple[Any, list[str], Any]:
    """(results on the host, the tasks of the captured graph, the compiled step)."""
    donate = [name for name in ("state",) if name in given]
    step = qn.jit(function, donate=donate, weights="frequency").trace(**given)
    ready = step.lower(here(), strict=True).compile()
    mine = device(given)
    graph = ready.capture(**mine)
    results = graph(**mine)
    several = isinstance(results, tuple)
    return [r.cpu() for r in (results if several else (results,))], graph.launches(), ready


@pytest.mark.parametrize("name", ["rotary", "attention", "delta_rule", "gumbel"])
def test_a_node_is_a_launch(name: str) -> None:
    for sample in samples(name):
        given = narrowed(sample, "frequency", "g", "state")
        results, tasks, step = captured(alone(name, given), given)
        assert len(tasks) == step.lowered.cost_analysis()["launches"], step.lowered.as_text()
        assert not [task for task in tasks if task.startswith("memcpy")]
        want = PRIMITIVES[name].reference(**given)
        want = want if isinstance(want, tuple) else (want,)
        for got, right in zip(results, want, strict=True):
            close(name, got, right)


def alone(name: str, given: dict[str, Any]) -> Callable[..., Any]:
    """A primitive as a step whose parameters tracing can name."""

    def step(**arguments: Any) -> Any:
        return PRIMITIVES[name].op(**arguments)

    places = [Parameter(argument, Parameter.POSITIONAL_OR_KEYWORD) for argument in given]
    step.__signature__ = Signature(places)  # type: ignore[attr-defined]
    return step


# Whole steps with what a model has by default: float32 recurrent states.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["demo", "apart"])
def test_steps_with_float32_states(name: str, kind: str) -> None:
    given = case(kind, params(name, F32))
    step = compiled(given)
    mine = there(given.arguments)
    graph = step.capture(*mine)
    logits, state = graph(*mine)
    want, want_state = step(*there(given.arguments))
    assert torch.equal(logits.cpu(), want.cpu())
    for (path, got), (_, right) in zip(real_rows(state), real_rows(want_state), strict=True):
        assert torch.equal(got, right), path
    tasks = graph.launches()
    assert len(tasks) == step.lowered.cost_analysis()["launches"]
    assert not [task for task in tasks if task.startswith("memcpy")]


@pytest.mark.parametrize("kind", KINDS)
def test_sites_with_float32_states(kind: str) -> None:
    given = case(kind, params("demo", F32))
    found = examine(given.function, given.arguments, here())
    far = [f for f in found if not f.error <= f.tolerance]
    assert [f for f in far if not (f.rule.startswith("mixture") and near_tie(f))] == []
    rule = "delta_theorem" if kind == "prefill" else "delta_scan"
    assert {rule, "rotary_composed", "mixture_apart"} <= {f.rule for f in found}
