"""Steps that go on where the last one ended: less is looked at, and nothing else differs."""

import gc
from weakref import ref

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.tree import leaves, map_leaves, rebuild
from qnext.lowering.compiled import Compiled
from qnext.lowering.cpu.chain import Chain
from tests.lowering.test_cpu_steps import (
    base,
    check_equal,
    compiled,
    copied,
    decoding,
    donating,
    last,
    needs_a_compiler,
)
from tests.samples import relative_rms
from tests.sequences import words

pytestmark = needs_a_compiler
TOKENS = words(5)


class Counted(Chain):
    """How many calls went on from another."""

    count = 0

    def go_on(self, *given: object) -> list[Tensor] | None:
        results = super().go_on(*given)  # type: ignore[arg-type]
        Counted.count += results is not None
        return results


@pytest.fixture
def step() -> Compiled:
    """A decode step that nobody has called, its calls counted."""
    made = Compiled(donating().parts, lambda: donating().lowered)
    assert made._chain is not None
    made._chain.__class__ = Counted
    Counted.count = 0
    return made


def wanted(params: qn.Params, state: qn.State, count: int) -> tuple[Tensor, qn.State]:
    """Logits and state after some tokens, by steps each of which looks at everything."""
    for tokens in TOKENS.T[:count]:
        logits, state = decoding()(params, state, tokens)
    return logits, state


def test_a_chain_ends_as_single_calls_do(step: Compiled) -> None:
    params, state, _ = last(base())
    want, state = wanted(params, state, 5), copied(state)
    for tokens in TOKENS.T:
        logits, state = step(params, state, tokens)
    check_equal((logits, state), want)
    assert Counted.count == 4


def test_other_weights_within_a_chain(step: Compiled) -> None:
    params, state, _ = last(base())
    other = rebuild(params, [leaf.flip(0) for leaf in leaves(params)])
    _, state = step(params, copied(state), TOKENS[:, 0])
    kept = copied(state)
    got = step(other, state, TOKENS[:, 1])
    check_equal(got, decoding()(other, kept, TOKENS[:, 1]))
    assert Counted.count == 0
    step(other, got[1], TOKENS[:, 2])
    assert Counted.count == 1


def test_weights_are_looked_at_where_a_chain_begins(step: Compiled) -> None:
    """Values written in place are seen at once, memory that was exchanged by the next chain."""
    params, state, tokens = last(base())
    params = map_leaves(torch.clone, params)
    _, state = step(params, copied(state), TOKENS[:, 0])
    with torch.no_grad():
        params.norm.add_(1)
    kept = copied(state)
    got = step(params, state, TOKENS[:, 1])
    check_equal(got, decoding()(params, kept, TOKENS[:, 1]))
    params.norm.data = params.norm + 1
    begun = copied(got[1])
    check_equal(step(params, begun, tokens), decoding()(params, got[1], tokens))
    assert Counted.count == 1


@pytest.mark.parametrize("what", ["leaf", "tree"])
def test_a_state_that_is_not_quite_the_last_one(step: Compiled, what: str) -> None:
    params, state, _ = last(base())
    _, state = step(params, copied(state), TOKENS[:, 0])
    if what == "leaf":
        state = state._replace(lengths=state.lengths - 1)
    else:
        state = rebuild(state, leaves(state))  # other nodes of the same leaves
    kept = copied(state)
    got = step(params, state, TOKENS[:, 1])
    check_equal(got, decoding()(params, kept, TOKENS[:, 1]))
    assert Counted.count == (what == "tree")


def test_what_does_not_fit_within_a_chain(step: Compiled) -> None:
    params, state, _ = last(base())
    _, state = step(params, copied(state), TOKENS[:, 0])
    with pytest.raises(qn.LoweringError, match=r"tokens must be int64 \[5\], got int64 \[4\]"):
        step(params, state, TOKENS[:4, 1])
    with pytest.raises(qn.LoweringError, match=r"state\.lengths must be int32 \[5\]"):
        step(params, state._replace(lengths=state.lengths[:4]), TOKENS[:, 1])
    kept = copied(state)
    check_equal(step(params, state, TOKENS[:, 1]), decoding()(params, kept, TOKENS[:, 1]))


def test_what_was_given_up_within_a_chain(step: Compiled) -> None:
    params, state, _ = last(base())
    params = map_leaves(torch.clone, params)
    _, first = step(params, copied(state), TOKENS[:, 0])
    _, second = step(params, first, TOKENS[:, 1])
    with pytest.raises(qn.DonatedError, match=r"state\.lengths was donated to decode"):
        step(params, first, TOKENS[:, 2])
    _, third = donating()(params, second, TOKENS[:, 2])
    with pytest.raises(qn.DonatedError, match=r"state\.lengths was donated to decode"):
        step(params, second, TOKENS[:, 2])
    _, fourth = step(params, third, TOKENS[:, 3])

    def doubled(norm: Tensor) -> Tensor:
        return norm * 2

    compiled(doubled, params.norm, donate="norm", weights=())(params.norm)
    with pytest.raises(qn.DonatedError, match=r"params\.norm was donated to doubled"):
        step(params, fourth, TOKENS[:, 4])


def test_a_call_that_fails_ends_nothing(step: Compiled) -> None:
    """The state of a call that met a token beyond the vocabulary can be given again."""
    params, state, _ = last(base())
    _, state = step(params, copied(state), TOKENS[:, 0])
    kept = copied(state)
    with pytest.raises(qn.InputError, match="an index is out of range"):
        step(params, state, TOKENS[:, 1] + params.config.vocab_size)
    check_equal(step(params, state, TOKENS[:, 1]), decoding()(params, kept, TOKENS[:, 1]))


def test_a_state_that_nobody_has_is_let_go(step: Compiled) -> None:
    params, state, _ = last(base())
    logits, state = step(params, copied(state), TOKENS[:, 0])
    gone = [ref(leaf.untyped_storage()) for leaf in leaves(state)]
    watched = [ref(leaf) for leaf in leaves(state)]
    del state
    gc.collect()
    assert not [each for each in (*gone, *watched) if each() is not None]
    assert logits.isfinite().all()


def test_weights_that_are_results_are_looked_at() -> None:
    def scaled(params: tuple[Tensor], x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return torch.nn.functional.linear(x, params[0]), params

    weight, x = torch.randn(7, 7), torch.randn(3, 7)
    step = compiled(scaled, (weight,), x, donate="x")
    want = x @ weight.T @ weight.T
    x, params = step((weight,), x)
    assert params[0] is not weight and params[0].data_ptr() == weight.data_ptr()
    assert relative_rms(step(params, x)[0], want) < 1e-6
