"""200,000 draws beside softmax: what is drawn, plainly or by speculation, is the distribution.

Seeds are fixed, so each p-value is a number, not chance; 0.001 is what a wrong one would not reach.
"""

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.sampling import choose, restrict
from tests.sequences import model

ROWS, CALLS, VOCAB = 2000, 100, 23
DRAWS = ROWS * CALLS
PROMPT = torch.tensor([[3, 17, 5]])


@pytest.fixture(scope="module")
def params() -> qn.Params:
    return model(vocab_size=VOCAB, num_experts=0, num_hidden_layers=1, layer_types=None)


def p_value(tokens: Tensor, share: Tensor) -> float:
    """Of a chi-square test; tokens of no share must not occur."""
    seen = torch.bincount(tokens, minlength=VOCAB).double()
    assert seen[share == 0].sum() == 0
    expected = share[share > 0].double() * len(tokens)
    assert expected.min() > 5  # else the statistic is none of chi-square
    statistic = ((seen[share > 0] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


def settings(call: int, **how: float) -> qn.functional.sampling.Knobs:
    one = qn.knobs([qn.Sampling(**how)])  # type: ignore[arg-type]
    seeds = call * ROWS + torch.arange(ROWS)
    return one._replace(
        seed=seeds,
        **{name: value.expand(ROWS) for name, value in one._asdict().items() if name != "seed"},
    )


def logits() -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("heat", [0.7, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_plain_draws_are_honest(heat: float, top_p: float) -> None:
    how = {"temperature": heat, "top_p": top_p}
    rows, position = logits().expand(ROWS, VOCAB), torch.full((ROWS,), 9)
    drawn = torch.cat(
        [choose(rows, position, settings(call, **how), top_p < 1) for call in range(CALLS)]
    )
    kept = restrict(rows[:1], qn.knobs([qn.Sampling(**how)]))[0]
    assert len(drawn) == DRAWS and (kept.isfinite().sum() < VOCAB) == (top_p < 1)
    assert p_value(drawn, (kept / heat).softmax(-1)) > 1e-3


def test_draws_of_one_seed_at_many_places_are_honest() -> None:
    """Noise is hashed from the position too: a long text of one request is no less honest."""
    one = qn.knobs([qn.Sampling(1.0, seed=77)])
    same = qn.functional.sampling.Knobs(*(value.expand(ROWS) for value in one))
    rows = logits().expand(ROWS, VOCAB)
    places = torch.arange(DRAWS).view(CALLS, ROWS)
    drawn = torch.cat([choose(rows, place, same) for place in places])
    assert p_value(drawn, logits().softmax(-1)) > 1e-3


def speculated(params: qn.Params, heat: float, top_p: float) -> tuple[Tensor, ...]:
    """(first tokens, guesses, second tokens or -1, logits after the prompt and its next token).

    The guesses are honest draws from another distribution, with the noise of their position.
    """
    state = qn.init_state(params.config, 1, 8, draft=1)
    _, state = qn.prefill(params, state, PROMPT[:, :2])
    state = qn.select(state, [0] * ROWS)
    tokens, other = PROMPT[0, 2:].expand(ROWS), 1.5 * logits().roll(5)
    firsts, guesses, seconds = [], [], []
    for call in range(CALLS):
        how = settings(call, temperature=heat, top_p=top_p)
        guess = choose(other.expand(ROWS, VOCAB), state.lengths + 1, how, top_p < 1)
        drawn, count, _ = qn.accept(params, state, tokens, guess[:, None], how, top_p < 1)
        assert torch.equal(count == 2, drawn[:, 0] == guess)
        firsts.append(drawn[:, 0])
        guesses.append(guess)
        seconds.append(drawn[:, 1])
    return torch.cat(firsts), torch.cat(guesses), torch.cat(seconds)


def target(params: qn.Params, tokens: list[int], heat: float, top_p: float) -> Tensor:
    """The model's distribution after these tokens."""
    line = torch.tensor([tokens])
    out, _ = qn.prefill(params, qn.init_state(params.config, 1, 8), line)
    kept = restrict(out.float(), qn.knobs([qn.Sampling(heat, top_p=top_p)]))
    return (kept[0] / heat).softmax(-1)


@pytest.mark.parametrize(
    ("heat", "top_p"), [pytest.param(1.0, 1.0, marks=pytest.mark.slow), (0.7, 0.9)]
)
def test_speculative_draws_are_honest(params: qn.Params, heat: float, top_p: float) -> None:
    """Accepted or corrected, a token follows the model's distribution, not the drafter's.

    So does the token after an accepted guess. And the test would tell: the guesses themselves, and
    the likeliest tokens of a greedy verifier (bug 14 of serving_inventory), are far from it.
    """
    first, guess, second = speculated(params, heat, top_p)
    prompt = PROMPT[0].tolist()
    share = target(params, prompt, heat, top_p)
    assert len(first) == DRAWS and 0.05 < (first == guess).double().mean() < 0.95
    assert p_value(first, share) > 1e-3
    accepted = first[first == guess]
    likely = int(accepted.bincount().argmax())
    following = second[(first == guess) & (first == likely)]
    assert len(following) > 3000 and (second[first != guess] == -1).all()
    assert p_value(following, target(params, [*prompt, likely], heat, top_p)) > 1e-3
    known = guess[share[guess] > 0]  # counter-checks
    assert p_value(known, share) < 1e-6
    greedy = torch.where(guess == share.argmax(), guess, share.argmax())
    assert p_value(greedy, share) < 1e-6
