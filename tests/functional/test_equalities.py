"""What must be equal to what: splits, ragged batches, padding, page tables, purity.

All in float32 and between our own functions. "Bits" below means `torch.equal`, which NaN fails.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qnext as qn
from qnext.functional.config import PAGE
from qnext.functional.state import KV
from qnext.functional.tree import leaves, leaves_with_paths, rebuild
from tests.samples import relative_rms
from tests.sequences import (
    BATCH,
    CLOSE,
    HARSH,
    VOCAB,
    Result,
    check_close,
    check_memory,
    check_same,
    content,
    relocate,
    result,
    run,
    spoil,
    started,
    words,
)

MODELS = ("base", "wide_values")
FEW = settings(deadline=None, max_examples=4, derandomize=True)
RAGGED = [9, 0, 13, 1, 6]  # 13 columns: full, empty and in between
LONG = [70, 0, 19, 1, 64]  # of 70 columns: the chunked form, with padding in every chunk


@pytest.fixture(scope="module", params=MODELS)
def params(request: pytest.FixtureRequest, checkpoints: Any) -> qn.Params:
    return checkpoints(request.param)[2]


@FEW
@given(cuts=st.sets(st.integers(1, 150), max_size=4))
def test_a_split_changes_nothing(params: qn.Params, cuts: set[int]) -> None:
    """forward(a ++ b) == forward(b) after forward(a): logits and every leaf of the state."""
    want = run(params, qn.init_state(params.config, BATCH, 151), words(151), [151] * BATCH)
    state, parts = qn.init_state(params.config, BATCH, 151), []
    for chunk in words(151).tensor_split(sorted(cuts), dim=1):
        logits, state = qn.forward(params, state, chunk)
        parts.append(logits)
    check_close(result(params, torch.cat(parts, 1), state, [151] * BATCH), want)


@FEW
@given(
    first=st.lists(st.integers(0, 67), min_size=BATCH, max_size=BATCH),
    second=st.lists(st.integers(0, 18), min_size=BATCH, max_size=BATCH),
)
def test_ragged_rows_are_rows_alone(params: qn.Params, first: list[int], second: list[int]) -> None:
    """Two calls, so that fresh and started sequences share the second one."""
    a, b = words(67), words(18, seed=4)
    state = qn.init_state(params.config, BATCH, 85)
    _, state = qn.forward(params, state, a, torch.tensor(first))
    got = run(params, state, b, second)
    for row in range(BATCH):
        state = qn.init_state(params.config, 1, 85)
        if first[row]:
            _, state = qn.forward(params, state, a[row : row + 1, : first[row]])
        if second[row]:
            alone = run(params, state, b[row : row + 1, : second[row]], second[row : row + 1])
            check_close(Result([got.logits[row]], [got.memory[row]]), alone)


@pytest.mark.parametrize("garbage", [-1, VOCAB, 10**9])
@pytest.mark.parametrize("lengths", [RAGGED, LONG], ids=["short", "long"])
def test_padding_may_hold_anything(params: qn.Params, lengths: list[int], garbage: int) -> None:
    """Not one bit changes, not even in results that mean nothing."""
    state, tokens, counts = started(params), words(max(lengths)), torch.tensor(lengths)
    valid = torch.arange(max(lengths)) < counts[:, None]
    want = qn.forward(params, state, tokens, counts)
    got = qn.forward(params, state, tokens.where(valid, garbage), counts)
    assert all(map(torch.equal, leaves(got), leaves(want)))


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("lengths", [RAGGED, LONG], ids=["short", "long"])
def test_an_empty_row_rests(params: qn.Params, lengths: list[int], draft: int) -> None:
    before, tokens = started(params, draft), words(max(lengths))
    for counts in (lengths, [0] * BATCH):
        _, after = qn.forward(params, before, tokens, torch.tensor(counts))
        for row in [row for row in range(BATCH) if counts[row] == 0]:
            check_memory(content(params, after, row), content(params, before, row))


def test_padding_beyond_the_last_page(params: qn.Params) -> None:
    """Padded positions may lie past all room a row has; they must not come round to its start."""
    tokens, lengths = words(13), [1, 0, 8, 3, 2]
    state, roomy = (qn.init_state(params.config, BATCH, room) for room in (128, 250))
    (_, state), (_, roomy) = (qn.forward(params, s, words(120)) for s in (state, roomy))
    got, want = run(params, state, tokens, lengths), run(params, roomy, tokens, lengths)
    for mine, other in zip(got.memory, want.memory, strict=True):
        assert mine.pop("capacity") < other.pop("capacity")
    check_same(got, want)


def test_the_order_of_rows_is_free(params: qn.Params) -> None:
    order = [3, 0, 4, 1, 2]
    state, tokens = started(params), words(13)
    want = run(params, state, tokens, RAGGED)
    got = run(params, qn.select(state, order), tokens[order], [RAGGED[row] for row in order])
    check_close(got, Result(*([part[row] for row in order] for part in want)))


@pytest.mark.parametrize("lengths", [RAGGED, LONG], ids=["short", "long"])
@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("change", [spoil, relocate], ids=["poisoned", "relocated"])
def test_only_content_is_read(
    params: qn.Params, change: Callable[..., qn.State], draft: int, lengths: list[int]
) -> None:
    """NaN in scratch rows, unused slots and pages beyond `lengths`, or other places: same bits."""
    state = started(params, draft)
    other = spoil(params, state) if change is spoil else relocate(spoil(params, state))
    tokens = words(max(lengths))
    check_same(run(params, other, tokens, lengths), run(params, state, tokens, lengths))
    wanted, got = qn.decode(params, state, tokens[:, 0]), qn.decode(params, other, tokens[:, 0])
    assert torch.equal(got[0], wanted[0])
    counts = torch.tensor(lengths).clamp(min=1)
    wanted, got = (qn.prefill(params, s, tokens, counts) for s in (state, other))
    assert torch.equal(got[0], wanted[0])
    for row in range(BATCH):
        check_memory(content(params, got[1], row), content(params, wanted[1], row))


def test_pages_not_yet_needed_may_be_unassigned(params: qn.Params) -> None:
    """A server gives a page when a sequence reaches it; until then its table says scratch."""
    state = started(params)
    reached = (state.lengths + 13 + PAGE - 1) // PAGE
    other = state._replace(
        block_table=state.block_table.where(torch.arange(3) < reached[:, None], 0)
    )
    check_same(run(params, other, words(13), RAGGED), run(params, state, words(13), RAGGED))


@pytest.mark.parametrize("seq", [1, 4, 13, 70])
def test_room_for_drafts_changes_nothing(params: qn.Params, seq: int) -> None:
    """Also where a prompt is exactly as long as a round of speculation (draft + 1 = 4)."""
    plain, ready, tokens = started(params), started(params, draft=3), words(seq)
    assert ready.slots.shape == (BATCH, 4)
    check_same(run(params, ready, tokens, [seq] * BATCH), run(params, plain, tokens, [seq] * BATCH))
    want, got = (qn.prefill(params, s, tokens) for s in (plain, ready))
    assert torch.equal(got[0], want[0])
    want, got = (qn.decode(params, s, tokens[:, 0]) for _, s in (want, got))
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("seq", [1, 2, 13, 40])
def test_windows_are_read_at_their_offset(params: qn.Params, seq: int) -> None:
    """A window that begins later in its row, as after a partly accepted draft, gives the same."""
    state = started(params, draft=3)
    offset, width = torch.tensor([0, 3, 1, 2, 3]), params.config.linear_conv_kernel_dim - 1

    def shift(pool: Tensor) -> Tensor:
        new = torch.full_like(pool, torch.nan)
        for row, at in zip(state.rows.tolist(), offset.tolist(), strict=True):
            new[row, at : at + width] = pool[row, :width]
        return new

    layers = [p if isinstance(p, KV) else p._replace(window=shift(p.window)) for p in state.layers]
    moved = state._replace(accepted=offset.int(), layers=tuple(layers))
    tokens, lengths = words(seq), [seq, 1, seq, 0, seq]
    check_same(run(params, moved, tokens, lengths), run(params, state, tokens, lengths))


def test_select_takes_rows_as_they_are(params: qn.Params) -> None:
    state, rows = started(params, draft=3), [4, 1, 1]
    chosen, tokens = qn.select(state, rows), words(6, batch=3)
    for new, old in enumerate(rows):
        check_memory(content(params, chosen, new), content(params, state, old))
    want = run(params, state, words(6).index_put((torch.tensor([4, 1]),), tokens[:2]), [6] * BATCH)
    got = run(params, chosen, tokens, [6] * 3)
    check_close(Result(got[0][:2], got[1][:2]), Result(*([p[4], p[1]] for p in want)))


def test_forks_do_not_disturb_each_other(params: qn.Params) -> None:
    state = started(params)
    left, right = words(7, seed=1), words(7, seed=2)
    want = [run(params, started(params), tokens, [7] * BATCH) for tokens in (left, right)]
    other = qn.fork(state)
    check_same(run(params, state, left, [7] * BATCH), want[0])
    check_same(run(params, other, right, [7] * BATCH), want[1])
    check_same(run(params, state, left, [7] * BATCH), want[0])


CALLS: dict[str, Callable[[qn.Params, qn.State, Tensor, Tensor, Path], object]] = {
    "forward": lambda p, s, t, n, _: qn.forward(p, s, t, n),
    "prefill": lambda p, s, t, n, _: qn.prefill(p, s, t, n.clamp(min=1)),
    "decode": lambda p, s, t, *_: qn.decode(p, s, t[:, 0]),
    "generate": lambda p, s, t, n, _: qn.generate(p, s, t, 4, n.clamp(min=1), eos=[7]),
    "sampled": lambda p, s, t, n, _: qn.generate(
        p, s, t, 3, n.clamp(min=1), qn.Sampling(1.0, 50, 0.9, repetition_penalty=1.2)
    ),
    "select": lambda p, s, *_: qn.select(s, [2, 0, 2]),
    "fork": lambda p, s, *_: qn.fork(s),
    "save_state": lambda p, s, t, n, path: qn.save_state(p, s, path / "state"),
    "save": lambda p, s, t, n, path: qn.save(p, path),
}


@pytest.mark.parametrize("call", CALLS)
def test_arguments_stay_as_they_are(params: qn.Params, call: str, tmp_path: Path) -> None:
    """No argument's leaf changes, nor is written to with the value it had; twice gives the same."""
    arguments = (params, started(params, draft=3), words(13), torch.tensor(RAGGED))
    before = [(leaf, leaf.clone(), leaf._version) for leaf in leaves(arguments)]
    first = CALLS[call](*arguments, tmp_path)
    for leaf, copy, version in before:
        assert torch.equal(leaf, copy) and leaf._version == version
    again = CALLS[call](*arguments, tmp_path)
    assert all(map(torch.equal, leaves(first or ()), leaves(again or ())))


def test_tokens_may_be_int32(params: qn.Params) -> None:
    state, tokens, counts = started(params), words(13), torch.tensor(RAGGED)
    want = qn.forward(params, state, tokens, counts)
    got = qn.forward(params, state, tokens.int(), counts.int())
    assert all(map(torch.equal, leaves(got), leaves(want)))
    want, got = (qn.decode(params, state, t[:, 0]) for t in (tokens, tokens.int()))
    assert all(map(torch.equal, leaves(got), leaves(want)))


@pytest.mark.parametrize("lengths", [[9, 2, 13, 1, 6], [70, 17, 19, 1, 64]], ids=["short", "long"])
def test_prefill_is_the_last_of_forward(params: qn.Params, lengths: list[int]) -> None:
    state, tokens, counts = started(params), words(max(lengths)), torch.tensor(lengths)
    logits, after = qn.forward(params, state, tokens, counts)
    last, same = qn.prefill(params, state, tokens, counts)
    assert relative_rms(last, logits[torch.arange(BATCH), counts - 1]) < CLOSE
    assert all(map(torch.equal, leaves(same), leaves(after)))


def test_decode_is_prefill_of_one_token(params: qn.Params) -> None:
    state, token = started(params), words(1)
    want, got = qn.prefill(params, state, token), qn.decode(params, state, token[:, 0])
    assert all(map(torch.equal, leaves(got), leaves(want)))


def _changed(params: qn.Params, name: str, change: Callable[[Tensor], Tensor]) -> qn.Params:
    """The params with the leaves whose path ends with `name` changed."""
    made = [change(x) if path.endswith(name) else x for path, x in leaves_with_paths(params)]
    return rebuild(params, made)


EXTREMES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "tiny_keys": (".conv", lambda x: x * 1e-5),  # queries and keys far below the l2 norm's eps
    "strong_decay": (".dt_bias", lambda x: x + 30),  # log decays from about -2 to -240
    "no_decay": (".A_log", lambda x: x - 30),
    "large_activations": (".embed", lambda x: x * 1e5),  # beyond the range of float16
}


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes_token_by_token(params: qn.Params, extreme: str) -> None:
    """The chunked form against the scan, where serving stacks have gone apart."""
    odd = _changed(params, *EXTREMES[extreme])
    want = run(odd, started(odd), words(18), [18] * BATCH)
    assert all(part.isfinite().all() for part in want.logits)
    state, steps = started(odd), []
    for token in words(18).unbind(1):
        logits, state = qn.decode(odd, state, token)
        steps.append(logits)
    check_close(result(odd, torch.stack(steps, 1), state, [18] * BATCH), want, HARSH)
