"""The convolutions of packages beside torch_npu: their rules, their contracts, their discovery."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu  # noqa: F401
from torch import Tensor

import qnext as qn
from qnext.errors import LoweringError, TargetError
from qnext.functional.ops import PRIMITIVES, short_conv
from qnext.lowering.npu import custom, probe
from qnext.lowering.softnpu import packages
from qnext.lowering.target import of_device

BF16, I32 = torch.bfloat16, torch.int32
TOLERANCE = PRIMITIVES["short_conv"].tolerance[BF16].relative_rms  # its reason stands there
BATCH, POOL, CHANNELS, TAPS = 6, 9, 48, 4
ROWS = [4, 0, 7, 2, 0, 8]  # two on scratch, the others in no order
LIVE = [0, 2, 3, 5]
OFFSETS = {0: [0] * BATCH, 2: [2, 0, 1, 0, 2, 2], 4: [4, 1, 0, 3, 2, 0]}
TASKS = {"sgl": "causal_conv1d", "vllm": "aclnnCausalConv1d"}
KINDS = pytest.mark.parametrize("kind", ["sgl", "vllm"], indirect=True)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Iterator[custom.Kind]:
    """A package, installed."""
    packages.install(request.param)
    yield request.param
    packages.remove(request.param)


def sample(draft: int) -> dict[str, Tensor]:
    """A call that verifies `draft` tokens; x is columns of a joined projection."""
    joined = torch.randn(BATCH, 1 + draft, 80).to(BF16)
    return {
        "x": joined[..., 16 : 16 + CHANNELS],
        "weight": torch.randn(CHANNELS, TAPS).to(BF16),
        "window": torch.randn(POOL, TAPS - 1 + draft, CHANNELS).to(BF16),
        "rows": torch.tensor(ROWS, dtype=I32),
        "offset": torch.tensor(OFFSETS[draft], dtype=I32),
        "start": torch.ones(BATCH, dtype=I32),
    }


def there(tensor: Tensor) -> Tensor:
    """On the device with the same strides; a plain copy would lose them."""
    if tensor.is_contiguous():
        return tensor.npu()
    whole = torch.as_strided(tensor, (BATCH, tensor.shape[1], 80), tensor.stride(), 0)
    return whole.npu()[..., 16 : 16 + CHANNELS]


def emitted(kind: custom.Kind, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    on = {name: there(tensor) for name, tensor in given.items()}
    y, window = custom.EMITS[kind](**on, moves_by_one=True)
    assert window.data_ptr() == on["window"].data_ptr()  # in place
    return y.cpu(), window.cpu()


def differ(got: Tensor, want: Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@KINDS
@pytest.mark.parametrize("draft", OFFSETS)
def test_rule_is_the_primitive(kind: custom.Kind, draft: int) -> None:
    given = sample(draft)
    assert not there(given["x"]).is_contiguous()
    y, window = emitted(kind, given)
    want, windows = short_conv(**given)
    assert y.shape == want.shape and y.is_contiguous()
    assert differ(y[LIVE], want[LIVE]) <= TOLERANCE
    assert torch.equal(window[1:], windows[1:])  # scratch is nobody's


@KINDS
def test_a_wrong_offset_is_seen(kind: custom.Kind) -> None:
    """The equality above would not hold by accident."""
    given = sample(4)
    want, windows = short_conv(**given)
    y, window = emitted(kind, given | {"offset": given["offset"].roll(1)})
    assert differ(y[LIVE], want[LIVE]) > 10 * TOLERANCE
    assert not torch.equal(window[1:], windows[1:])


def step(
    params: tuple[Tensor, ...], state: tuple[Tensor, ...], x: Tensor, rows: Tensor, offset: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Two layers of nothing but the convolution."""
    windows = []
    start = torch.ones_like(rows)
    for weight, window in zip(params, state, strict=True):
        x, window = short_conv(
            x=x, weight=weight, window=window, rows=rows, offset=offset, start=start
        )
        windows.append(window)
    return x, tuple(windows)


def nodes(graph: Any, path: Path) -> list[str]:
    with warnings.catch_warnings(action="ignore"):
        graph.debug_dump(str(path))
    dump = json.loads(path.read_text())
    return [event["name"] for event in (dump if isinstance(dump, list) else dump["traceEvents"])]


@KINDS
@pytest.mark.parametrize("draft", [0, 2])
def test_one_node_a_layer(kind: custom.Kind, draft: int, tmp_path: Path) -> None:
    """Weights are laid out once, indices cast once a step; replays move the windows on."""
    one, two = sample(draft), sample(draft)
    params = one["weight"], two["weight"]
    state: tuple[Tensor, ...] = (one["window"], two["window"])
    given = one["x"].contiguous(), one["rows"], one["offset"]
    target = of_device(probe.device_name())
    assert target is not None
    traced = qn.jit(step, donate="state").trace(params, state, *given)
    compiled = traced.lower(target.with_facts(custom_conv=kind), strict=True).compile()
    want = step(params, step(params, state, *given)[1], *given)

    on = tuple(tensor.npu() for tensor in params), *(tensor.npu() for tensor in given)
    _, kept = compiled(on[0], tuple(window.npu() for window in state), *on[1:])
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y, kept = compiled(on[0], kept, *on[1:])
    graph.replay()
    assert differ(y.cpu()[LIVE], want[0][LIVE]) <= TOLERANCE
    for got, window in zip(kept, want[1], strict=True):
        # the second layer's windows hold outputs of the first
        assert differ(got.cpu()[1:], window[1:]) <= TOLERANCE
    names = nodes(graph, tmp_path / "dump.json")
    assert names.count(TASKS[kind]) == 2
    # sgl takes rows of int64; the copy is a cast
    once = (["aclnnInplaceCopy"] if kind == "sgl" else []) + (["aclnnAdds"] if draft else [])
    assert sorted(name for name in names if name != TASKS[kind]) == sorted(once)


def call(kind: custom.Kind, **changed: Any) -> Tensor:
    """The operator itself, with something wrong."""
    given = sample(2)
    it: dict[str, Any] = {
        "x": given["x"].contiguous(),
        "weight": given["weight"].t().contiguous(),
        "state": given["window"],
        "rows": given["rows"].long(),
        "accepted": given["offset"] + 1,
        "bias": None,
        "run_mode": 1,
    } | changed
    it = {name: value.npu() if isinstance(value, Tensor) else value for name, value in it.items()}
    if kind == "sgl":
        return torch.ops.npu.causal_conv1d(
            it["x"], it["weight"], it["state"], bias=it["bias"], cache_indices=it["rows"],
            num_accepted_tokens=it["accepted"], activation_mode=1, run_mode=it["run_mode"],
        )  # fmt: skip
    return torch.ops._C_ascend.npu_causal_conv1d_custom(
        torch.empty_like(it["x"]), it["x"], it["weight"], it["state"], it["bias"], None,
        it["rows"], None, it["accepted"], 1, -1, it["run_mode"],
    )  # fmt: skip


def changed(name: str, at: int, value: int) -> dict[str, Tensor]:
    index = torch.tensor({"rows": ROWS, "accepted": [3, 1, 2, 1, 3, 3]}[name])
    index[at] = value
    return {name: index if name == "rows" else index.to(I32)}


@KINDS
@pytest.mark.parametrize(
    "wrong, rule",
    [
        ({"run_mode": 0}, "run_mode must be 1"),
        ({"x": torch.zeros(BATCH, 3, CHANNELS)}, "x must be of torch.bfloat16"),
        ({"x": torch.zeros(18, CHANNELS, dtype=BF16)}, "x must be [batch, seq, dim]"),
        ({"x": torch.zeros(BATCH, 3, 40, dtype=BF16)}, "dim must be a multiple of 16"),
        ({"weight": torch.zeros(CHANNELS, TAPS, dtype=BF16)}, "2..4 taps"),
        ({"weight": torch.zeros(3, CHANNELS, dtype=BF16)}, "num_accepted_tokens needs 4 taps"),
        ({"state": torch.zeros(POOL, 2, CHANNELS, dtype=BF16)}, "must have 3 inputs a row"),
        ({"state": torch.zeros(POOL, 4, CHANNELS, dtype=BF16)}, "5 inputs a row for 3 tokens"),
        ({"state": torch.zeros(POOL, CHANNELS, 5, dtype=BF16).mT}, "conv_states must be cont"),
        ({"rows": torch.tensor(ROWS, dtype=torch.int16)}, "cache_indices must be of"),
        ({"rows": torch.tensor(ROWS[:5])}, "cache_indices must be [6]"),
        ({"accepted": torch.ones(BATCH)}, "num_accepted_tokens must be of"),
        ({"bias": torch.zeros(CHANNELS, dtype=BF16)}, "bias must be absent"),
        (changed("rows", 0, POOL), "cache_indices must be in 0..8"),
        (changed("rows", 0, 7), "cache_indices must be distinct"),
        (changed("accepted", 3, 0), "num_accepted_tokens must be in 1..3"),
        (changed("accepted", 3, 4), "num_accepted_tokens must be in 1..3"),
    ],
)
def test_broken_contracts_are_refused(
    kind: custom.Kind, wrong: dict[str, Any], rule: str, capfd: pytest.CaptureFixture[str]
) -> None:
    call(kind)  # as it stands it is right
    with pytest.raises(RuntimeError, match=TASKS[kind]) as error:
        call(kind, **wrong)
    assert rule in str(error.value) + capfd.readouterr().err


@pytest.mark.parametrize("kind", ["sgl"], indirect=True)
@pytest.mark.parametrize("name", ["x", "weight"])
def test_strides_are_refused(kind: custom.Kind, name: str) -> None:
    shape = {"x": (3, BATCH, CHANNELS), "weight": (CHANNELS, TAPS)}[name]
    strided = torch.zeros(shape, dtype=BF16).npu().transpose(0, 1)
    with pytest.raises(RuntimeError, match=f"{name} must be contiguous"):
        call(kind, **{name: strided})


@pytest.mark.parametrize("kind", ["sgl"], indirect=True)
def test_a_first_call_is_not_captured(kind: custom.Kind) -> None:
    weight, rows = torch.zeros(TAPS, 64, dtype=BF16).npu(), torch.tensor([5, 2, 1]).npu()
    x, state = torch.zeros(3, 1, 64, dtype=BF16).npu(), torch.zeros(7, 3, 64, dtype=BF16).npu()
    graph = torch.npu.NPUGraph()

    def first() -> None:
        torch.ops.npu.causal_conv1d(x, weight, state, cache_indices=rows, run_mode=1)

    with pytest.raises(RuntimeError, match="first call of a shape"), torch.npu.graph(graph):
        first()
    first()
    with torch.npu.graph(torch.npu.NPUGraph()):
        first()


@pytest.mark.parametrize("kind", ["vllm"], indirect=True)
def test_a_window_that_the_call_would_copy(kind: custom.Kind) -> None:
    given = {name: tensor.npu() for name, tensor in sample(0).items()}
    given["window"] = given["window"].mT.contiguous().mT
    with pytest.raises(LoweringError, match="window must be contiguous"):
        custom.conv_vllm(**given, moves_by_one=True)


def test_a_row_at_pad_is_left_out() -> None:
    """Which no rule asks for, as rows of padding are on scratch; its output is nobody's."""
    packages.install("sgl")
    try:
        y = call("sgl", **changed("rows", 2, -1)).cpu()
    finally:
        packages.remove("sgl")
    assert y[2].isnan().all() and not y[[0, 1, 3, 4, 5]].isnan().any()


def conv_row() -> probe.Row:
    return next(row for row in probe.device_facts().rows if row.fact == "custom_conv")


@KINDS
def test_the_probe_runs_it(kind: custom.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    name = custom.PACKAGES[kind].name
    assert probe.device_facts().facts.custom_conv == kind
    assert conv_row() == ("custom_conv", True, f"{name} ran and gave the right result")
    right = packages.OPERATORS[kind].run

    def wrong(*args: Any, **named: Any) -> Tensor:
        return right(*args, **named).mul_(1.25)

    packages.remove(kind)
    assert "is not installed" in conv_row().reason
    monkeypatch.setitem(packages.OPERATORS, kind, packages.OPERATORS[kind]._replace(run=wrong))
    packages.install(kind)
    row = conv_row()
    assert not row.holds and f"{name}: wrong result: off by" in row.reason


def test_an_older_release_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """sgl-kernel-npu before 2026.7.1 had another operator under this name."""
    old = "causal_conv1d(Tensor x, Tensor weight, Tensor conv_states, Tensor query_start_loc) -> ()"
    operator = packages.OPERATORS["sgl"]._replace(schema=old)
    monkeypatch.setitem(packages.OPERATORS, "sgl", operator)
    packages.install("sgl")
    try:
        with pytest.raises(TargetError, match=r"install sgl_kernel_npu 2026\.7\.1 or later"):
            custom.operator("sgl")
        assert not conv_row().holds
    finally:
        packages.remove("sgl")
