"""jit, trace, lower, compile and call, on the reference target."""

import gc
import weakref
from typing import Any

import pytest
import torch

import qnext as qn
from qnext.functional.tree import leaves, leaves_with_paths
from tests.samples import ODD, spec

BATCH, CAPACITY = 3, 150


def model(name: str = "base", **more: Any) -> qn.Params:
    return qn.init_params(qn.Config.from_hf(spec(name) | more), seed=5)


def start(params: qn.Params) -> tuple[qn.State, torch.Tensor]:
    state = qn.init_state(params.config, BATCH, CAPACITY)
    prompt = torch.randint(0, 200, (BATCH, 7), generator=torch.Generator().manual_seed(3))
    _, state = qn.prefill(params, state, prompt, torch.tensor([7, 2, 5]))
    return state, torch.tensor([5, 17, 101])


@pytest.mark.parametrize("name", ODD)
def test_compiled_decode_is_bit_equal(name: str) -> None:
    params = model(name)
    state, tokens = start(params)
    lowered = qn.jit(qn.decode).trace(*qn.specs(params.config, BATCH, CAPACITY)).lower("reference")
    got, got_state = lowered.compile()(params, state, tokens)
    want, want_state = qn.decode(params, state, tokens)
    assert torch.equal(got, want)
    assert isinstance(got_state, qn.State)
    pairs = zip(leaves_with_paths(got_state), leaves_with_paths(want_state), strict=True)
    for (path, a), (_, b) in pairs:
        assert torch.equal(a, b), path


@pytest.mark.parametrize("function", [qn.forward, qn.prefill])
def test_lengths_are_values_not_shapes(function: Any) -> None:
    """One compiled prefill serves every mix of lengths of its bucket."""
    params = model()
    state = qn.init_state(params.config, BATCH, CAPACITY)
    step = qn.jit(function)
    tokens = torch.randint(0, 200, (BATCH, 70), generator=torch.Generator().manual_seed(3))
    for lengths in ([70, 1, 33], [5, 64, 65]):
        got, _ = step(params, state, tokens, torch.tensor(lengths))
        want, _ = function(params, state, tokens, torch.tensor(lengths))
        assert torch.equal(got, want)
    assert len(step._compiled) == 1


def test_calling_jit_compiles_once_per_shape() -> None:
    params = model()
    state, tokens = start(params)
    step = qn.jit(qn.decode)
    for _ in range(2):
        logits, _ = step(params, state, tokens)
    assert torch.equal(logits, qn.decode(params, state, tokens)[0])
    step(params, qn.init_state(params.config, BATCH, 10), tokens)
    assert len(step._compiled) == 2


def test_generate_takes_a_compiled_step() -> None:
    params = model()
    prompt = torch.randint(0, 200, (BATCH, 7), generator=torch.Generator().manual_seed(3))
    runs = [
        qn.generate(params, qn.init_state(params.config, BATCH, 40), prompt, 20, step=step)[0]
        for step in (None, qn.jit(qn.decode), qn.jit(qn.decode, donate="state"))
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_a_donated_state_used_again_is_named() -> None:
    params = model()
    state, tokens = start(params)
    step = qn.jit(qn.decode, donate="state")
    kept = qn.fork(state)  # the same value: given up with it
    _, after = step(params, state, tokens)
    for again in (step, qn.decode):
        with pytest.raises(qn.DonatedError) as error:
            again(params, kept, tokens)
        assert str(error.value) == (
            "state.lengths was donated to decode and its memory reused. Use the state that decode()"
            " returned, or jit(..., donate=()) to keep both."
        )
    step(params, after, tokens)  # what came back is good, leaves that passed through included


def test_what_does_not_fit_is_named_by_path() -> None:
    params = model()
    state, tokens = start(params)
    compiled = qn.jit(qn.decode).trace(params, state, tokens).lower().compile()
    wider = qn.init_state(params.config, BATCH, 300)
    with pytest.raises(qn.LoweringError) as error:
        compiled(params, wider, tokens.int())
    text = str(error.value)
    assert text.startswith("decode was compiled for other arguments:\n  state.block_table must be")
    assert "state.block_table must be int32 [3, 2], got int32 [3, 3]" in text
    assert (
        "state.layers[3].key must be float32 [7, 128, 2, 24], got float32 [10, 128, 2, 24]" in text
    )
    assert "tokens must be int64 [3], got int32 [3]" in text
    with pytest.raises(qn.LoweringError, match=r"state\.layers\[2\]\.recurrent is missing"):
        compiled(params, state._replace(layers=state.layers[:2]), tokens)
    with pytest.raises(qn.LoweringError, match="a constant of the trees differs"):
        other = params.config.with_precision(router=torch.float64)
        compiled(params._replace(config=other), state, tokens)
    with pytest.raises(qn.LoweringError, match="too many positional arguments"):
        compiled(params, state, tokens, tokens)


def test_an_unknown_donation_is_refused() -> None:
    with pytest.raises(qn.LoweringError, match="donate='cache' is no argument of this call"):
        qn.jit(qn.decode, donate="cache").trace(*qn.specs(model().config, 2, 5))


def test_results_must_be_tensors() -> None:
    def wrong(x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x + 1, 7

    with pytest.raises(qn.LoweringError, match=r"wrong must return trees of tensors; result\[1\]"):
        qn.jit(wrong).trace(torch.ones(3))


def test_any_function_of_trees_can_be_lowered() -> None:
    def scale(tree: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
        return {name: leaf * factor for name, leaf in tree.items()}

    step = qn.jit(scale)
    tree = {"a": torch.arange(3.0), "b": torch.arange(5.0)}
    assert torch.equal(step(tree, 2.0)["b"], tree["b"] * 2)
    assert torch.equal(step(tree, 3.0)["b"], tree["b"] * 3)  # a constant: another compilation
    assert len(step._compiled) == 2


def test_strict_and_require_name_what_is_left() -> None:
    traced = qn.jit(qn.decode).trace(*qn.specs(model().config, BATCH, CAPACITY))
    with pytest.raises(qn.LoweringError, match=r"delta_rule: reference has no rules"):
        traced.lower("reference", require={"delta_rule"})
    with pytest.raises(qn.LoweringError, match=r"(?s)attention: .*short_conv: "):
        traced.lower("reference", strict=True)


def test_gradients_are_not_recorded() -> None:
    params = model()
    state, tokens = start(params)
    for leaf in leaves(params):
        leaf.requires_grad_()
    logits, _ = qn.jit(qn.decode)(params, state, tokens)
    assert not logits.requires_grad


def test_an_argument_called_host_is_refused() -> None:
    def wrong(host: torch.Tensor) -> torch.Tensor:
        return host

    with pytest.raises(qn.LoweringError, match="wrong has an argument 'host', which is what comp"):
        qn.jit(wrong)


@pytest.mark.parametrize("how", ["jit", "stages"])
def test_a_compiled_step_keeps_no_argument_alive(how: str) -> None:
    given, other = torch.ones(3, 5), torch.ones(3, 5)
    step = qn.jit(twice)
    if how == "jit":
        step(given)
    else:
        compiled = step.trace(given).lower().compile()
        compiled(given)
    held = weakref.ref(given)
    del given
    gc.collect()
    assert held() is None
    assert torch.equal((step if how == "jit" else compiled)(other), other * 2)


def twice(x: torch.Tensor) -> torch.Tensor:
    return x + x
