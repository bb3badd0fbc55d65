"""Speculation beside plain decoding: the same text and the same state, whatever was guessed.

float32 throughout; products of several rows at once sum in another order, which no draw of these
fixed seeds is near enough to feel.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import qnext as qn
from qnext.functional.config import PAGE
from qnext.functional.model import trunk
from qnext.functional.tree import leaves, leaves_with_paths
from tests.samples import ODD, relative_rms
from tests.sequences import HARSH, check_memory, content, model

BATCH, PROMPT, VOCAB = 3, 130, 211
GREEDY = qn.Sampling(temperature=0.0)
WAYS: dict[str, qn.Sampling | list[qn.Sampling]] = {
    "greedy": GREEDY,
    "warm": qn.Sampling(0.7, top_p=0.9, seed=5),
    "hot": qn.Sampling(1.0, top_p=0.9, seed=6),
    "each its own": [
        qn.Sampling(0.8, top_k=20, min_p=0.02, seed=7, repetition_penalty=1.3),
        qn.Sampling(0.0, presence_penalty=0.7, frequency_penalty=0.3),
        qn.Sampling(1.2, seed=-9),
    ],
}
FEW = settings(deadline=None, max_examples=8, derandomize=True, phases=[Phase.generate])


@pytest.fixture(
    scope="module",
    params=["base", *(pytest.param(name, marks=pytest.mark.slow) for name in ("conv3", "demo"))],
)
def params(request: pytest.FixtureRequest) -> qn.Params:
    """Models with an MTP module; the random ones' guesses are nearly never right."""
    return made(request.param)


@pytest.fixture(scope="module")
def odd() -> qn.Params:
    return made("base")


def made(name: str) -> qn.Params:
    if name == "demo":
        return qn.demo(torch.float32)
    return model(**ODD.get(name, {}) | {"mtp_num_hidden_layers": 1})


def prompts(seq: int = PROMPT, seed: int = 3, batch: int = BATCH) -> Tensor:
    return torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def fresh(params: qn.Params, draft: int, batch: int = BATCH, capacity: int = 300) -> qn.State:
    return qn.init_state(params.config, batch, capacity, draft=draft)


def remembered(params: qn.Params, state: qn.State, row: int) -> dict[str, Tensor]:
    """All that a sequence remembers, the module's part as well."""
    found, pools = content(params, state, row), state.mtp[0]
    pairs = int(state.mtp_lengths[row])
    at = (state.block_table[row].long()[:, None] * PAGE + torch.arange(PAGE)).flatten()[:pairs]
    found |= {"mtp.key": pools.key.flatten(0, 1)[at], "mtp.value": pools.value.flatten(0, 1)[at]}
    present = pools.hidden[int(state.rows[row]), int(state.accepted[row])]
    return found | {"mtp.lengths": state.mtp_lengths[row], "mtp.hidden": present}


def check_remembered(params: qn.Params, got: qn.State, want: qn.State) -> None:
    for row in range(want.batch):
        mine, other = remembered(params, got, row), remembered(params, want, row)
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name].shape == other[name].shape, name
            if mine[name].is_floating_point() and other[name].any():
                assert relative_rms(mine[name], other[name]) < HARSH, name
            else:
                assert torch.equal(mine[name], other[name]), name


# --- the text and the state are those of plain decoding -----------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_text_and_state_are_those_of_plain_decoding(params: qn.Params, way: str) -> None:
    """Ragged rows, 1 to 7 guesses; the plain side steps on a state with the same room."""
    tokens, lengths = prompts(40), torch.tensor([17, 40, 1])
    for draft in {"greedy": (1, 4), "warm": (2,), "hot": (7,), "each its own": (3,)}[way]:
        want, plain = qn.generate(params, fresh(params, draft), tokens, 22, lengths, WAYS[way])
        got, state = qn.generate(
            params, fresh(params, draft), tokens, 22, lengths, WAYS[way], draft=draft
        )
        assert torch.equal(got, want)
        check_remembered(params, state, plain)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("draft", [5, 6])
def test_batches(params: qn.Params, batch: int, draft: int) -> None:
    tokens = prompts(20, batch=batch)
    lengths = 1 + torch.arange(batch) * 7 % 20
    way = WAYS["warm"]
    want, _ = qn.generate(params, fresh(params, 0, batch), tokens, 10, lengths, way)
    got, _ = qn.generate(params, fresh(params, draft, batch), tokens, 10, lengths, way, draft=draft)
    assert torch.equal(got, want)


def test_a_request_draws_the_same_whatever_shares_its_batch(params: qn.Params) -> None:
    tokens, alone = prompts(9), qn.Sampling(0.9, seed=21)
    others = [qn.Sampling(1.1, seed=3), alone, qn.Sampling(0.0)]
    whole, _ = qn.generate(params, fresh(params, 2), tokens, 20, sampling=others, draft=2)
    single, _ = qn.generate(params, fresh(params, 5, 1), tokens[1:2], 20, sampling=alone, draft=5)
    assert torch.equal(whole[1:2], single)


def test_the_demo_s_guesses_are_mostly_right() -> None:
    """So that the tests here see long drafts accepted, and refused in the middle."""
    params, text = made("demo"), qn.tokenizer()
    prompt = torch.tensor([text.encode("Question: Tom has 9 pens and buys 8. How many?\nAnswer:")])
    steps = qn.stream(params, fresh(params, 3, 1), prompt, 40, draft=3)
    counts = [int((new >= 0).sum()) for new, _ in steps]
    assert sum(counts) == 40 and {4} < set(counts) and sum(counts) / len(counts) > 2


# --- planted guesses -----------------------------------------------------------------------------


class Planted:
    """A drafter that knows the text and is right with probability p: a step for `generate`."""

    def __init__(self, text: Tensor, starts: Tensor, p: float, seed: int) -> None:
        self.text, self.starts, self.p = text, starts, p
        self.generator = torch.Generator().manual_seed(seed)
        self.counts: list[list[int]] = []

    def __call__(
        self, params: qn.Params, state: qn.State, tokens: Tensor, draft: int, *how: Any
    ) -> tuple[Tensor, Tensor, qn.State]:
        at = (state.lengths - self.starts)[:, None] + 1 + torch.arange(draft)
        right = self.text.gather(1, at.clamp(max=self.text.shape[1] - 1).long())
        wrong = torch.rand(right.shape, generator=self.generator) >= self.p
        guesses = torch.where(wrong, (right + 1) % VOCAB, right)
        drawn, count, state = qn.accept(params, state, tokens, guesses, *how)
        self.counts.append(count.tolist())
        return drawn, count, state


@pytest.mark.slow
@FEW
@given(
    draft=st.integers(1, 7),
    p=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    lengths=st.lists(st.integers(1, PROMPT), min_size=BATCH, max_size=BATCH),
    way=st.sampled_from(sorted(WAYS)),
    seed=st.integers(0, 99),
)
def test_any_pattern_of_acceptance(
    odd: qn.Params, draft: int, p: float, lengths: list[int], way: str, seed: int
) -> None:
    """Same text; and every state on the way goes on as plain decoding does from there."""
    tokens, counts, new = prompts(seed=seed), torch.tensor(lengths), 16
    want, plain = qn.generate(odd, fresh(odd, draft), tokens, new, counts, WAYS[way])
    planted = Planted(want, counts, p, seed)
    how = (new, counts, WAYS[way], None, draft, planted)
    steps = list(qn.stream(odd, fresh(odd, draft), tokens, *how))
    made: list[list[int]] = [[] for _ in range(BATCH)]
    for block, state in steps:
        for row, line in enumerate(block.tolist()):
            made[row] += [token for token in line if token >= 0]
        assert state.lengths.tolist() == [n + len(m) for n, m in zip(lengths, made, strict=True)]
    assert made == want.tolist()
    check_remembered(odd, steps[-1][1], plain)
    if p == 1.0:
        assert all(c == draft + 1 for line in planted.counts[:-2] for c in line)
    if p == 0.0:
        assert all(c <= 1 for line in planted.counts for c in line)
    middle = steps[len(steps) // 2][1]
    follow = torch.tensor(
        [
            text[int(n)]
            for text, n in zip([[*m, 0] for m in made], middle.lengths - counts, strict=True)
        ]
    )
    logits, _ = qn.decode(odd, middle, follow)
    whole = torch.cat([tokens, torch.zeros(BATCH, new + 1, dtype=torch.int64)], dim=1)
    for row, n in enumerate(lengths):
        upto = int(middle.lengths[row]) - n
        whole[row, n : n + upto + 1] = torch.tensor([*made[row][:upto], int(follow[row])])
    again, _ = qn.prefill(odd, fresh(odd, 0), whole, middle.lengths + 1)
    assert relative_rms(logits, again) < HARSH


def test_rows_accept_different_counts(odd: qn.Params) -> None:
    tokens = prompts(9)
    logits, state = qn.prefill(odd, fresh(odd, 3), tokens)
    new = logits.argmax(-1)
    text, _ = qn.generate(odd, fresh(odd, 3), tokens, 5)
    guesses = text[:, 1:4].clone()
    guesses[0, 0] += 1
    guesses[2, 2] += 1
    drawn, count, after = qn.accept(odd, state, new, guesses % VOCAB)
    assert count.tolist() == [1, 4, 3]
    assert drawn.tolist() == [
        [*text[r, 1 : 1 + n].tolist(), *[-1] * (4 - n)] for r, n in enumerate([1, 4, 3])
    ]
    assert (after.lengths - state.lengths).tolist() == [1, 4, 3]
    assert qn.newest(drawn, count).tolist() == [int(text[0, 1]), int(text[1, 4]), int(text[2, 3])]


@pytest.mark.parametrize("way", ["greedy", "hot"])
def test_every_state_on_the_way_goes_on(odd: qn.Params, way: str) -> None:
    """With as many guesses as it likes, or none: the rest of the text is the same from each."""
    tokens, lengths, new = prompts(20), torch.tensor([20, 1, 13]), 9
    want, _ = qn.generate(odd, fresh(odd, 0), tokens, 24, lengths, WAYS[way])
    planted = Planted(want, lengths, 0.7, seed=4)
    steps = list(qn.stream(odd, fresh(odd, 3), tokens, new, lengths, WAYS[way], None, 3, planted))
    assert len({count for line in planted.counts for count in line}) > 2
    for number, (_, state) in enumerate(steps):
        at = (state.lengths - lengths).long()[:, None]  # the next token is given, not drawn
        more, rest = want.gather(1, at), want.gather(1, at + 1 + torch.arange(4))
        got, _ = qn.generate(odd, state, more, 4, None, WAYS[way], draft=number % 4)
        assert torch.equal(got, rest)


def test_a_saved_state_speculates_on(params: qn.Params, tmp_path: Path) -> None:
    """Slots permuted, a window that begins late, the module's part: all of it is in the file."""
    tokens, lengths, way = prompts(9), torch.tensor([9, 2, 5]), WAYS["warm"]
    _, state = qn.generate(params, fresh(params, 3), tokens, 7, lengths, way, draft=3)
    qn.save_state(params, state, tmp_path / "state")
    loaded = qn.load_state(params, tmp_path / "state")
    want, after = qn.generate(params, state, tokens[:, :2], 8, None, way, draft=3)
    got, again = qn.generate(params, loaded, tokens[:, :2], 8, None, way, draft=3)
    assert torch.equal(got, want) and all(map(torch.equal, leaves(again), leaves(after)))


# --- the module follows ---------------------------------------------------------------------------


def taught(params: qn.Params, tokens: Tensor, lengths: Sequence[int]) -> qn.State:
    """What the module remembers when it is fed the whole text with the model's hidden states."""
    counts = torch.tensor(lengths, dtype=torch.int32)
    hidden, state = trunk(params, fresh(params, 0), tokens, counts)
    return qn.mtp(params, state, hidden[:, :-1], tokens[:, 1:], counts - 1)[2]


CALLS: dict[str, Callable[[qn.Params, qn.State, Tensor], qn.State]] = {
    "forward": lambda p, s, t: qn.forward(p, s, t, torch.tensor([4, 1, 3]))[1],
    "prefill": lambda p, s, t: qn.prefill(p, s, t, torch.tensor([2, 4, 1]))[1],
    "decode": lambda p, s, t: qn.decode(p, s, t[:, 0])[1],
    "rest": lambda p, s, t: qn.forward(p, s, t, torch.tensor([0, 2, 0]))[1],
    "verify": lambda p, s, t: qn.commit(qn.verify(p, s, t)[1], torch.tensor([2, 1, 4])),
    "verify some": lambda p, s, t: qn.commit(
        qn.verify(p, s, t, torch.tensor([4, 0, 2]))[1], torch.tensor([3, 0, 1])
    ),
    "rewind": lambda p, s, t: qn.rewind(
        qn.commit(qn.verify(p, s, t)[1], torch.tensor([4, 3, 2])), torch.tensor([3, 0, 1])
    ),
}


@pytest.mark.parametrize("order", [list(CALLS), list(CALLS)[::-1], ["verify"] * 3 + ["decode"]])
def test_the_module_follows_whatever_the_state_consumes(odd: qn.Params, order: list[str]) -> None:
    """From a fresh state: the module knows what it would know, fed with the whole text at once."""
    state = fresh(odd, 3)
    text: list[list[int]] = [[] for _ in range(BATCH)]
    for number, name in enumerate(order):
        tokens = prompts(4, seed=40 + number)
        after = CALLS[name](odd, state, tokens)
        for row, n in enumerate((after.lengths - state.lengths).tolist()):
            text[row] += tokens[row, :n].tolist()
        state = after
    width = max(map(len, text))
    whole = torch.tensor([line + [0] * (width - len(line)) for line in text])
    want = taught(odd, whole, [len(line) for line in text])
    assert state.mtp_lengths.tolist() == want.mtp_lengths.tolist()
    for row in range(BATCH):
        mine, other = remembered(odd, state, row), remembered(odd, want, row)
        for name in ("mtp.key", "mtp.value"):
            assert relative_rms(mine[name], other[name]) < HARSH


@pytest.mark.parametrize("draft", [1, 4])
def test_the_module_follows_generate(params: qn.Params, draft: int) -> None:
    """After its own drafts it knows the whole text, and where the model stands: its hidden state.

    Beside `mtp` on a state without room, fed with all the model's hidden states at once.
    """
    tokens, lengths, new = prompts(11), torch.tensor([11, 2, 6]), 9
    text, state = qn.generate(params, fresh(params, draft), tokens, new, lengths, draft=draft)
    rows = zip(tokens, lengths, text, strict=True)
    whole = torch.stack([torch.cat([t[:n], more, t[n:]]) for t, n, more in rows])
    counts = (lengths + new).int()
    hidden, _ = trunk(params, fresh(params, 0), whole, counts)
    want = taught(params, whole, counts.tolist())
    for row, count in enumerate(counts.tolist()):
        mine, other = remembered(params, state, row), remembered(params, want, row)
        assert torch.equal(mine["mtp.lengths"], other["mtp.lengths"])
        for name in ("mtp.key", "mtp.value"):
            assert relative_rms(mine[name], other[name]) < HARSH
        assert relative_rms(mine["mtp.hidden"], hidden[row, count - 1]) < HARSH


VALUES: dict[str, Callable[[qn.Params, qn.State, Tensor], Any]] = {
    "draft": lambda p, s, t: qn.draft(p, s, t[:, 0], 3),
    "accept": lambda p, s, t: qn.accept(p, s, t[:, 0], t[:, 1:]),
    "rewind": lambda p, s, t: qn.rewind(s, torch.tensor([2, 0, 1])),
    "generate": lambda p, s, t: qn.generate(p, s, t, 6, torch.tensor([4, 1, 2]), draft=3),
}


@pytest.mark.parametrize("name", VALUES)
def test_arguments_are_not_written_to(odd: qn.Params, name: str) -> None:
    """A state is a value, the module's part of it as well: whatever was made of it, it stands."""
    _, state = qn.prefill(odd, fresh(odd, 3), prompts(9), torch.tensor([9, 1, 4]))
    state = qn.commit(qn.verify(odd, state, prompts(4))[1], torch.tensor([4, 1, 2]))
    given = (odd, state, prompts(4, seed=8))
    old = [(leaf, leaf.clone(), leaf._version) for leaf in leaves(given)]
    first, second = (VALUES[name](*given) for _ in range(2))
    for leaf, copy, version in old:
        assert torch.equal(leaf, copy) and leaf._version == version
    assert all(map(torch.equal, leaves(first), leaves(second)))


def test_a_draft_is_the_module_s_chain(odd: qn.Params) -> None:
    """What `draft` guesses is what `mtp` says, fed by hand on a state of its own."""
    tokens, new = prompts(12), torch.tensor([3, 99, 7])
    hidden, state = trunk(odd, fresh(odd, 0), tokens, torch.full((BATCH,), 12, dtype=torch.int32))
    _, _, state = qn.mtp(odd, state, hidden[:, :-1], tokens[:, 1:])
    last, token, want = hidden[:, -1:], new, []
    for _ in range(3):
        logits, last, state = qn.mtp(odd, state, last, token[:, None])
        token = logits[:, 0].argmax(-1)
        want.append(token)
    _, ready = qn.prefill(odd, fresh(odd, 3), tokens)
    before = [leaf.clone() for leaf in leaves(ready)]
    guesses, drafted = qn.draft(odd, ready, new, 3)
    assert torch.equal(guesses, torch.stack(want, dim=1))
    assert all(map(torch.equal, leaves(ready), before))
    for row in range(BATCH):  # nothing that counts has changed
        check_memory(remembered(odd, drafted, row), remembered(odd, ready, row))
    changed = [
        path
        for (path, old), (_, fresh_one) in zip(
            leaves_with_paths(ready), leaves_with_paths(drafted), strict=True
        )
        if old is not fresh_one
    ]
    assert changed == [".mtp[0].key", ".mtp[0].value"]
