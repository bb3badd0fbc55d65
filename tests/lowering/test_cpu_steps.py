"""Whole steps on the cpu target: every function of a model, donation, threads, generation.

Where the reference is what to compare with, it runs in the same dtype on the same arguments; what
a step leaves in place 0 of a pool is scratch, and everything else must agree.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional import ops
from qnext.functional.quantize import quantize
from qnext.functional.tree import is_fake, leaves, leaves_with_paths, map_leaves, rebuild
from qnext.lowering.compiled import Compiled
from qnext.lowering.cpu import build
from qnext.lowering.cpu.program import Step
from tests.lowering.test_cpu_kernels import threads
from tests.samples import ODD, relative_rms
from tests.sequences import BATCH, CLOSE, HARSH, model, started, words

needs_a_compiler = pytest.mark.skipif(
    build.compiler_here() is None, reason="no compiler for the kernels"
)
pytestmark = needs_a_compiler
BF16, F32 = torch.bfloat16, torch.float32
DRAFT = 2


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory between kernels, and that of results, holds NaN or -1 until a kernel writes it."""

    def filled(fresh: Any, *args: Any, **kwargs: Any) -> Tensor:
        made = fresh(*args, **kwargs)
        if not is_fake(made):
            made.untyped_storage().fill_(0xFF)
        return made

    monkeypatch.setattr(torch, "empty", partial(filled, torch.empty))
    monkeypatch.setattr(torch, "empty_strided", partial(filled, torch.empty_strided))


@pytest.fixture(autouse=True)
def poisoned_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def compiled(function: Callable[..., Any], *given: Any, **how: Any) -> Compiled:
    """A step for such arguments, no primitive of which is left on the reference."""
    traced = qn.jit(function, **how).trace(*given)
    return traced.lower("cpu", strict=True).compile()


def programs(step: Compiled) -> list[Step]:
    return [call.target for call in step.parts.graph.calls if isinstance(call.target, Step)]


def errors(got: Any, want: Any) -> dict[str, float]:
    """How far each leaf is off, places 0 of pools aside; integers must be equal."""
    found = {}
    for (path, a), (other, b) in zip(leaves_with_paths(got), leaves_with_paths(want), strict=True):
        assert (path, a.shape, a.dtype) == (other, b.shape, b.dtype)
        if ".layers[" in path or ".mtp[" in path:
            a, b = a[1:], b[1:]
        if not a.is_floating_point() or not b.any():
            assert torch.equal(a, b), path
        else:
            found[path] = relative_rms(a, b)
    return found


def check_close(got: Any, want: Any, tolerance: float = CLOSE) -> None:
    off = {path: error for path, error in errors(got, want).items() if not error < tolerance}
    assert not off


def last(params: qn.Params) -> tuple[qn.Params, qn.State, Tensor]:
    """Arguments of a decode step: rows that have consumed 31, 127, 0, 130 and 2 tokens."""
    return params, started(params), words(1)[:, 0]


@cache
def base() -> qn.Params:
    return model(mtp_num_hidden_layers=1)


def committed(
    params: qn.Params, state: qn.State, tokens: Tensor, accepted: Tensor
) -> tuple[Tensor, qn.State]:
    """verify and commit in one step."""
    logits, pending = qn.verify(params, state, tokens)
    return logits, qn.commit(pending, accepted)


# the rest of the odd models differ in what kernels and programs do not see, and take a second each
SEEN = ("base", "gqa4", "dense_layers", "tied", "interval2", "conv2", "yarn")


@pytest.mark.parametrize(
    "name", [name if name in SEEN else pytest.param(name, marks=pytest.mark.slow) for name in ODD]
)
def test_a_decode_step_of_every_odd_model(name: str) -> None:
    """One program, and the reference's logits and states: sums in another order are all."""
    given = last(model(**ODD[name]))
    step = compiled(qn.decode, *given)
    assert len(programs(step)) == 1
    check_close(step(*given), qn.decode(*given))


LENGTHS, LONG = torch.tensor([6, 1, 3, 2, 5]), torch.tensor([70, 1, 33, 64, 65])
HIDDEN = torch.randn(BATCH, 6, 40, generator=torch.Generator().manual_seed(4))
# of each: the function, drafts its state has room for, more arguments
STEPS: dict[str, tuple[Callable[..., Any], int, tuple[Any, ...]]] = {
    "prefill": (qn.prefill, 0, (words(6), LENGTHS)),
    "prefill 70": (qn.prefill, 0, (words(70), LONG)),
    "forward": (qn.forward, 0, (words(6), LENGTHS - 1)),
    "verify": (committed, DRAFT, (words(3), torch.tensor([3, 1, 2, 0, 3]))),
    "draft": (qn.draft, DRAFT, (words(1)[:, 0], DRAFT)),
    "accept": (qn.accept, DRAFT, (words(1)[:, 0], words(DRAFT, seed=9))),
    "speculate": (qn.speculate, DRAFT, (words(1)[:, 0], DRAFT)),
    "mtp": (qn.mtp, 0, (HIDDEN, words(6), LENGTHS - 1)),
}


def valid(result: Any, lengths: Tensor) -> Any:
    """A result with zeros where rows have no tokens, of which nothing is promised."""
    real = torch.arange(6) < lengths[:, None]
    return tuple(r * real[..., None] if isinstance(r, Tensor) else r for r in result)


@pytest.mark.parametrize("name", STEPS)
def test_every_function_of_a_model(name: str) -> None:
    """Padded rows, and drafts of which some are wrong."""
    function, draft, more = STEPS[name]
    given = (base(), started(base(), draft), *more)
    step = compiled(function, *given)
    assert len(programs(step)) == 1
    got, want = step(*given), function(*given)
    if name in ("forward", "mtp"):
        got, want = (valid(result, LENGTHS - 1) for result in (got, want))
    check_close(got, want, HARSH)


@pytest.mark.parametrize("name", ["base", "only_attention"])
def test_bfloat16_is_as_near_the_truth_as_the_reference(name: str) -> None:
    """Roundings differ, so both are compared with float32 on the same weights and state."""
    params, state, tokens = last(model(BF16, BF16, **ODD[name]))
    exact = map_leaves(lambda t: t.float() if t.is_floating_point() else t, (params, state))
    config = params.config.with_precision(compute=F32, state=F32)
    want, _ = qn.decode(exact[0]._replace(config=config), exact[1], tokens)
    step = compiled(qn.decode, params, state, tokens)
    mine, theirs = (relative_rms(f(params, state, tokens)[0], want) for f in (step, qn.decode))
    assert 1e-3 < mine < 1.5 * theirs < 0.1


@pytest.mark.parametrize(
    ("name", "function"),
    [("base", qn.decode), ("conv2", qn.prefill), ("dense_layers", qn.prefill)],
)
def test_int8_models(name: str, function: Any) -> None:
    """A value half-way between two integers may fall to either in one row, and few rows have one.

    Half of the rows are therefore as close as in float32, and none is further off than some
    integers in 127 are, which each row's expert or norm may blow up.
    """
    params = quantize(model(**ODD[name]))
    more = (words(6), LENGTHS) if function is qn.prefill else (words(1)[:, 0],)
    given = (params, started(params), *more)
    step = compiled(function, *given)
    assert {"int8_linear", "int8_experts"} <= {v.rule for v in step.lowered.verdicts.values()}
    got, want = step(*given)[0], function(*given)[0]
    rows = torch.tensor([relative_rms(a, b) for a, b in zip(got, want, strict=True)])
    assert rows.median() < CLOSE and rows.max() < 0.1


# ---- donation


def copied(tree: Any) -> Any:
    return map_leaves(torch.clone, tree)


def places(state: qn.State) -> list[int]:
    return [leaf.data_ptr() for leaf in leaves(state)]


@cache
def decoding() -> Compiled:
    """A decode step that keeps its arguments; tests ask for the same."""
    return compiled(qn.decode, *last(base()))


@cache
def donating() -> Compiled:
    return compiled(qn.decode, *last(base()), donate="state")


def check_equal(got: Any, want: Any) -> None:
    pairs = zip(leaves_with_paths(got), leaves_with_paths(want), strict=True)
    assert [path for (path, a), (_, b) in pairs if not torch.equal(a, b)] == []


def test_a_donated_state_stays_where_it_is() -> None:
    params, state, tokens = last(base())
    want, before = decoding()(params, state, tokens), places(state)
    kept = qn.fork(state)
    got = donating()(params, state, tokens)
    check_equal(got, want)
    assert places(got[1]) == before
    for again in (donating(), decoding()):
        with pytest.raises(qn.DonatedError, match=r"state\.lengths was donated to decode"):
            again(params, kept, tokens)
    assert places(donating()(params, got[1], tokens)[1]) == before


def test_a_state_that_was_not_donated_is_as_it_was() -> None:
    params, state, tokens = last(base())
    before = copied(state)
    _, after = decoding()(params, state, tokens)
    check_equal(state, before)
    moved = [a for a, b in zip(leaves(after.layers), leaves(state.layers), strict=True)]
    assert not {t.data_ptr() for t in moved} & {t.data_ptr() for t in leaves(state.layers)}


@pytest.mark.parametrize("step", [decoding, donating])
def test_leaves_that_lie_scattered_or_within_others(step: Callable[[], Compiled]) -> None:
    """Every leaf a view: of every second number, or of a part of something larger."""
    params, state, tokens = last(base())
    want = decoding()(params, state, tokens)

    def apart(leaf: Tensor) -> Tensor:
        return torch.stack([leaf, torch.full_like(leaf, 77)], dim=-1)[..., 0]

    def within(leaf: Tensor) -> Tensor:
        return torch.cat([torch.full_like(leaf[:1], 77), leaf, leaf])[1 : 1 + len(leaf)]

    for change in (apart, within):
        got = step()(map_leaves(change, params), map_leaves(change, state), change(tokens))
        check_equal(got, want)


# ---- calls that follow each other, and calls at once


def test_other_weights_are_honoured() -> None:
    """Addresses are kept from call to call: of the same tensors, whatever tree they come in."""
    params, state, tokens = last(base())
    other = rebuild(params, [leaf.flip(0) for leaf in leaves(params)])
    mixed = params._replace(embed=other.embed)
    same = rebuild(params, leaves(params))
    assert same is not params
    for weights in (params, other, mixed, same, other, params):
        check_close(decoding()(weights, state, tokens), qn.decode(weights, state, tokens))
        copied(weights)  # memory that was let go is taken again


def test_a_weight_that_was_given_other_memory() -> None:
    """`tensor.data = ...` leaves the object and lets its memory go."""

    def product(params: tuple[Tensor], x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, params[0])

    weight, other = torch.randn(5, 7), torch.randn(5, 7)
    x, step = torch.randn(3, 7), qn.jit(product, target="cpu")
    step((weight,), x)
    weight.data = other.clone()
    assert relative_rms(step((weight,), x), product((other,), x)) < 1e-6


@pytest.fixture
def hurried() -> Iterator[None]:
    """Python's threads take turns as often as they can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.parametrize("kind", ["one step", "two steps", "other weights"])
def test_two_threads_at_once(kind: str, hurried: None) -> None:
    params, state, tokens = last(base())
    wider = rebuild(params, [leaf.flip(0) for leaf in leaves(params)])
    step = decoding()
    other = compiled(qn.forward, params, state, words(2)) if kind == "two steps" else step
    jobs = [
        (step, (params, state, tokens)),
        (other, (params, state, words(2)))
        if kind == "two steps"
        else (other, (wider if kind == "other weights" else params, state, tokens.flip(0))),
    ]
    alone = [function(*given) for function, given in jobs]

    def work(job: int) -> None:
        function, given = jobs[job]
        for _ in range(60):
            check_equal(function(*given), alone[job])

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, job) for job in (0, 1)]:
            done.result()


def test_threads_that_come_late_find_nothing_to_do() -> None:
    """With more threads than cores somebody loses its core between any two things that it does.

    When it goes on, others may be phases ahead, and what tasks were counted by overwritten.
    """

    def layers(x: Tensor, expert: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        for _ in range(12):
            x = ops.experts(x=x, expert=expert, weight=weight, gate_up=gate_up, down=down)
            wide = torch.nn.functional.linear(x, gate_up.flatten(0, 1))  # where experts worked
            x = ops.l2_norm(x=wide[:, :40] + x, eps=1e-6)
        return x

    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 40), (3, 2), (7, 2 * 70, 40), (7, 40, 70))
    x, weight, gate_up, down = (torch.randn(shape, generator=generator) for shape in shapes)
    given = (x, torch.tensor([[0, 5], [2, 5], [6, 1]]), weight, gate_up, down)
    step = compiled(layers, *given)
    alone = step(*given)
    with threads(8):
        for _ in range(1500):
            assert torch.equal(step(*given), alone)


# ---- as users call it


@pytest.mark.parametrize("draft", [0, 1])
def test_greedy_generation_gives_the_same_tokens(draft: int) -> None:
    """No draw of these rows is so near another that the order of a sum decides it."""
    params, prompt, lengths = base(), words(7), torch.tensor([7, 2, 5, 1, 3])
    function = qn.speculate if draft else qn.decode
    steps = (None, qn.jit(function, donate="state", target="cpu"))
    room = [qn.init_state(params.config, BATCH, 30, draft=draft) for _ in steps]
    want, got = (
        qn.generate(params, state, prompt, 12, lengths, draft=draft, step=step)[0]
        for step, state in zip(steps, room, strict=True)
    )
    assert torch.equal(got, want) and len(want.unique()) > 12


def test_a_function_is_compiled_when_it_is_called() -> None:
    step = qn.jit(qn.decode, target="cpu")
    for given in (last(base()), last(base())):
        check_close(step(*given), qn.decode(*given))
    assert [made.lowered.target.name for made in step._compiled] == ["cpu"]


def test_what_does_not_fit_is_told_as_by_the_reference() -> None:
    params, state, tokens = last(base())
    reference = qn.jit(qn.decode).trace(params, state, tokens).lower().compile()
    wrong: list[tuple[Any, ...]] = [
        (params, qn.init_state(params.config, BATCH, 600, draft=0), tokens.int()),
        (params, state._replace(layers=state.layers[:2]), tokens),
        (params._replace(config=params.config.with_precision(router=BF16)), state, tokens),
        (params, state, tokens, tokens),
        (params, state),
    ]
    for given in wrong:
        said = []
        for step in (reference, decoding()):
            with pytest.raises(qn.LoweringError) as error:
                step(*given)
            said.append(str(error.value))
        assert said[0] == said[1]
    with pytest.raises(qn.LoweringError, match=r"tokens must be on 'cpu', got 'meta'"):
        decoding()(params, state, tokens.to("meta"))
