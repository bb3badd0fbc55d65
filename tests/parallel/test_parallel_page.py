"""The page's block for several processes runs in four, and each has one process's tokens."""

from pathlib import Path

import torch

import qnext as qn
from tests.parallel.models import Mixed, whole_params, words
from tests.parallel.page import run_block
from tests.parallel.ranks import WORLD, Ranks


def test_the_block_for_ranks(ranks: Ranks, tmp_path: Path) -> None:
    params = whole_params(Mixed(tp=WORLD))
    qn.save(params, tmp_path / "Qwen3-Next-80B")
    prompt = torch.cat([words(9, seed=1), words(9, seed=2)])[:8]
    state = qn.init_state(params.config, batch=8, capacity=4096)
    want, _ = qn.generate(params, state, prompt)
    told = ranks.run(run_block, tmp_path, prompt)
    assert len({name for name, _ in told}) == WORLD
    for _, tokens in told:
        assert torch.equal(tokens, want)
