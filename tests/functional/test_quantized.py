"""W8A8: integers and scales, exact sums, what is chosen to be int8, and the same model code.

What is bit-equal is compared with numpy, which shares no code with torch. Equalities of whole
models are in float64: in float32 a sum in another order may push an activation over the edge
between two integers, 1/127 of the token's greatest value, and no tolerance says how often.
"""

import re
from collections.abc import Callable
from itertools import combinations
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import qnext as qn
from qnext.functional import ops
from qnext.functional.blocks import project, swiglu_network
from qnext.functional.ops.quant import OVER, RECIPROCAL, TIMES
from qnext.functional.params import Quantized, empty_params, matrices
from qnext.functional.quantize import PUBLIC_CONVERTER, dequantize, quantize, quantize_rows
from qnext.functional.tree import leaves, leaves_with_paths, map_with_paths, same_structure
from tests.samples import ODD, relative_rms
from tests.sequences import BATCH, Result, check_close, model, run, started, step_by_step, words

ROUNDINGS = (TIMES, OVER, RECIPROCAL)
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
EXACT = 1e-9  # float64, whose errors turn no integer over; float32 scales multiply exact sums
rounded = pytest.mark.parametrize("rounding", ROUNDINGS)


@pytest.fixture(scope="module")
def floats() -> qn.Params:
    return model(mtp_num_hidden_layers=1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, seed: int = 0) -> Tensor:
    return (60 * random(*shape, seed=seed)).clamp(-127, 127).to(torch.int8)


# --- tokens ------------------------------------------------------------------------------------


def by_numpy(x: Tensor, rounding: str) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales of tokens as ops/quant.py defines them, in numpy's float32."""
    f, values = np.float32, x.float().numpy()
    peak = np.abs(values).max(-1, keepdims=True)
    zero, peak = peak == 0, np.where(peak == 0, f(1), peak)
    if rounding == TIMES:
        inverse = f(127) / peak
        q, scale = values * inverse, f(1) / inverse
    elif rounding == OVER:
        scale = peak * f(1 / 127)
        q = values / scale
    else:
        scale = peak / f(127)
        q = values * (f(1) / scale)
    return np.rint(q).astype(np.int8), np.where(zero, f(0), scale)[..., 0]


def tokens(count: int = 999) -> Tensor:
    """Tokens of five magnitudes, and tokens of zeros."""
    magnitude = torch.tensor([1.0, 1e-30, 1e30, 3e-5, 0.0, 2e4])
    return random(count, 11) * magnitude.repeat(count)[:count, None]


@rounded
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_tokens_are_rounded_as_defined(rounding: str, dtype: torch.dtype) -> None:
    x = tokens().to(dtype)
    q, scale = ops.quantize_tokens(x=x, rounding=rounding)
    want_q, want_scale = by_numpy(x, rounding)
    assert (q.dtype, scale.dtype) == (torch.int8, F32)
    ulps = np.abs(scale.numpy().view(np.int32) - want_scale.view(np.int32))
    assert np.abs(q.numpy() - want_q).max() == 0 and ulps.max() == 0


@rounded
def test_the_greatest_value_is_127_and_zeros_are_zeros(rounding: str) -> None:
    x = tokens()
    q, scale = ops.quantize_tokens(x=x, rounding=rounding)
    zero = (x == 0).all(-1)
    assert zero.sum() > 100 and not q[zero].any() and not scale[zero].any()
    assert (q[~zero].int().abs().amax(-1) == 127).all() and (scale[~zero] > 0).all()
    # half a step, and float32's own error of an integer up to 127
    error = (q * scale[:, None].double() - x).abs() / scale[:, None]
    assert error[~zero].max() < 0.5 + 1e-4


def test_the_three_roundings_differ() -> None:
    """Values half-way between two integers, for many maxima: each pair disagrees on some row."""
    peak = torch.linspace(1, 2, 3000)[:, None]
    x = torch.cat([peak, peak * ((torch.arange(60) + 0.5) / 127)], dim=1)
    found = [ops.quantize_tokens(x=x, rounding=rounding) for rounding in ROUNDINGS]
    for (q, scale), (other_q, other_scale) in combinations(found, 2):
        assert 0 < int((scale != other_scale).sum()) < len(scale)
        gap = (q.int() - other_q.int()).abs()
        assert gap.max() == 1 and gap.any(-1).sum() < len(gap)


def test_a_rounding_nobody_knows() -> None:
    with pytest.raises(ValueError, match="rounding must be times, over or reciprocal, got 'up'"):
        ops.quantize_tokens(x=random(3, 5), rounding="up")


# --- products ----------------------------------------------------------------------------------


def exact(x: Tensor, weight: Tensor) -> np.ndarray:
    return x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T


@pytest.mark.parametrize("columns", [9, 1024, 1025, 5003])
def test_sums_are_exact(columns: int) -> None:
    """Scales of 1 in float64, so that nothing is rounded after the sum: 127 * 127 * 5003 is odd."""
    ends = torch.tensor([127, -127, -128], dtype=torch.int8)  # others' files may hold -128
    x = torch.cat([integers(4, columns), ends[:2, None].expand(2, columns)])
    weight = torch.cat([integers(13, columns, seed=1), ends[:, None].expand(3, columns)])
    ones = torch.ones(16, dtype=F64)
    y = ops.int8_linear(x=x, x_scale=ones[:6], weight=weight, scale=ones)
    assert y.dtype == F64 and np.array_equal(y.numpy(), exact(x, weight))


def test_a_sum_is_scaled_by_its_token_first() -> None:
    x, weight = integers(2, 3, 2059), integers(13, 2059, seed=1)
    x_scale, scale = random(2, 3, seed=2).abs(), random(13, seed=3).abs()
    y = ops.int8_linear(x=x, x_scale=x_scale, weight=weight, scale=scale).numpy()
    sums, token = exact(x, weight).astype(np.float32), x_scale.numpy()[..., None]
    assert np.array_equal(y, sums * token * scale.numpy())
    assert not np.array_equal(y, sums * scale.numpy() * token)  # it would show


def mixture() -> dict[str, Tensor]:
    """Arguments of int8_experts: 13 tokens, two of five experts each."""
    return next(ops.PRIMITIVES["int8_experts"].samples(torch.Generator().manual_seed(0)))


def expert_by_numpy(row: Tensor, e: int, arguments: dict[str, Tensor]) -> np.ndarray:
    """One expert's result for one token."""
    w = {name: arguments[name][e].numpy() for name in list(arguments)[-4:]}
    q, scale = by_numpy(row, TIMES)
    sums = w["gate_up"].astype(np.int64) @ q.astype(np.int64)
    gate, up = np.split(sums.astype(np.float32) * scale * w["gate_up_scale"], 2)
    q, scale = by_numpy(torch.from_numpy(gate / (1 + np.exp(-gate)) * up), RECIPROCAL)
    sums = w["down"].astype(np.int64) @ q.astype(np.int64)
    return sums.astype(np.float32) * scale * w["down_scale"]


def test_experts_token_by_token() -> None:
    arguments = mixture()
    y = ops.int8_experts(**arguments)
    for token, got in enumerate(y):
        pairs = zip(arguments["expert"][token], arguments["weight"][token], strict=True)
        parts = [float(w) * expert_by_numpy(arguments["x"][token], e, arguments) for e, w in pairs]
        # the primitive's own tolerance: exponentials and sums over experts round in float32
        assert relative_rms(got, torch.from_numpy(sum(parts))) < 5e-6


def test_a_token_is_the_same_whatever_shares_its_batch() -> None:
    arguments = mixture()
    whole = ops.int8_experts(**arguments)
    shuffled = torch.randperm(13, generator=torch.Generator().manual_seed(7))
    for rows in (shuffled, *torch.arange(13).split(1), *shuffled.split(4)):
        some = {name: arguments[name][rows] for name in ("x", "expert", "weight")}
        assert torch.equal(ops.int8_experts(**arguments | some), whole[rows])
    x, weight = arguments["x"], quantize_rows(random(11, 7))
    for row, y in zip(x, project(x, weight), strict=True):
        assert torch.equal(project(row, weight), y)


def test_experts_that_nobody_chose_do_not_matter() -> None:
    arguments = mixture()
    arguments["expert"] += arguments["expert"] >= 2  # nobody chooses expert 2, there are six
    for name in list(arguments)[-4:]:
        values = arguments[name]
        blank = torch.full_like(values[:1], torch.nan if values.is_floating_point() else -128)
        arguments[name] = torch.cat([values[:2], blank, values[2:]])
    assert torch.equal(ops.int8_experts(**arguments), ops.int8_experts(**mixture()))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_between_two_products_only_int8_is_rounded(dtype: torch.dtype) -> None:
    """What float32 makes of the same input, rounded once at the end; an expert does it as well."""
    x = random(29, 40).to(dtype)
    gate_up, down = quantize_rows(random(44, 40)), quantize_rows(random(40, 22))
    want = swiglu_network(x.float(), gate_up, down).to(dtype)
    assert torch.equal(swiglu_network(x, gate_up, down), want)
    one = {"x": x, "expert": torch.zeros(29, 1).long(), "weight": torch.ones(29, 1).to(dtype)}
    one |= {"gate_up": gate_up.weight[None], "gate_up_scale": gate_up.scale[None]}
    one |= {"down": down.weight[None], "down_scale": down.scale[None]}
    assert torch.equal(ops.int8_experts(**one), want)


@rounded
def test_tokens_that_are_integers_lose_nothing(rounding: str) -> None:
    """Their scale is 1, and scales of the weight are powers of 2: float32 does it exactly too."""
    x = integers(2, 5, 40).float()
    x[..., 3] = torch.tensor([127.0, -127.0])[:, None]
    weight = Quantized(integers(13, 40, seed=1), torch.exp2(-torch.arange(13.0)))
    assert torch.equal(project(x, weight, rounding), linear(x, dequantize(weight)))


# --- params ------------------------------------------------------------------------------------

SMALL = {"weight", "fc", "mixer.gate_proj", "ffn.router", "ffn.shared_gate"}  # head[0].weight
SHARED = {"ffn.shared_gate_up", "ffn.shared_down"}
LARGE = SHARED | {"mixer.in_proj", "mixer.out_proj", "ffn.gate_up", "ffn.down"}
KIND = re.compile(r"^.*\](\.layer)?\.")
CHOICES: dict[str, tuple[Any, set[str]]] = {
    "default": (None, LARGE),
    "public": (PUBLIC_CONVERTER, (LARGE | {"mixer.gate_proj"}) - SHARED),
    "all": ([], LARGE | SMALL),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_int8(floats: qn.Params, choice: str) -> None:
    ignore, want = CHOICES[choice]
    params = quantize(floats, ignore=ignore)
    kinds = {(KIND.sub("", path), isinstance(leaf, Quantized)) for path, leaf in matrices(params)}
    assert kinds == {(kind, kind in want) for kind in LARGE | SMALL}
    whole = dict(leaves_with_paths(floats))
    for path, leaf in leaves_with_paths(params):  # all else is as it was: conv, norms, embedding
        assert leaf is whole.get(path) or re.search(r"\.(weight|scale)$", path), path


def test_rows_of_weights(floats: qn.Params) -> None:
    """scale = absmax / 127 to the bit, and no weight is further off than half a step."""
    whole, made = (dict(matrices(p)) for p in (floats, quantize(floats, ignore=[])))
    for path, leaf in made.items():
        want = whole[path].numpy()
        scale = np.abs(want).max(-1) / np.float32(127)
        assert leaf.scale.dtype == F32 and np.array_equal(leaf.scale.numpy(), scale), path
        q = np.rint(want / scale[..., None])
        assert leaf.weight.dtype == torch.int8 and np.array_equal(leaf.weight.numpy(), q), path
        error = np.abs(dequantize(leaf, F64).numpy() - want)
        # float32's error of the quotient, up to 127, may choose the further of two neighbours
        assert (error <= scale[..., None] * (0.5 + 1e-5)).all(), path


def put(path: str, change: Callable[[Tensor], Any]) -> Callable[[qn.Params], qn.Params]:
    """A function that puts `change(leaf)` in the place of a leaf."""
    return lambda p: map_with_paths(lambda at, leaf: change(leaf) if at == path else leaf, p)


@pytest.mark.parametrize("value", [0.0, 1e-44])  # the other is so small that its scale would be 0
@pytest.mark.parametrize("path", [".layers[0].mixer.out_proj", ".layers[1].ffn.down"])
def test_25_channels_of_zeros_are_no_nan(floats: qn.Params, path: str, value: float) -> None:
    """Bug 25: a converter without a guard makes NaN of an all-zero output channel."""
    rows = torch.tensor([3, 17])
    params = quantize(put(path, lambda leaf: leaf.index_fill(-2, rows, value))(floats))
    made = dict(matrices(params))[path]
    assert not made.weight[..., rows, :].any() and (made.scale[..., rows] == 1).all()


def test_specs_and_arguments(floats: qn.Params) -> None:
    """Specs become the specs of the same tree; what was given is not written to."""
    before = [leaf.clone() for leaf in leaves(floats)]
    made = quantize(floats)
    specs = quantize(empty_params(floats.config, "meta"))
    assert same_structure(specs, made) and not same_structure(made, floats)
    for (path, spec), leaf in zip(leaves_with_paths(specs), leaves(made), strict=True):
        assert spec.is_meta and (spec.shape, spec.dtype) == (leaf.shape, leaf.dtype), path
    assert all(map(torch.equal, leaves(floats), before))


B = "model.layers.0.linear_attn.in_proj_b"
REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": (["lm_head", "model.layer.0"], r"lists model\.layer\.0, which matches nothing"),
    "half": ([B], rf"lists {B}, but not all of params\.layers\[0\]\.mixer\.gate_proj, .*proj_ba"),
    "one expert": (["re:.*experts.3.d"], r"3\.down_proj, but not all of params\.layers\[0\]\.ffn"),
    "bad regex": (["lm_head", "re:("], r"ignore has 're:\(', no regular expression"),
    "str": ("lm_head", r"ignore must be a list of names, got a string; write \['lm_head'\]"),
    "half an expert": ([r"re:.*experts\.\d+\.down_proj"], "experts are quantised as a whole"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_ignores_are_refused(floats: qn.Params, name: str) -> None:
    ignore, message = REFUSED[name]
    with pytest.raises(qn.InputError, match=message):
        quantize(floats, ignore=ignore)


def test_what_cannot_be_quantised(floats: qn.Params) -> None:
    with pytest.raises(qn.InputError, match=r"params\.layers\[0\]\.mixer\.in_proj is quantised"):
        quantize(quantize(floats))
    with pytest.raises(qn.InputError, match=r"scheme must be one of \('w8a8',\), got 'w4a16'"):
        quantize(floats, "w4a16")
    for path in (".layers[3].mixer.in_proj", ".layers[1].ffn.down"):
        bad = put(path, lambda leaf: leaf.index_fill(0, torch.tensor(4), torch.nan))(floats)
        message = re.escape(f"params{path}") + r"(\[4\])? has values that are not finite"
        with pytest.raises(qn.InputError, match=message):
            quantize(bad)


SCALE, WEIGHT = ".layers[0].mixer.in_proj.scale", ".layers[0].mixer.in_proj.weight"
BROKEN: dict[str, tuple[Callable[[qn.Params], qn.Params], str]] = {
    "short": (put(SCALE, lambda t: t[:-1]), f"{SCALE} must be [qkvz=228], got [227]"),
    "column": (put(SCALE, lambda t: t[:, None]), f"{SCALE} must be [qkvz=228], got [228, 1]"),
    "dtype": (put(SCALE, lambda t: t.to(BF16)), f"{SCALE} must be torch.float32, got"),
    "float": (put(WEIGHT, lambda t: t.float()), f"{WEIGHT} must be torch.int8, got torch.float32"),
    "embedding": (put(".embed", quantize_rows), ".embed must be a tensor, got Quantized"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_leaves_are_named(floats: qn.Params, name: str) -> None:
    change, message = BROKEN[name]
    params = change(quantize(floats))
    with pytest.raises(qn.InputError, match=re.escape(f"params{message}")):
        qn.forward(params, qn.init_state(params.config, BATCH, 3), words(3))


# --- the same model code -----------------------------------------------------------------------


def logits(params: qn.Params) -> Tensor:
    return qn.forward(params, qn.init_state(params.config, BATCH, 20), words(20))[0].float()


@pytest.mark.parametrize(("name", "dtype"), [*((name, F32) for name in ODD), ("base", BF16)])
def test_odd_models_stay_close(name: str, dtype: torch.dtype) -> None:
    """A product of int8 is off by about 1%, and up to 20 of them follow each other.

    The median token, because few are off by much more: where another expert is chosen, or where a
    delta net's first sums are small and its norm blows them up. bfloat16 itself is off by less, and
    scales of the rows beside would show.
    """
    floats = model(dtype, **ODD[name])
    int8, want = quantize(floats), logits(floats)
    moved = map_with_paths(lambda at, t: t.roll(1, -1) if ".scale" in at else t, int8)
    errors = [(logits(p) - want).square().mean(-1) / want.square().mean(-1) for p in (int8, moved)]
    close, far = (error.median().sqrt() for error in errors)
    assert 1e-3 < close < 0.1 and far > 0.3


def test_each_place_has_its_rounding(floats: qn.Params) -> None:
    """By the width of what is rounded: d, heads of attention, of a delta net, the shared expert."""
    with mock.patch.object(ops, "quantize_tokens", wraps=ops.quantize_tokens) as called:
        logits(quantize(floats))
    seen = {(call.kwargs["x"].shape[-1], call.kwargs["rounding"]) for call in called.mock_calls}
    assert seen == {(40, TIMES), (96, TIMES), (84, OVER), (22, RECIPROCAL)}


@pytest.fixture(scope="module", params=[None, []], ids=["default", "all"])
def precise(request: pytest.FixtureRequest) -> qn.Params:
    """int8 matrices in a float64 model."""
    params = model(F64, F64)
    config = params.config.with_precision(router=F64, logits=F64)
    return quantize(params._replace(config=config), ignore=request.param)


def test_decode_goes_on_where_forward_stopped(precise: qn.Params) -> None:
    state, line = started(precise), words(13, seed=8)
    want = run(precise, state, line, [13] * BATCH)
    check_close(step_by_step(precise, state, line), want, EXACT)


def test_rows_do_not_meet(precise: qn.Params) -> None:
    """Ragged rows of which one rests: each as it is alone, whatever padding holds."""
    state, line, lengths = started(precise), words(13, seed=8), [9, 0, 13, 1, 6]
    padded = line.where(torch.arange(13) < torch.tensor(lengths)[:, None], -1)
    whole = run(precise, state, padded, lengths)
    for row in (0, 2, 3, 4):
        mine, count = qn.select(state, [row]), lengths[row]
        alone = run(precise, mine, line[row : row + 1, :count], [count])
        check_close(Result([whole.logits[row]], [whole.memory[row]]), alone, EXACT)


@pytest.mark.slow
def test_speculation_changes_nothing() -> None:
    """Greedy, float32; no draw of this text feels the order of sums. Most guesses are right."""
    params = quantize(qn.demo(F32))
    prompt = torch.tensor([qn.tokenizer().encode("Question: Tom has 9 pens.\nAnswer:")])
    plain, roomy = (qn.init_state(params.config, 1, 99, draft=draft) for draft in (0, 1))
    want, _ = qn.generate(params, plain, prompt, 40)
    steps = [new for new, _ in qn.stream(params, roomy, prompt, 40, draft=1)]
    got = torch.cat(steps, dim=1)
    assert torch.equal(got[got >= 0], want[0]) and 20 < len(steps) < 30
