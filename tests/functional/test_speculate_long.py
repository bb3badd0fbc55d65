"""2,000 tokens: speculation changes not one of them, from 1 guess to 7, on ragged batches."""

import pytest
import torch

import qnext as qn
from tests.functional.test_speculate import GREEDY, made

NEW, PROMPT = 2000, 40
WAYS = (GREEDY, qn.Sampling(0.7, top_p=0.9, seed=5), qn.Sampling(1.0, top_p=0.9, seed=6))
BATCHES = (1, 3, 8)


@pytest.mark.slow
@pytest.mark.parametrize("draft", range(1, 8))
@pytest.mark.parametrize("name", ["demo", "base", "conv3"])
def test_two_thousand_tokens(name: str, draft: int) -> None:
    """Each width meets each model; ways and batches go round, so that every pair of them occurs."""
    params = made(name)
    turn = draft + {"demo": 0, "base": 2, "conv3": 5}[name]
    batch, way = BATCHES[turn % 3], WAYS[(turn // 3 + turn) % 3]
    generator = torch.Generator().manual_seed(turn)
    tokens = torch.randint(0, params.config.vocab_size, (batch, PROMPT), generator=generator)
    lengths = torch.randint(1, PROMPT + 1, (batch,), generator=generator)
    plain, state = (
        qn.init_state(params.config, batch, PROMPT + NEW, draft=room) for room in (0, draft)
    )
    want, plain = qn.generate(params, plain, tokens, NEW, lengths, way)
    got, state = qn.generate(params, state, tokens, NEW, lengths, way, draft=draft)
    assert torch.equal(got, want)
    assert torch.equal(state.lengths, plain.lengths)
