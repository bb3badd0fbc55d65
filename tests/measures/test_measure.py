"""What is measured of states, against matrices whose sizes and ranks are known, and by hand."""

import pytest
import torch

import qnext as qn
from qnext import measure
from tests.sequences import model, words


def test_effective_rank() -> None:
    """Of a matrix with n equal singular values it is n; of a lone outer product 1; of zeros 0."""
    square = torch.eye(7, 5)
    assert measure.effective_rank(square) == pytest.approx(5, rel=1e-5)
    outer = torch.arange(1.0, 8)[:, None] * torch.arange(1.0, 6)
    assert measure.effective_rank(outer) == pytest.approx(1, rel=1e-3)
    assert measure.effective_rank(torch.zeros(7, 5)) == 0
    two = torch.diag(torch.tensor([3.0, 1.0]))
    share = torch.tensor([0.75, 0.25])
    want = float((-(share * share.log())).sum().exp())
    assert measure.effective_rank(two) == pytest.approx(want, rel=1e-5)


def test_a_reading_is_of_the_states_that_decoding_makes() -> None:
    params, tokens = model(), words(9, seed=4)[0]
    found = measure.reading(params, tokens)
    nets = [n for n, kind in enumerate(params.config.layer_types) if kind == "linear_attention"]
    heads = params.config.linear_num_value_heads
    assert found.layers == tuple(nets)
    assert found.norm.shape == found.rank.shape == found.decay.shape == (9, len(nets), heads)
    state = qn.init_state(params.config, 1, 9)
    _, state = qn.prefill(params, state, tokens[None])
    for at, number in enumerate(nets):
        matrix = state.layers[number][0][int(state.slots[0, 0])]
        torch.testing.assert_close(
            found.norm[-1, at], matrix.norm(dim=(-2, -1)), rtol=1e-4, atol=1e-5
        )
    assert bool((found.decay > 0).all()) and bool((found.decay < 1).all())
    assert bool((found.rank >= 0.99).all())
    assert bool((found.rank[0] < 1.01).all())  # after one token a state is one outer product


def test_decays_are_those_of_the_layers() -> None:
    """A text's decays do not depend on what comes after."""
    params, tokens = model(), words(9, seed=4)[0]
    whole, part = measure.log_decays(params, tokens), measure.log_decays(params, tokens[:5])
    torch.testing.assert_close(whole[:5], part, rtol=1e-4, atol=1e-5)
    assert bool((whole < 0).all())


def test_layer_outputs_end_in_what_the_head_sees() -> None:
    params, tokens = model(), words(6, seed=2)[:3]
    found = measure.layer_outputs(params, tokens)
    assert found.shape == (params.config.num_hidden_layers, 3, 6, params.config.hidden_size)
    hidden = qn.functional.ops.rms_norm(
        x=found[-1], weight=params.norm, eps=params.config.rms_norm_eps
    )
    logits, _ = qn.forward(params, qn.init_state(params.config, 3, 6), tokens)
    torch.testing.assert_close(
        qn.functional.blocks.unembed(params, hidden), logits, rtol=1e-4, atol=1e-5
    )


def test_no_tokens_are_refused() -> None:
    with pytest.raises(qn.InputError, match=r"tokens must be \[tokens\], at least one, got \[0\]"):
        measure.reading(model(), torch.zeros(0, dtype=torch.int64))
