"""Gradients: whole, finite, transformers' own, and the same however the tokens are split."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import qnext as qn
from qnext.functional.layout import layout
from qnext.functional.ops.delta_rule import delta_chunked, delta_scan
from qnext.functional.state import KV, Delta
from qnext.functional.tree import leaves, leaves_with_paths, map_leaves
from tests.samples import relative_rms

CLOSE = 5e-4  # float32: sums over tokens cancel; against float64 either side is off by up to 2e-4
EXACT = 1e-9  # float64, sums in another order
STEP, SLOPE = 1e-5, 1e-6  # float64 central differences: off by STEP^2 and by rounding / STEP
MODELS = ("dense_layers", "tied", "wide_values")
BATCH, VOCAB = 5, 211  # no axis of MODELS has size 5


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def params(checkpoints: Any, name: str) -> qn.Params:
    return map_leaves(lambda x: x.clone().requires_grad_(), checkpoints(name)[2])


@pytest.fixture
def exact(checkpoints: Any, name: str) -> qn.Params:
    """The params in float64."""
    kinds = dict.fromkeys(["compute", "state", "router", "logits"], torch.float64)
    params = map_leaves(lambda x: x.double().requires_grad_(), checkpoints(name)[2])
    return params._replace(config=params.config.with_precision(**kinds))


def words(seq: int, seed: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, seq), generator=torch.Generator().manual_seed(seed))


def surprise(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, -2), targets.flatten())


def gradient(loss: Tensor, params: qn.Params) -> dict[str, Tensor]:
    paths, flat = zip(*leaves_with_paths(params), strict=True)
    return dict(zip(paths, torch.autograd.grad(loss, flat), strict=True))


def empty(params: qn.Params, capacity: int = 140) -> qn.State:
    return qn.init_state(params.config, BATCH, capacity)


def check_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = CLOSE) -> None:
    assert got.keys() == want.keys()
    far = {path: relative_rms(got[path], want[path]) for path in want}
    assert {path: error for path, error in far.items() if not error < tolerance} == {}


@pytest.mark.parametrize("seq", [13, 67], ids=["scan", "chunks"])
@pytest.mark.parametrize("call", [qn.forward, qn.prefill], ids=["forward", "prefill"])
def test_every_leaf_has_a_gradient(params: qn.Params, call: Callable[..., Any], seq: int) -> None:
    logits, _ = call(params, empty(params), words(seq))
    targets = words(seq, seed=4) if logits.ndim == 3 else words(1, seed=4)
    found = gradient(surprise(logits, targets), params)
    assert [path for path, g in found.items() if not g.isfinite().all() or not g.any()] == []
    assert sum(path.endswith(".router") for path in found) == sum(params.config.is_moe) > 0


def test_transformers_has_the_same(checkpoints: Any, name: str, params: qn.Params) -> None:
    model, tokens, targets = checkpoints(name)[0], words(67), words(67, seed=4)
    logits, _ = qn.forward(params, empty(params), tokens)
    ours = gradient(surprise(logits, targets), params)
    theirs = dict(model.named_parameters())
    loss = surprise(model(tokens, use_cache=False).logits, targets)
    theirs = dict(zip(theirs, torch.autograd.grad(loss, list(theirs.values())), strict=True))
    got = {}
    for entry in layout(params.config):
        ways = [way for way in entry.ways if all(piece.name in theirs for piece in way)]
        got |= {piece.name: piece.written_from(ours[entry.path]) for piece in ways[0]}
    check_close(got, theirs)


@pytest.mark.parametrize("split", [[30, 37], [64, 2, 1], [1, 66]], ids=str)
def test_through_chunks(exact: qn.Params, split: list[int]) -> None:
    """The state carries gradients from a later chunk to an earlier one."""
    tokens, targets = words(67), words(67, seed=4)
    logits, _ = qn.forward(exact, empty(exact), tokens)
    want = gradient(surprise(logits, targets), exact)
    state, parts = empty(exact), []
    for chunk in tokens.split(split, dim=1):
        logits, state = qn.forward(exact, state, chunk)
        parts.append(logits)
    check_close(gradient(surprise(torch.cat(parts, 1), targets), exact), want, EXACT)


@pytest.mark.parametrize("lengths", [[13, 0, 1, 5, 9], [67, 0, 64, 1, 19]], ids=["short", "long"])
def test_padding_adds_nothing(exact: qn.Params, lengths: list[int]) -> None:
    """A ragged batch, an empty row in it: the sum of its rows' own gradients."""
    tokens, targets = words(max(lengths)), words(max(lengths), seed=4)
    logits, _ = qn.forward(exact, empty(exact), tokens, torch.tensor(lengths))
    losses = [surprise(logits[i, :n], targets[i, :n]) for i, n in enumerate(lengths) if n]
    got = gradient(torch.stack(losses).sum(), exact)
    alone = []
    for row, count in enumerate(lengths):
        if count:
            state = qn.init_state(exact.config, 1, count)
            logits, _ = qn.forward(exact, state, tokens[row : row + 1, :count])
            alone.append(surprise(logits[0], targets[row, :count]))
    check_close(got, gradient(torch.stack(alone).sum(), exact), EXACT)


def test_unwritten_pages_reach_no_gradient(exact: qn.Params) -> None:
    """NaN where nothing was written yet, an empty row before it: as if there were zeros."""
    fresh, lengths = empty(exact), torch.tensor([13, 0, 1, 5, 9])
    unwritten = [
        KV(*(torch.full_like(pool, torch.nan) for pool in p)) if isinstance(p, KV) else p
        for p in fresh.layers
    ]
    found = []
    for state in (fresh._replace(layers=tuple(unwritten)), fresh):
        logits, _ = qn.forward(exact, state, words(13), lengths)
        valid = torch.arange(13) < lengths[:, None]
        found.append(gradient(surprise(logits[valid], words(13, seed=4)[valid]), exact))
    check_close(*found, EXACT)


@pytest.mark.parametrize("seq", [9, 21], ids=["scan", "chunks"])
def test_initial_recurrent_state(exact: qn.Params, seq: int) -> None:
    """Along a random direction: the slope that central differences find."""
    state, generator = empty(exact), torch.Generator().manual_seed(8)
    pools = [p.recurrent for p in state.layers if isinstance(p, Delta)]
    start, way = ([torch.randn(p.shape, generator=generator).double() for p in pools] for _ in "ab")

    def loss(recurrent: list[Tensor]) -> Tensor:
        fresh = iter(recurrent)
        layers = [
            p._replace(recurrent=next(fresh)) if isinstance(p, Delta) else p for p in state.layers
        ]
        logits, _ = qn.forward(exact, state._replace(layers=tuple(layers)), words(seq))
        return surprise(logits, words(seq, seed=4))

    start = [pool.requires_grad_() for pool in start]
    found = torch.autograd.grad(loss(start), start)
    assert all(g[1:].any() and not g[0].any() for g in found)  # nobody reads the scratch slot
    with torch.no_grad():
        up, down = (
            loss([p + sign * STEP * w for p, w in zip(start, way, strict=True)]) for sign in (1, -1)
        )
    slope = sum((g * w).sum() for g, w in zip(found, way, strict=True))
    size = sum(g.square().sum() for g in found).sqrt()  # of a typical slope
    assert abs((up - down) / (2 * STEP) - slope) < SLOPE * size


def test_functional_grad_of_params(exact: qn.Params) -> None:
    def loss(params: qn.Params) -> Tensor:
        logits, _ = qn.forward(params, state, words(21))
        return surprise(logits, words(21, seed=4))

    state = empty(exact)
    found = torch.func.grad(loss)(exact)
    assert isinstance(found, qn.Params) and found.config == exact.config
    check_close(dict(leaves_with_paths(found)), gradient(loss(exact), exact), EXACT)


def test_functional_grad_through_the_state(exact: qn.Params) -> None:
    """torch.func.grad where the state depends on what is differentiated: two calls."""

    def loss(params: qn.Params) -> Tensor:
        _, state = qn.prefill(params, empty(params), words(20))
        logits, _ = qn.decode(params, state, words(21)[:, 20])
        return surprise(logits, words(1, seed=4))

    found = torch.func.grad(loss)(exact)
    check_close(dict(leaves_with_paths(found)), gradient(loss(exact), exact), EXACT)


DECAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda u: 0 * u,
    "mild": lambda u: -u,
    "strong": lambda u: -50 * u,
    "all_at_once": lambda u: 0 * u - 50,
    "now_and_then": lambda u: -50 * (u > 0.9) - 1e-3 * u,
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("seq", [7, 64, 71])
def test_chunked_delta_rule_against_its_scan(seq: int, decay: str) -> None:
    """In float64, of outputs and last state, with respect to all six arguments."""
    g = torch.Generator().manual_seed(seq)
    q, k = (torch.randn(4, seq, 3, 5, generator=g).double() for _ in "qk")
    arguments = [
        q,
        k / k.norm(dim=-1, keepdim=True),
        torch.randn(4, seq, 6, 11, generator=g).double(),
        DECAYS[decay](torch.rand(4, seq, 6, generator=g).double()),
        torch.rand(4, seq, 6, generator=g).double(),
        torch.randn(4, 6, 11, 5, generator=g).double(),
    ]
    arguments = [x.requires_grad_() for x in arguments]
    weight = torch.randn(4, seq, 6, 11, generator=g).double()
    toward = torch.randn(4, 6, 11, 5, generator=g).double()

    def pull(out: Tensor, last: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((out * weight).sum() + (last * toward).sum(), arguments))

    out, states = delta_scan(*arguments)
    want = pull(out, states[:, -1])
    got = pull(*delta_chunked(*arguments))
    for name, a, b in zip(("q", "k", "v", "g", "beta", "state"), got, want, strict=True):
        assert b.any() and relative_rms(a, b) < EXACT, name


def test_nothing_is_differentiated_by_accident(checkpoints: Any, name: str) -> None:
    """Loaded params ask for no gradient, and generate records none even of those that do."""
    loaded = checkpoints(name)[2]
    assert not any(leaf.requires_grad for leaf in leaves(loaded))
    params = map_leaves(lambda x: x.clone().requires_grad_(), loaded)
    _, state = qn.generate(params, empty(params), words(5), 3)
    assert not any(leaf.requires_grad for leaf in leaves(state))
