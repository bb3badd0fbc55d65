"""Bugs that serving stacks for this model had when they speculate, at the level of pure functions.

Numbers are those of the inventory of serving stacks (section 8 of serving_inventory), demands those
of users_and_serving (section 1). More of them elsewhere: windows after a prefill in test_known_bugs
(4), every accepted count on models of odd widths in test_verify (6), distributions of 200,000 draws
in test_honest_sampling (14). As in test_known_bugs, `square` has two axes of one size on purpose.
"""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.tree import leaves, rebuild
from tests.functional.test_speculate import GREEDY, check_remembered, fresh, prompts, remembered
from tests.samples import relative_rms
from tests.sequences import HARSH, model, turned

BATCH, VOCAB, DRAFT = 5, 211, 3  # no axis of the model has size 5
WARM = qn.Sampling(0.7, top_p=0.9, seed=5)


def slow(value: int) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


ways = pytest.mark.parametrize("way", [GREEDY, WARM], ids=["greedy", "warm"])


@pytest.fixture(scope="module")
def square() -> qn.Params:
    """Key and value heads of one width, as published: a state that is turned has the same shape."""
    return model(linear_key_head_dim=14, mtp_num_hidden_layers=1)


def texts(
    params: qn.Params, tokens: Tensor, lengths: Tensor, new: int, way: Any = GREEDY
) -> Tensor:
    """What plain decoding says, on a state that has no room to guess."""
    batch = len(tokens)
    return qn.generate(params, fresh(params, 0, batch), tokens, new, lengths, way)[0]


def wrong(right: Tensor) -> Tensor:
    return (right + 1) % VOCAB


@ways
@pytest.mark.parametrize("first", [1, slow(2), slow(3), 4, slow(6)])
def test_4_prefill_verify_decode_by_turns(square: qn.Params, first: int, way: qn.Sampling) -> None:
    """Bug 4: a window widened for drafts begins at its front after a prefill, not at its end.

    Prefills shorter and longer than the window, and than a whole draft, then drafts and plain steps
    by turns on one state: one text.
    """
    tokens, lengths = prompts(6, batch=BATCH), torch.tensor([first, 6, 1, first, 3])
    want = texts(square, tokens, lengths, 27, way)
    state, more, said = fresh(square, DRAFT, BATCH), tokens, []
    for new, draft in ((5, 3), (2, 0), (7, 2), (1, 0), (1, 3), (6, 1)):
        out, state = qn.generate(square, state, more, new, lengths, way, draft=draft)
        said.append(out)
        # the next turn is given the token that follows: it draws none itself
        at = sum(part.shape[1] for part in said)
        more, lengths = want[:, at : at + 1], torch.ones(BATCH, dtype=torch.int64)
        said.append(more)
    assert torch.equal(torch.cat(said, dim=1)[:, :27], want)


@pytest.mark.parametrize("count", range(1, DRAFT + 2))
def test_6_a_committed_state_is_not_turned(square: qn.Params, count: int) -> None:
    """Bug 6: the state after token k moved with key and value axes changed over.

    Committed after `count` of four tokens, it is what `count` plain steps leave; turned it is not.
    """
    tokens, lengths = prompts(9, batch=BATCH), torch.tensor([9, 2, 5, 1, 7])
    line = prompts(DRAFT + 1, seed=8, batch=BATCH)
    _, state = qn.prefill(square, fresh(square, DRAFT, BATCH), tokens, lengths)
    plain = state
    for token in line[:, :count].unbind(1):
        _, plain = qn.decode(square, plain, token)
    pending = qn.verify(square, state, line)[1]
    got = qn.commit(pending, torch.full((BATCH,), count))
    check_remembered(square, got, plain)
    after = [qn.decode(square, s, line[:, 0])[0] for s in (got, plain, turned(got))]
    assert relative_rms(after[0], after[1]) < HARSH < 1e-2 < relative_rms(after[2], after[1])


def test_14_the_likeliest_guess_is_no_draw() -> None:
    """Bug 14: at a temperature, verified as if greedy: whatever is likeliest is accepted.

    Guesses that are always the likeliest hold exactly where the request draws them by itself, about
    as often as they are probable; a greedy verifier would accept every one.
    """
    params, rows, heat = model(mtp_num_hidden_layers=1), 600, 0.4
    prompt = torch.tensor([[3, 17, 5, 90]])
    logits, _ = qn.prefill(params, fresh(params, 0, 1, 20), prompt)
    _, state = qn.prefill(params, fresh(params, 1, 1, 20), prompt[:, :3])
    state = qn.select(state, [0] * rows)
    each = [qn.Sampling(heat, seed=row) for row in range(rows)]
    guesses = logits.argmax(-1).expand(rows)[:, None]
    drawn, count, _ = qn.accept(params, state, prompt[0, 3:].expand(rows), guesses, qn.knobs(each))
    alone = qn.sample(logits.expand(rows, -1), each, 4)
    assert torch.equal(drawn[:, 0], alone)
    assert torch.equal(count == 2, alone == guesses[:, 0])
    share = float((logits / heat).softmax(-1).max())
    spread = (share * (1 - share) / rows) ** 0.5
    assert 0.2 < share < 0.8  # either would show
    assert abs(float((count == 2).double().mean()) - share) < 4 * spread


# --- counts and states -------------------------------------------------------------------------


def test_15_one_rank_decides_for_all(square: qn.Params) -> None:
    """Bug 15: ranks whose logits differ by noise accept different lengths and part for ever.

    Counts are arguments: what one rank counted, `commit` takes on the other. Lengths, offsets and
    tables stay bit-equal over many rounds, and the other's state is what its own plain steps leave.
    """
    generator = torch.Generator().manual_seed(3)
    noisy = rebuild(
        square,
        [
            leaf * (1 + 3e-2 * torch.randn(leaf.shape, generator=generator))
            for leaf in leaves(square)
        ],
    )
    tokens, lengths = prompts(9, batch=BATCH), torch.tensor([9, 2, 5, 1, 7])
    text = texts(square, tokens, lengths, 40)
    logits, mine = qn.prefill(square, fresh(square, DRAFT, BATCH), tokens, lengths)
    new = logits.argmax(-1)
    theirs, plain = (
        qn.prefill(noisy, fresh(noisy, DRAFT, BATCH), tokens, lengths)[1] for _ in range(2)
    )
    parted = 0
    for turn in range(8):
        at = (mine.lengths - lengths)[:, None] + 1 + torch.arange(DRAFT)
        guesses = text.gather(1, at.long())
        miss = (torch.arange(BATCH)[:, None] + turn + torch.arange(DRAFT)) % 5 == 0
        guesses = torch.where(miss, wrong(guesses), guesses)
        drawn, count, mine = qn.accept(square, mine, new, guesses)
        line = torch.cat([new[:, None], guesses], dim=1)
        other, pending = qn.verify(noisy, theirs, line)
        own = 1 + (other.argmax(-1)[:, :-1] == guesses).long().cumprod(1).sum(1)
        parted += int((own != count).sum())
        theirs = qn.commit(pending, count)
        _, plain = qn.forward(noisy, plain, line, count)
        for name in ("lengths", "slots", "rows", "accepted", "block_table", "mtp_lengths"):
            assert torch.equal(getattr(theirs, name), getattr(mine, name)), name
        check_remembered(noisy, theirs, plain)
        new = qn.newest(drawn, count)
    assert parted > 3  # left to themselves they would have


@pytest.mark.parametrize("boundary", [64, 128])
def test_16_any_boundary_inside_a_draft_is_reached(square: qn.Params, boundary: int) -> None:
    """Bug 16: a state tracked at an interval is off by some tokens where a draft crosses it.

    Whole drafts are accepted over the boundary, which rows reach at another token each. `rewind`
    stands exactly there, and goes on as plain decoding does, with and without guesses.
    """
    lengths = boundary - torch.tensor([1, 2, 3, 1, 2])
    tokens = prompts(boundary, seed=boundary, batch=BATCH)
    want = texts(square, tokens, lengths, 16)
    _, state = qn.prefill(square, fresh(square, DRAFT, BATCH), tokens, lengths)
    _, count, over = qn.accept(square, state, want[:, 0], want[:, 1 : DRAFT + 1])
    assert count.tolist() == [DRAFT + 1] * BATCH and (over.lengths > boundary).all()
    there = qn.rewind(over, over.lengths - boundary)
    assert there.lengths.tolist() == [boundary] * BATCH
    _, plain = qn.forward(square, state, want[:, : DRAFT + 1], boundary - lengths)
    check_remembered(square, there, plain)
    at = (boundary - lengths)[:, None]
    follow = want.gather(1, at)
    rest = want.gather(1, at + 1 + torch.arange(8))
    for draft in (0, 1, DRAFT):
        got, _ = qn.generate(square, there, follow, 8, draft=draft)
        assert torch.equal(got, rest)


# --- what users ask for ------------------------------------------------------------------------

RESIDUES = 67  # rows of consecutive lengths: every residue of 64, and the end of a page among them


@pytest.fixture(scope="module", params=["greedy", "warm"])
def asked(square: qn.Params, request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Any, Tensor]:
    """(prompts, lengths, way, text) of rows of every length from 70 to 136."""
    way = {"greedy": GREEDY, "warm": WARM}[request.param]
    lengths = 70 + torch.arange(RESIDUES)
    tokens = prompts(136, seed=21, batch=RESIDUES)
    return tokens, lengths, way, texts(square, tokens, lengths, 9, way)


@pytest.mark.parametrize("tail", [1, slow(2), DRAFT + 1, slow(63), 65])
def test_row_2_a_prefix_hit_never_changes_the_answer(
    square: qn.Params, asked: tuple[Tensor, Tensor, Any, Tensor], tail: int
) -> None:
    """Demand 2: an older state goes on with the tail of a prompt, with guesses on: hit == miss.

    Meanwhile another request has speculated from the same state; it is a value and does not care.
    """
    tokens, lengths, way, want = asked
    _, older = qn.prefill(square, fresh(square, DRAFT, RESIDUES), tokens, lengths - tail)
    qn.speculate(square, older, prompts(1, seed=2, batch=RESIDUES)[:, 0], DRAFT)
    at = (lengths - tail)[:, None] + torch.arange(tail)
    got, _ = qn.generate(square, older, tokens.gather(1, at), 9, None, way, draft=DRAFT)
    assert torch.equal(got, want)


def test_row_2_the_prefix_may_end_inside_a_draft(square: qn.Params) -> None:
    """Demand 2: the state that is hit was left by speculation, and rewound to where texts part."""
    lengths = torch.tensor([61, 124, 62, 126, 40])
    tokens, tail = prompts(126, seed=31, batch=BATCH), prompts(7, seed=32, batch=BATCH)
    said = texts(square, tokens, lengths, 8)
    _, state = qn.prefill(square, fresh(square, DRAFT, BATCH), tokens, lengths)
    _, _, over = qn.accept(square, state, said[:, 0], said[:, 1 : DRAFT + 1])
    back = torch.tensor([0, 1, 2, 3, 1])
    got, _ = qn.generate(square, qn.rewind(over, back), tail, 9, None, WARM, draft=DRAFT)
    whole = torch.zeros(BATCH, 140, dtype=torch.int64)
    kept = DRAFT + 1 - back
    for row, (n, more) in enumerate(zip(lengths.tolist(), kept.tolist(), strict=True)):
        line = torch.cat([tokens[row, :n], said[row, :more], tail[row]])
        whole[row, : len(line)] = line
    assert torch.equal(got, texts(square, whole, lengths + kept + 7, 9, WARM))


@ways
def test_row_3_every_pattern_of_acceptance(square: qn.Params, way: qn.Sampling) -> None:
    """Demand 3: a scripted drafter forces each pattern of three rounds, a row for each of the 64.

    Text and state are those of plain decoding after as many tokens.
    """
    script = torch.tensor(list(product(range(1, DRAFT + 2), repeat=3)))
    rows = len(script)
    tokens, lengths = prompts(30, batch=rows), 1 + torch.arange(rows) * 7 % 30
    each = [qn.Sampling(way.temperature, top_p=way.top_p, seed=row) for row in range(rows)]
    text, settings = texts(square, tokens, lengths, 13, each), qn.knobs(each)
    _, state = qn.prefill(square, fresh(square, DRAFT, rows), tokens, lengths)
    before, new = state, text[:, 0]
    for counts in script.unbind(1):
        at = (state.lengths - lengths)[:, None] + 1 + torch.arange(DRAFT)
        right = text.gather(1, at.long())
        guesses = right.where(torch.arange(DRAFT) < counts[:, None] - 1, wrong(right))
        drawn, count, state = qn.accept(square, state, new, guesses, settings, True)
        assert torch.equal(count.long(), counts)
        valid = torch.arange(DRAFT + 1) < counts[:, None]
        line = text.gather(1, (at[:, :1] + torch.arange(DRAFT + 1)).clamp(max=12).long())
        assert torch.equal(drawn, line.where(valid, -1))
        new = qn.newest(drawn, count)
    _, plain = qn.forward(square, before, text[:, :12], script.sum(1))
    check_remembered(square, state, plain)
    assert remembered(square, state, 0)["lengths"] == lengths[0] + 3
