"""2,000 tokens: speculation changes not one of them, from 1 guess to 7, on ragged batches.

A model speaks plainly once, eight rows of three ways to draw. Speculation with each width is held
beside rows of that, alone, three together or all of them: so a batch changes no token either.
"""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from torch import Tensor

import qnext as qn
from tests.functional.test_speculate import GREEDY, Planted, check_remembered, made

NEW, PROMPT, ROWS = 2000, 40, 8
WIDEST = 7
SIZES = (8, 1, 3)  # turns, so that each width meets each size of a batch in one of the models


def ways() -> list[qn.Sampling]:
    """Neighbours draw in other ways."""
    return [
        (GREEDY, qn.Sampling(0.7, top_p=0.9, seed=row), qn.Sampling(1.0, top_p=0.9, seed=row))[
            row % 3
        ]
        for row in range(ROWS)
    ]


def empty(params: qn.Params, batch: int, draft: int) -> qn.State:
    return qn.init_state(params.config, batch, PROMPT + NEW, draft=draft)


def asked(params: qn.Params) -> tuple[Tensor, Tensor]:
    """Prompts and their lengths, from 1 to all of it."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, params.config.vocab_size, (ROWS, PROMPT), generator=generator)
    return tokens, torch.tensor([17, 40, 1, 33, 2, 39, 8, 25])


@pytest.fixture
def unwatched() -> Iterator[None]:
    """Without the checks of annotations, which take most of the time of such small models."""
    was = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", was)


@pytest.mark.slow
@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize(
    ("name", "turn", "own"),
    [("conv3", 2, ()), ("base", 1, (1,)), ("demo", 0, tuple(range(1, WIDEST + 1)))],
)
def test_two_thousand_tokens(name: str, turn: int, own: tuple[int, ...]) -> None:
    """At the widths `own` guesses are the module's; of planted ones 19 in 20 are right.

    The module's are often right on the demo and never on `base`, where each of 2,000 drafts is
    refused.
    """
    params, each = made(name), ways()
    tokens, lengths = asked(params)
    text, plain = qn.generate(params, empty(params, ROWS, WIDEST), tokens, NEW, lengths, each)
    for draft in range(1, WIDEST + 1):
        size = SIZES[(draft + turn) % 3]
        rows = [(draft + i) % ROWS for i in range(size)]
        want, starts, some = text[rows], lengths[rows], [each[row] for row in rows]
        step = None if draft in own else Planted(want, starts, 0.95, seed=draft)
        state = empty(params, size, draft)
        got, state = qn.generate(
            params, state, tokens[rows], NEW, starts, some, draft=draft, step=step
        )
        assert torch.equal(got, want), f"draft={draft}, rows={rows}"
        check_remembered(params, state, qn.select(plain, rows))
        if step is not None:  # whole drafts, and others broken off at every place
            assert set(range(1, draft + 2)) <= {n for line in step.counts for n in line}
