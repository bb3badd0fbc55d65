"""Compositions of plain operations: which sites they take, what they launch, what they compute."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.ops import PRIMITIVES
from qnext.functional.ops.delta_rule import delta_scan
from qnext.lowering.graph import primitive_of, sites
from qnext.lowering.npu import composed, composed_delta
from qnext.lowering.stages import Lowered
from qnext.lowering.target import resolve
from tests.lowering.test_npu_rules import BF16, SMALL, lowered
from tests.samples import relative_rms

F32 = torch.float32
FLOAT32 = {"precision": {"compute": F32}}
WIDE_STATE = {"precision": {"state": F32}}
PREFILL = {"function": qn.prefill, "seq": 70}
VERIFY = {"function": qn.verify, "seq": 3, "draft": 2}
SHARED = {"shared_expert_intermediate_size": 56}
FEW_PAGES = resolve("npu:910b", attention_page_max=64)


def launches(step: Lowered, rule: str, layer: str = "") -> int:
    """The launches of what a rule made, of one layer or of all."""
    made = {node.name for node, verdict in step.verdicts.items() if verdict.rule == rule}
    rows = step.cost_analysis()["by_site"]  # constants are not among them
    return sum(r["launches"] for r in rows if r["node"] in made and r["part"].startswith(layer))


def draw(seed: Tensor, position: Tensor) -> Tensor:
    return qn.functional.ops.gumbel(seed=seed, position=position, vocab=211)


# Which sites they take.


@pytest.mark.parametrize(
    ("rule", "takes", "reason"),
    [
        ("rotary_composed", {"head_dim": 40}, "rotary: 10 of 40 channels turn"),
        ("attention_composed", {"head_dim": 40}, "attention: heads of 40"),
        ("attention_composed", {"target": FEW_PAGES}, "attention: pages of 128"),
        ("delta_scan", WIDE_STATE, "delta_step: state is float32, the call wants bfloat16"),
        ("delta_scan", WIDE_STATE | VERIFY, "delta_step: state is float32"),
        ("delta_scan", {"function": qn.verify, "seq": 9, "draft": 8}, "delta_step: 9 tokens a row"),
        ("delta_theorem", PREFILL, "delta_step: 70 tokens a row, the call takes 8"),
        ("delta_theorem", PREFILL, "delta_chunks: this CANN's chunk call is not known to be right"),
        ("delta_theorem", WIDE_STATE | PREFILL, "delta_scan: 70 tokens a row, one by one up to 8"),
        ("mixture_apart", SHARED, "mixture: the shared expert's width is 56, the others' 64"),
    ],
)
def test_it_takes_what_a_call_declines_and_says_why(
    rule: str, takes: dict[str, Any], reason: str
) -> None:
    step = lowered(**takes)
    line = next(line for line in step.report().splitlines() if f": {rule}" in line)
    assert reason in line
    assert step.as_text().count(reason) == 1  # at the first of its sites


@pytest.mark.parametrize(
    ("rule", "leaves", "reason"),
    [
        ("rotary_composed", FLOAT32, "query is float32, the call wants bfloat16"),
        ("attention_composed", FLOAT32, "query is float32, the call wants bfloat16"),
        ("delta_scan", FLOAT32, "value is float32, the call wants bfloat16"),
        ("delta_scan", {"function": qn.verify, "seq": 17, "draft": 16}, "17 tokens a row, one by"),
        ("delta_theorem", FLOAT32 | PREFILL, "value is float32, the call wants bfloat16"),
        ("delta_theorem", {"function": qn.verify, "seq": 17, "draft": 16}, "it keeps the last st"),
        ("mixture_apart", SHARED | FLOAT32, "x is float32, the call wants bfloat16"),
        (
            "mixture_apart",
            SHARED | {"target": resolve("npu:910b", grouped_experts=6)},
            "7 experts, the call takes 6",
        ),
        (
            "mixture_apart",
            SHARED | {"target": resolve("npu:910b", routing_top_k=2)},
            "top 3, the call takes 2",
        ),
    ],
)
def test_it_declines_what_it_cannot(rule: str, leaves: dict[str, Any], reason: str) -> None:
    step = lowered(**leaves)
    assert f"{rule}: {reason}" in step.report()
    assert not any(verdict.rule == rule for verdict in step.verdicts.values())


def test_fused_calls_come_first() -> None:
    for more in ({}, VERIFY):
        fired = {verdict.rule for verdict in lowered(**more).verdicts.values()}
        assert {"rotary", "attention", "delta_step", "mixture"} <= fired
        assert not fired & {"rotary_composed", "attention_composed", "delta_scan", "mixture_apart"}


@pytest.mark.parametrize("state", [F32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["decode", "verify", "prefill"])
@pytest.mark.parametrize(
    "target", ["npu:910b", "npu:950", pytest.param("npu:a3", marks=pytest.mark.slow)]
)
def test_the_demo_model_is_lowered_whole(kind: str, state: torch.dtype, target: str) -> None:
    config = qn.demo().config.with_precision(compute=BF16, state=state)
    function, seq, draft = {
        "decode": (qn.decode, None, 0),
        "verify": (qn.verify, 3, 2),
        "prefill": (qn.prefill, 70, 0),
    }[kind]
    traced = qn.jit(function, donate="state").trace(*qn.specs(config, 5, 300, seq=seq, draft=draft))
    step = traced.lower(target, strict=True)
    assert not any(primitive_of(node) for node in sites(step.graph.graph))
    assert all(write.verdict == "in place" for write in step.writes)


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("head_dim", "shared")), "both"]
)
def test_odd_models_are_lowered_whole(name: str) -> None:
    changes = {"head_dim": {"head_dim": 40}, "shared": SHARED, "both": {"head_dim": 40} | SHARED}
    config = qn.Config.from_hf(SMALL | changes[name]).with_precision(compute=BF16)
    for function, seq in ((qn.decode, None), (qn.prefill, 70)):
        qn.jit(function).trace(*qn.specs(config, 3, 300, seq=seq)).lower("npu:a3", strict=True)


# What they launch.


@pytest.mark.slow  # six models of 8 layers; the software Ascend counts the same launches
def test_launches() -> None:
    """Of a layer behind the first, which also carry what a step computes once."""

    def deep(**more: Any) -> Lowered:
        return lowered(num_hidden_layers=8, **more)

    odd = deep(**SHARED, **WIDE_STATE, head_dim=40)
    assert launches(odd, "delta_scan", ".layers[5]") == 8 + 4
    assert launches(odd, "rotary_composed", ".layers[7]") == 5
    assert launches(odd, "rotary_composed") == 2 * 5 + 4
    assert launches(odd, "attention_composed", ".layers[7]") == 11
    assert launches(odd, "attention_composed") == 2 * 11 + 2
    assert launches(odd, "mixture_apart") == 8 * 11  # 12 with the norm before, of 13 allowed
    assert launches(deep(**VERIFY, **WIDE_STATE), "delta_scan", ".layers[5]") == 8 + 3 * 4 + 1
    nine = deep(function=qn.verify, seq=9, draft=8)
    assert launches(nine, "delta_scan", ".layers[5]") == 8 + 9 * 4 + 1 + 2  # a bf16 state is cast
    filled = deep(**PREFILL, **WIDE_STATE, head_dim=40)  # two chunks of 35
    assert launches(filled, "delta_theorem", ".layers[5]") == 38 + 2 + 1
    assert launches(filled, "attention_composed", ".layers[7]") == 11 + 1
    ragged = deep(function=qn.prefill, seq=71)  # two of 36, and a bf16 state
    assert launches(ragged, "delta_theorem", ".layers[5]") == 38 + 2 + 1 + 2 + 5
    one = deep(**WIDE_STATE, function=qn.prefill, seq=64)
    assert launches(one, "delta_theorem", ".layers[5]") == 38 + 1


def test_padding_costs_attention_a_launch_and_a_mask() -> None:
    config = qn.Config.from_hf(SMALL | {"head_dim": 40}).with_precision(compute=BF16)
    lengths = torch.empty(3, dtype=torch.int64, device="meta")
    specs = (*qn.specs(config, 3, 300, seq=70), lengths)
    step = qn.jit(qn.prefill).trace(*specs).lower("npu:910b")
    assert launches(step, "attention_composed") == 11 + 1 + 1 + 2 + 1


def test_noise_launches() -> None:
    step = qn.jit(draw).trace(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int32))
    step = step.lower("npu:910b", strict=True)
    assert step.cost_analysis()["launches"] == launches(step, "gumbel_composed") == 67


def test_products_that_add_are_counted() -> None:
    def step(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.baddbmm(x, a, b, alpha=-1)

    given = (torch.zeros(5, 3, 7), torch.zeros(5, 3, 11), torch.zeros(5, 11, 7))
    cost = qn.jit(step).trace(*given).lower().cost_analysis()
    assert cost["flops"] == 2 * 5 * 3 * 11 * 7


# What they compute: the emitted functions themselves, on the host.


def samples(name: str) -> Iterator[dict[str, Any]]:
    return PRIMITIVES[name].samples(torch.Generator().manual_seed(0))


def narrowed(arguments: dict[str, Any], *but: str) -> dict[str, Any]:
    """The arguments in bfloat16, but for what a model keeps in float32."""
    return {
        k: v.to(BF16) if isinstance(v, Tensor) and v.is_floating_point() and k not in but else v
        for k, v in arguments.items()
    }


def close(name: str, got: Tensor, want: Tensor) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert relative_rms(got, want) <= PRIMITIVES[name].tolerance[want.dtype].relative_rms


@pytest.mark.parametrize("factor", [1.0, 1.25])
@pytest.mark.parametrize("pairs", [4, 7])
def test_rotary(pairs: int, factor: float) -> None:
    for sample in samples("rotary"):  # heads of 14 channels
        sample |= {"factor": factor, "frequency": torch.rand(pairs)}
        given = narrowed(sample, "frequency")
        want = PRIMITIVES["rotary"].reference(**given)
        for got, right in zip(composed.rotary(**given), want, strict=True):
            assert torch.equal(got, right)  # the same float32 sums of two terms, rounded once


def forget_unused(given: dict[str, Any]) -> None:
    """NaN wherever the pools hold nothing of a context."""
    page = given["key_pool"].shape[1]
    used = torch.zeros(given["key_pool"].shape[:2], dtype=torch.bool)
    for pages, length in zip(given["block_table"], given["context"], strict=True):
        for place in range(int(length)):
            used[pages[place // page], place % page] = True
    for pool in ("key_pool", "value_pool"):
        given[pool][~used] = torch.nan


@pytest.mark.parametrize("context", [[7, 5, 4], [7, 0, 4], [3, 1, 2]])
@pytest.mark.parametrize("queries", [5, 1])
def test_attention(context: list[int], queries: int) -> None:
    """Padded queries and rows without context give 0, and NaN beyond contexts stays there."""
    for sample in samples("attention"):
        given = narrowed(sample | {"context": torch.tensor(context)})
        given |= {name: given[name][:, :queries] for name in ("query", "position")}
        forget_unused(given)
        want = PRIMITIVES["attention"].reference(**given)
        got = composed.attention(**given, padded=True)
        assert got.isfinite().all()
        close("attention", got, want)
        assert torch.equal(got == 0, want == 0)


def test_attention_without_padding_is_the_same_where_there_is_none() -> None:
    for sample in samples("attention"):
        given = narrowed(sample | {"context": sample["position"][:, -1] + 1})
        got = composed.attention(**given, padded=False)
        assert torch.equal(got, composed.attention(**given, padded=True))


Rule = Callable[..., tuple[Tensor, Tensor]]


def run(rule: Rule, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The rule on a copy of the pool, as calls write in place."""
    return rule(**given | {"state": given["state"].clone()})


def close_pools(got: Tensor, want: Tensor, given: dict[str, Any]) -> None:
    """Written slots within the tolerance, the others to the bit; slot 0 may hold anything."""
    written = given["slots"].flatten().long()
    others = [slot for slot in range(1, got.shape[0]) if slot not in written]
    assert torch.equal(got[others], given["state"][others])
    written = written[written != 0]
    close("delta_rule", got[written], want[written])


@pytest.mark.parametrize("state", [F32, BF16], ids=str)
def test_delta_rules(state: torch.dtype) -> None:
    for sample in samples("delta_rule"):
        given = narrowed(sample, "g", "state")
        given["state"] = given["state"].to(state)
        want, pool = PRIMITIVES["delta_rule"].reference(**given)
        rules: list[Rule] = [composed_delta.delta_scan]
        if given["slots"].shape[1] == 1:
            rules.append(composed_delta.delta_theorem)
        for rule in rules:
            out, after = run(rule, given)
            close("delta_rule", out, want)
            close_pools(after, pool, given)


def rule_inputs(seq: int, decay: float, batch: int = 4, hk: int = 3, hv: int = 6) -> dict[str, Any]:
    """Float32 inputs of the rule with keys of cosine 0.5 and some decays far below others."""
    dk, dv = 7, 11
    g = torch.Generator().manual_seed(seq)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    key = drawn(batch, seq, hk, dk) + dk**0.5 * drawn(batch, 1, hk, dk).sign()
    logs = -decay * torch.rand(batch, seq, hv, generator=g)
    logs[:, ::13] *= 40
    return {
        "query": drawn(batch, seq, hk, dk),
        "key": key / key.norm(dim=-1, keepdim=True),
        "value": drawn(batch, seq, hv, dv),
        "g": logs,
        "beta": 0.9 + 0.1 * torch.rand(batch, seq, hv, generator=g),
        "state": drawn(13, hv, dv, dk),
        "slots": torch.tensor([[5], [0], [12], [0]]),  # two rows of padding share scratch
        "scale": dk**-0.5,
    }


@pytest.mark.parametrize("decay", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("seq", [1, 2, 9, 33, 64, 65, 70, 128, 150])
def test_theorem_and_scan_are_the_definition(seq: int, decay: float) -> None:
    given = rule_inputs(seq, decay)
    wide = [given[name].double() for name in ("query", "key", "value", "g", "beta")]
    start = given["state"][given["slots"][:, 0]].double()
    want, last = delta_scan(wide[0] * given["scale"], *wide[1:], start, each=False)
    rows = [0, 2]
    for rule in (composed_delta.delta_theorem, *([composed_delta.delta_scan] if seq < 17 else [])):
        out, pool = run(rule, given)
        close("delta_rule", out[rows], want[rows].float())
        slots = given["slots"][rows, 0]
        close("delta_rule", pool[slots], last[rows].float())
        assert out.isfinite().all()


def test_a_decay_of_everything_is_no_nan() -> None:
    given = rule_inputs(70, 1.0)
    given["g"][:, 33] = -torch.inf
    out, pool = run(composed_delta.delta_theorem, given)
    want, after = PRIMITIVES["delta_rule"].reference(**given)
    assert out.isfinite().all()
    close("delta_rule", out[[0, 2]], want[[0, 2]])
    close_pools(pool, after, given)


@pytest.mark.parametrize("size", [1, 2, 3, 35, 64])
def test_unit_inverse(size: int) -> None:
    """Of keys that are all one key and writes at full strength, the hardest there are."""
    lower = torch.ones(5, size, size).tril(-1) * 0.99
    got = composed_delta.unit_inverse(lower)
    want = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + lower.double())
    assert relative_rms(got, want) < 1e-6  # a few roundings of 2^-24
    assert torch.equal(got.triu(), torch.eye(size).expand(5, -1, -1))


def test_noise_is_the_reference_s_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (7,), generator=generator)
    position = torch.randint(0, 262_144, (7,), generator=generator)
    for place in (position, position.int()):
        got = composed.gumbel(seed=seed, position=place, vocab=50_021)
        want = PRIMITIVES["gumbel"].reference(seed=seed, position=place, vocab=50_021)
        assert torch.equal(got, want)
    for sample in samples("gumbel"):
        assert torch.equal(composed.gumbel(**sample), PRIMITIVES["gumbel"].reference(**sample))
