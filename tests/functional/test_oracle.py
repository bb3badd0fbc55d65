"""Logits and greedy text against transformers' Qwen3NextForCausalLM, on odd models."""

from typing import Any

import pytest
import torch

import qnext as qn
from tests.samples import ODD, relative_rms

TOLERANCE = 1e-5  # float32 sums in another order through a few layers; design section 7


@pytest.mark.parametrize("name", ODD)
def test_logits_of_a_whole_prompt(checkpoints: Any, name: str) -> None:
    model, _, params = checkpoints(name)
    tokens = torch.randint(0, 211, (2, 131))
    logits, state = qn.forward(params, qn.init_state(params.config, 2, 131), tokens)
    with torch.no_grad():
        assert relative_rms(logits, model(tokens, use_cache=False).logits) < TOLERANCE
    assert state.lengths.tolist() == [131, 131]
