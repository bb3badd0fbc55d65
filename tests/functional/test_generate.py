"""The loop that generates: its text, where it ends, the state it leaves, and what it refuses.

Ends are tested with tokens that the text is known to contain: `text` below, cut by hand.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.state import KV
from qnext.functional.tree import leaves
from tests.samples import relative_rms

CLOSE = 1e-5  # float32 products of other shapes: sums in another order
BATCH, PROMPT, NEW, VOCAB = 5, 13, 9, 211  # no other axis of the model has one of these sizes
LENGTHS = [13, 4, 9, 1, 12]
HOT = qn.Sampling(temperature=1.0, seed=17)


@pytest.fixture(scope="module")
def params(checkpoints: Any) -> qn.Params:
    return checkpoints("base")[2]


@pytest.fixture(scope="module")
def text(params: qn.Params) -> Tensor:
    """What the model says to `prompt()` greedily."""
    return qn.generate(params, empty(params), prompt(), NEW)[0]


def prompt(seq: int = PROMPT, seed: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, seq), generator=torch.Generator().manual_seed(seed))


def empty(params: qn.Params, batch: int = BATCH, capacity: int = 140) -> qn.State:
    return qn.init_state(params.config, batch, capacity)


def cut(text: Tensor, ends: Sequence[int]) -> list[list[int]]:
    """Each row up to its first end, included, then -1."""
    rows = []
    for row in text.tolist():
        stop = min([row.index(e) for e in ends if e in row], default=len(row)) + 1
        rows.append(row[:stop] + [-1] * (len(row) - stop))
    return rows


def returned(text: Tensor) -> list[int]:
    return (text >= 0).sum(1).tolist()


def remembered(state: qn.State, row: int) -> list[Tensor]:
    """All leaves of one sequence's state, as if it were alone."""
    return leaves(qn.select(state, [row]))


def check_close(state: qn.State, row: int, other: qn.State, other_row: int = 0) -> None:
    for a, b in zip(remembered(state, row), remembered(other, other_row), strict=True):
        if a.is_floating_point():
            assert relative_rms(a, b) < CLOSE
        else:
            assert torch.equal(a, b)


class Counter:
    """A function that counts its calls and keeps the arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, []

    def __call__(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        return self.function(*arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("sampling", [qn.Sampling(temperature=0.0), HOT], ids=["greedy", "sampled"])
def test_shape_and_dtype(params: qn.Params, sampling: qn.Sampling, dtype: torch.dtype) -> None:
    out, state = qn.generate(
        params, empty(params), prompt().to(dtype), NEW, torch.tensor(LENGTHS), sampling
    )
    assert out.dtype == torch.int64 and out.shape == (BATCH, NEW)
    assert ((out >= 0) & (out < VOCAB)).all()
    assert state.lengths.tolist() == [n + NEW for n in LENGTHS]


def test_greedy_text_is_the_argmax_of_the_whole_text(params: qn.Params, text: Tensor) -> None:
    """Every token by a forward of all that precedes it, with no state kept."""
    tokens = prompt()
    for _ in range(NEW):
        logits, _ = qn.forward(params, empty(params), tokens)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens[:, PROMPT:], text)


def ends_of(text: Tensor) -> dict[str, Any]:
    """Ways to say where a row ends, with the tokens meant."""
    token = text.tolist()
    unsaid = min(set(range(VOCAB)) - set(text.flatten().tolist()))
    return {
        "int": (token[1][4], [token[1][4]]),
        "list": ([token[2][3], token[0][6]], [token[2][3], token[0][6]]),
        "tuple": ((token[3][1], unsaid), [token[3][1]]),
        "at_once": (token[4][0], [token[4][0]]),
        "last": (token[1][8], [token[1][8]]),
        "empty": ([], []),
        "none": (None, []),
        "never_said": (unsaid, []),
    }


@pytest.mark.parametrize(
    "kind", ["int", "list", "tuple", "at_once", "last", "empty", "none", "never_said"]
)
def test_ends(params: qn.Params, text: Tensor, kind: str) -> None:
    eos, meant = ends_of(text)[kind]
    out, state = qn.generate(params, empty(params), prompt(), NEW, eos=eos)
    assert out.tolist() == cut(text, meant)
    assert state.lengths.tolist() == [PROMPT + n for n in returned(out)]
    assert (min(returned(out)) < NEW) == (kind in ("int", "list", "tuple", "at_once"))


def test_it_stops_when_all_rows_have(params: qn.Params, text: Tensor) -> None:
    """Once every row has ended nothing more is computed; the rest is -1."""
    ends, step = sorted(set(text[:, :3].flatten().tolist())), Counter(qn.decode)
    out, _ = qn.generate(params, empty(params), prompt(), 100, eos=ends, step=step)
    assert out.shape == (BATCH, 100) and out[:, :NEW].tolist() == cut(text, ends)
    assert len(step.calls) == max(returned(out)) <= 3
    assert (out[:, len(step.calls) :] == -1).all()


def test_a_finished_row_rests(params: qn.Params, text: Tensor) -> None:
    """Its state keeps every bit while others go on, and is that of the row run alone to its end."""
    ends = torch.tensor(ends_of(text)["list"][1])
    last: dict[int, list[Tensor]] = {}
    for step, (new, state) in enumerate(
        qn.stream(params, empty(params), prompt(), NEW, stop=lambda new: torch.isin(new, ends))
    ):
        for row, count in enumerate(returned(torch.tensor(cut(text, ends.tolist())))):
            assert (new[row] == -1) == (step >= count)
            if step == count - 1:
                last[row] = remembered(state, row)
            elif step >= count:
                assert all(map(torch.equal, remembered(state, row), last[row]))
    assert len({state.lengths[row].item() for row in range(BATCH)}) > 1
    for row in range(BATCH):
        alone, tokens = empty(params, 1), prompt()[row : row + 1]
        _, alone = qn.generate(params, alone, tokens, NEW, eos=ends.tolist())
        check_close(state, row, alone)


def test_resting_rows_touch_scratch_only(params: qn.Params, text: Tensor) -> None:
    """NaN in row 0 of every pool, where resting rows read and write, reaches nobody."""
    eos, meant = ends_of(text)["at_once"]

    def spoil(pool: Tensor) -> Tensor:
        return pool.index_fill(0, torch.tensor([0]), torch.nan)

    state = empty(params)
    spoilt = state._replace(layers=tuple(type(p)(*map(spoil, p)) for p in state.layers))
    want, clean = qn.generate(params, state, prompt(), NEW, eos=eos)
    got, after = qn.generate(params, spoilt, prompt(), NEW, eos=eos)
    assert got.tolist() == want.tolist() == cut(text, meant)
    for row in range(BATCH):
        check_close(after, row, clean, row)  # no bits: experts' batches differ


@pytest.mark.parametrize("sampling", [qn.Sampling(temperature=0.0), HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "cut_off"])
def test_the_state_has_consumed_all_it_returned(
    params: qn.Params, text: Tensor, ended: bool, sampling: qn.Sampling
) -> None:
    """Going on with `more` is the same as one long prompt: text before, new tokens, more."""
    lengths, more, counts = torch.tensor(LENGTHS), prompt(6, seed=5), torch.tensor([6, 1, 3, 2, 5])
    first, _ = qn.generate(params, empty(params), prompt(), NEW, lengths, sampling)
    eos = [first[1, 3].item(), first[0, 5].item()] if ended else None
    first, state = qn.generate(params, empty(params), prompt(), NEW, lengths, sampling, eos)
    assert (min(returned(first)) < NEW) == ended
    got, state = qn.generate(params, state, more, NEW, counts, sampling)
    whole = [
        torch.cat([prompt()[i, : LENGTHS[i]], first[i, :made], more[i, : counts[i]]])
        for i, made in enumerate(returned(first))
    ]
    longest = max(map(len, whole))
    tokens = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in whole])
    long = torch.tensor([len(row) for row in whole])
    want, other = qn.generate(params, empty(params), tokens, NEW, long, sampling)
    assert torch.equal(got, want)
    for row in range(BATCH):
        check_close(state, row, other, row)


@pytest.mark.parametrize("sampling", [qn.Sampling(temperature=0.0), HOT], ids=["greedy", "sampled"])
def test_ragged_prompts(params: qn.Params, sampling: qn.Sampling) -> None:
    lengths = torch.tensor(LENGTHS)
    padding = torch.arange(PROMPT) >= lengths[:, None]
    tokens = prompt().masked_fill(padding, -1)
    got, state = qn.generate(params, empty(params), tokens, NEW, lengths, sampling)
    for row, count in enumerate(LENGTHS):
        tokens = prompt()[row : row + 1, :count]
        want, alone = qn.generate(params, empty(params, 1), tokens, NEW, sampling=sampling)
        assert got[row].tolist() == want[0].tolist()
        check_close(state, row, alone)


def test_step_replaces_decode(params: qn.Params, text: Tensor) -> None:
    """Called once a returned token, with the tokens drawn, never with -1; its logits count."""
    favourite = 7

    def biased(params: qn.Params, state: qn.State, tokens: Tensor) -> tuple[Tensor, qn.State]:
        logits, state = qn.decode(params, state, tokens)
        return logits.index_fill(-1, torch.tensor([favourite]), 1e3), state

    step = Counter(biased)
    out, _ = qn.generate(params, empty(params), prompt(), 4, step=step)
    assert out[:, 0].tolist() == text[:, 0].tolist()
    assert (out[:, 1:] == favourite).all()
    assert [call[2].tolist() for call in step.calls] == out.T.tolist()
    eos, _ = ends_of(text)["at_once"]
    step = Counter(qn.decode)
    out, _ = qn.generate(params, empty(params), prompt(), NEW, eos=eos, step=step)
    assert len(step.calls) == NEW and out.min() == -1
    for new, (_, _, tokens) in zip(out.T, step.calls, strict=True):
        assert tokens.shape == (BATCH,) and tokens.tolist() == new.clamp(min=0).tolist()


def test_every_row_has_its_own_sampling(params: qn.Params, text: Tensor) -> None:
    """A row draws as it would if the whole batch had its record."""
    each = [
        qn.Sampling(temperature=0.0),
        HOT,
        qn.Sampling(temperature=1.5, top_k=5, seed=3),
        qn.Sampling(temperature=0.8, top_p=0.7, min_p=0.01, seed=4),
        qn.Sampling(temperature=0.0, repetition_penalty=5.0, presence_penalty=0.5),
    ]
    mixed, _ = qn.generate(params, empty(params), prompt(), NEW, sampling=each)
    for row, sampling in enumerate(each):
        same, _ = qn.generate(params, empty(params), prompt(), NEW, sampling=sampling)
        assert mixed[row].tolist() == same[row].tolist()
    assert mixed[0].tolist() == text[0].tolist()
    with pytest.raises(qn.InputError, match="one for each of the 5 rows"):
        qn.generate(params, empty(params), prompt(), NEW, sampling=each[:4])


def test_a_seed_gives_the_same_text_in_any_batch(params: qn.Params) -> None:
    want, _ = qn.generate(params, empty(params), prompt(), NEW, sampling=HOT)
    logits, _ = qn.prefill(params, empty(params), prompt())
    assert torch.equal(qn.sample(logits, HOT, PROMPT), want[:, 0])  # the place that it takes
    others = [qn.Sampling(temperature=2.0, seed=row) for row in range(BATCH)]
    for row in range(BATCH):
        tokens = prompt(seed=row + 20)
        tokens[2] = prompt()[row]  # among strangers, at another place
        records = [*others[:2], HOT, *others[3:]]
        got, _ = qn.generate(params, empty(params), tokens, NEW, sampling=records)
        assert got[2].tolist() == want[row].tolist()
    _, state = qn.forward(params, empty(params), prompt()[:, :6])  # and however it was chunked
    got, _ = qn.generate(params, state, prompt()[:, 6:], NEW, sampling=HOT)
    assert torch.equal(got, want)


def test_the_text_depends_on_the_seed_and_the_position(params: qn.Params) -> None:
    texts = [
        qn.generate(params, empty(params), prompt(), NEW, sampling=qn.Sampling(seed=seed))[0]
        for seed in (0, 1, 2**62, -1)
    ]
    rows = [tuple(row) for text in texts for row in text.tolist()]
    assert len(set(rows)) == len(rows)
    # at a great temperature only the noise counts: positions must not share it
    hottest = qn.Sampling(temperature=1e6)
    drawn, _ = qn.generate(params, empty(params), prompt(), 30, sampling=hottest)
    assert drawn.unique(dim=0).shape[0] == 1  # one seed, same positions: the same for all rows
    assert drawn[0].unique().numel() > 20  # of 30 draws from 211 about 28 differ


def test_penalties_read_prompt_and_text(params: qn.Params) -> None:
    once = qn.Sampling(temperature=0.0, presence_penalty=1e4)
    out, _ = qn.generate(params, empty(params), prompt(), 20, sampling=once)
    assert all(len(set(row)) == 20 for row in out.tolist())
    fresh = qn.Sampling(temperature=0.0, repetition_penalty=1e6)
    lengths = torch.tensor(LENGTHS)
    padding = torch.arange(PROMPT) >= lengths[:, None]
    padded = prompt().masked_fill(padding, -1)
    out, _ = qn.generate(params, empty(params), padded, 20, lengths, fresh)
    for row, tokens in enumerate(out.tolist()):
        assert not set(tokens) & set(padded[row].tolist())
        assert len(set(tokens)) == 20
    padded = prompt().where(~padding, out[:, :PROMPT])  # what only padding holds was not seen
    same, _ = qn.generate(params, empty(params), padded, 20, lengths, fresh)
    assert torch.equal(same, out)


def test_capacity_is_filled_exactly(params: qn.Params, text: Tensor) -> None:
    out, state = qn.generate(params, empty(params, capacity=PROMPT + NEW), prompt(), NEW)
    assert torch.equal(out, text) and torch.equal(state.lengths, state.capacity)
    lengths = torch.tensor(LENGTHS)  # up to the end of a page, which is all there is
    _, state = qn.forward(params, empty(params, capacity=128), prompt(106))
    out, state = qn.generate(params, state, prompt(), NEW, lengths)
    assert state.lengths.tolist() == [106 + n + NEW for n in LENGTHS]
    assert all(not p.key.isnan().any() for p in state.layers if isinstance(p, KV))


@pytest.mark.parametrize("used", [0, 6])
def test_too_little_capacity_is_told_first(
    params: qn.Params, monkeypatch: pytest.MonkeyPatch, used: int
) -> None:
    """Nothing is computed: neither the model nor `step` is called."""
    state = empty(params, capacity=used + PROMPT + NEW - 1)
    if used:
        _, state = qn.forward(params, state, prompt(used))
    for name in ("prefill", "decode", "drawing"):
        monkeypatch.setattr(f"qnext.functional.generate.{name}", lambda *_: pytest.fail("called"))
    lengths = torch.tensor([4, 1, PROMPT, 2, 3])
    with pytest.raises(qn.CapacityError, match=f"row 2 holds {used} .* its capacity is"):
        qn.generate(params, state, prompt(), NEW, lengths, step=lambda *_: pytest.fail("called"))
    waiting = qn.stream(params, state, prompt(), NEW)  # says nothing until it is asked
    with pytest.raises(qn.CapacityError, match="row 0"):
        next(waiting)


@pytest.mark.parametrize("count", [0, -1, True])
def test_at_least_one_token_is_wanted(params: qn.Params, count: int) -> None:
    with pytest.raises(qn.InputError, match="max_new_tokens must be an integer >= 1"):
        qn.generate(params, empty(params), prompt(), count)


def test_an_empty_prompt_is_refused(params: qn.Params) -> None:
    with pytest.raises(qn.InputError, match=r"empty prompt: lengths\[1\] = 0"):
        qn.generate(params, empty(params), prompt(), NEW, torch.tensor([3, 0, 1, 1, 1]))


def test_stream_is_generate_token_by_token(params: qn.Params, text: Tensor) -> None:
    """Each yielded state has consumed each yielded token, so any of them can be gone on from."""
    pieces = list(qn.stream(params, empty(params), prompt(), NEW))
    assert torch.equal(torch.cat([new for new, _ in pieces], dim=1), text)
    for made, (_, state) in enumerate(pieces[:-1], start=1):
        assert state.lengths.tolist() == [PROMPT + made] * BATCH
    more = prompt(1, seed=9)[:, 0]
    got, _ = qn.decode(params, pieces[3][1], more)
    whole = torch.cat([prompt(), text[:, :4], more[:, None]], dim=1)
    again, _ = qn.forward(params, empty(params), whole)
    assert relative_rms(got, again[:, -1]) < CLOSE
