"""Bugs that serving stacks for this model had, through compiled and captured steps on the device.

Numbers are those of the inventory of serving stacks (section 8). Slots, layouts, buckets, replays
and speculation are here; dtypes and decay in test_known_roundings.
"""

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.state import KV, Delta
from qnext.functional.tree import leaves, leaves_with_paths, map_leaves
from tests.npu.models import BF16, copied, here, there
from tests.npu.runs import (
    BUDGET,
    DRAFT,
    F32,
    RULE,
    STEPS,
    compiled,
    exact,
    recurrent,
    run,
    weights,
)
from tests.samples import relative_rms
from tests.sequences import BATCH, VOCAB, turned, used, words

drafts = pytest.mark.parametrize("draft", [0, DRAFT])

# --- layouts and slots of the recurrent state --------------------------------------------------


@drafts
def test_2_a_second_chunk_reads_what_the_first_wrote(draft: int) -> None:
    """Bug 2: states written [dv, dk] and read [dk, dv] by the next chunk of a prefill."""
    given, tokens, cut = weights(), words(70), 33
    truth, state = exact(given), used(given, draft)
    lengths = torch.tensor([70, 69, 65, 70, 66])
    want = qn.forward(truth, used(truth, draft), tokens, lengths)[0][:, cut:65]  # all valid
    whole = run(qn.forward, given, state, tokens, lengths)[0][:, cut:65]
    _, half = run(qn.forward, given, state, tokens[:, :cut])
    pieces = run(qn.forward, given, half, tokens[:, cut:], lengths - cut)[0][:, : 65 - cut]
    assert max(relative_rms(whole, want), relative_rms(pieces, want)) < BUDGET
    other, _ = run(qn.forward, given, turned(half), tokens[:, cut:], lengths - cut)
    assert relative_rms(other[:, :3], want[:, :3]) > 5 * BUDGET  # it would show


@drafts
@pytest.mark.parametrize("kept", [BF16, F32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("seq", [DRAFT + 1, 30])
def test_27_the_last_state_is_that_of_decode(seq: int, kept: torch.dtype, draft: int) -> None:
    """Bug 27: the final state of a prefill written twice, or turned only with drafts."""
    given = weights(kept)
    state, tokens = used(given, draft), words(seq)
    logits, after = run(qn.prefill, given, state, tokens)
    step, now = state, state
    for token in tokens.unbind(1):
        want, now = run(qn.decode, given, now, token)
    assert relative_rms(recurrent(after), recurrent(now)) < RULE
    assert relative_rms(logits, want) < BUDGET
    assert relative_rms(recurrent(turned(after)), recurrent(now)) > 0.5
    spare = state.slots[:, 1:].flatten().long()
    for part, old in zip(after.layers, step.layers, strict=True):
        if isinstance(part, Delta):
            assert torch.equal(part.recurrent[spare], old.recurrent[spare])


def reused(state: qn.State, fill: float | None) -> qn.State:
    """All rows given to new sequences: present state and window cleared, the rest as it was."""

    def left(pool: Tensor) -> Tensor:
        return pool if fill is None else torch.full_like(pool, fill)

    def cleared(p: KV | Delta) -> KV | Delta:
        if isinstance(p, KV):
            return KV(*map(left, p))
        states, window = left(p.recurrent).clone(), left(p.window).clone()
        states[state.slots[:, 0].long()] = 0
        window[state.rows.long(), :3] = 0  # width - 1 inputs, from the front
        return Delta(states, window)

    none = torch.zeros_like(state.lengths)
    layers = tuple(map(cleared, state.layers))
    return state._replace(lengths=none, accepted=none.clone(), layers=layers)


@drafts
def test_26_a_reused_place_is_as_good_as_a_fresh_one(draft: int) -> None:
    """Bug 26: a slot, a window's row and pages come from a sequence that has ended; same bits."""
    given, tokens, lengths = weights(), words(30), torch.tensor([30, 1, 17, 2, 29])
    state, fresh = (reused(used(given, draft), fill) for fill in (None, 0.0))
    got, after = run(qn.prefill, given, state, tokens, lengths)
    want, alone = run(qn.prefill, given, fresh, tokens, lengths)
    for token in (words(1)[:, 0], words(1, seed=4)[:, 0]):
        assert torch.equal(got, want) and torch.equal(recurrent(after), recurrent(alone))
        got, after = run(qn.decode, given, after, token)
        want, alone = run(qn.decode, given, alone, token)
    assert torch.equal(got, want)


@pytest.mark.parametrize("host_lengths", [False, True], ids=["mask", "host"])
def test_26_a_reused_page_may_have_held_nan(host_lengths: bool) -> None:
    """Bug 26, where what the last owner left is no number.

    The fused call multiplies what a mask hides by 0, and 0 times NaN is NaN: `clear` is what makes
    rows fit for another sequence. Exact lengths from the host never look there.
    """
    given, token = weights(), words(1)[:, 0]
    left = reused(used(given), torch.nan)
    state = left if host_lengths else qn.clear(left, list(range(BATCH)))
    step = compiled(qn.decode, (given, left, token), host_lengths=host_lengths)
    more = {"host": {"context": [1] * BATCH}} if host_lengths else {}
    want, _ = step(*there((given, reused(used(given), 0.0), token)), **more)
    got, _ = step(*there((given, state, token)), **more)
    assert torch.equal(got.cpu(), want.cpu())


def test_22_pages_not_yet_needed_may_be_unassigned() -> None:
    """Bug 22, stale tables: until a sequence reaches a page its table names scratch, never read."""
    given, token = weights(), words(1)[:, 0]
    state = used(given)
    reached = state.lengths // 128 + 1  # the page of the token to come is the last
    later = torch.arange(state.block_table.shape[1]) >= reached[:, None]
    other = state._replace(block_table=state.block_table.masked_fill(later, 0))
    assert later.any(0).tolist() == [False, True, True]
    (want, after), (got, same) = (run(qn.decode, given, s, token) for s in (state, other))
    assert torch.equal(got, want)
    for one, two in zip(leaves(same.layers), leaves(after.layers), strict=True):
        assert torch.equal(one, two)


# --- buckets and replays -----------------------------------------------------------------------


def restore(state: qn.State, values: qn.State) -> None:
    for leaf, value in zip(leaves(state), leaves(values), strict=True):
        leaf.copy_(value)


def lent(state: qn.State) -> qn.State:
    """New objects on the same memory: what a call takes is given up."""
    return map_leaves(lambda leaf: leaf.detach(), state)


@pytest.mark.parametrize("host_lengths", [False, True], ids=["mask", "host"])
@pytest.mark.parametrize("kind", ["decode", "verify"])
def test_3_padded_rows_of_a_bucket_hurt_nobody(kind: str, host_lengths: bool) -> None:
    """Bug 3: five requests in a graph of eight; the other rows alias slot 0, here full of NaN.

    With lengths from the host, scratch begins as it is made and must stay finite: every query of a
    row on scratch sees something.
    """
    layers = 3 if host_lengths else 2  # a delta net after attention; none, as it refuses NaN decays
    given = weights(num_experts=7, num_hidden_layers=layers)
    function = {"decode": qn.decode, "verify": qn.verify}[kind]
    tokens = words(1)[:, 0] if kind == "decode" else words(DRAFT + 1)
    state = qn.init_state(given.config, 8, 300, draft=DRAFT)
    prompt, lengths = words(30), torch.tensor([30, 2, 17, 9, 1])
    _, state = qn.prefill(given, qn.narrow(state, BATCH), prompt, lengths)
    on, at, token = there((given, state, tokens))
    how = {"target": here(), "strict": True, "host_lengths": host_lengths}
    bucket = qn.Buckets(function, on, at, [(token,)], [8], **how)
    plain = there((state,))[0]
    restore(at, plain)
    for leaf in leaves(at.layers):
        leaf[0] = leaf[0] if host_lengths else torch.nan
    for accepted in ([1, 2, 3, 1, 2], [3, 1, 1, 2, 3], [2, 2, 1, 3, 1]):
        context = (plain.lengths.cpu() + token[0].numel()).tolist()
        got, at = bucket(lent(at), token, host={"context": context} if host_lengths else None)
        want, plain = STEPS[function](on, plain, token)
        if kind == "verify":
            counts = torch.tensor(accepted).npu()
            at, plain = qn.commit(at, counts), qn.commit(plain, counts)
        assert torch.equal(got.cpu(), want.cpu()) and got.isfinite().all()
        token = want.argmax(-1)
    pairs = zip(leaves_with_paths(at), leaves_with_paths(plain), strict=True)
    for (path, one), (_, other) in pairs:
        first = int("layers" in path)  # scratch aside
        assert torch.equal(one[first:].cpu(), other[first:].cpu()), path
        assert one.isfinite().all() or not host_lengths, path


@pytest.mark.parametrize("host_lengths", [False, True], ids=["mask", "host lengths"])
def test_21_a_thousand_replays_with_changing_lengths(host_lengths: bool) -> None:
    """Bug 21: the update of a graph's lengths races its replay.

    Rows jump to random lengths on pools full of random values; nothing waits between replays. Every
    25th is compared with the compiled step, run eagerly on a copy of the pools.
    """
    given = weights()
    state, tokens = used(given), words(1)[:, 0]
    step = compiled(qn.decode, (given, state, tokens), host_lengths=host_lengths)
    on, state, _ = there((given, state, tokens))
    captured = step.capture(on, state, tokens.npu())
    generator = torch.Generator().manual_seed(9)
    lengths = torch.randint(0, 300, (1000, BATCH), generator=generator).int()
    tokens = torch.randint(0, VOCAB, (1000, BATCH), generator=generator)
    pairs, seen = [], set()
    for number, (now, token) in enumerate(zip(lengths, tokens, strict=True)):
        more = {"host": {"context": (now + 1).tolist()}} if host_lengths else {}
        state = lent(state)._replace(lengths=now.npu())
        if number % 25 == 0:
            want, after = step(on, copied(state), token.npu(), **more)
        got, state = captured(on, state, token.npu(), **more)
        if number % 25 == 0:
            pairs += [(got, want), (state.layers[0].recurrent, after.layers[0].recurrent)]
            pairs[-1] = tuple(leaf[1:].clone() for leaf in pairs[-1])
            seen.add(tuple(now.tolist()))
    assert len(pairs) == 80 and len(seen) == 40
    assert [i for i, (a, b) in enumerate(pairs) if not torch.equal(a.cpu(), b.cpu())] == []
    assert state.lengths.tolist() == (lengths[-1] + 1).tolist()


# --- speculation -------------------------------------------------------------------------------


def test_4_speculation_says_what_decode_says() -> None:
    """Bug 4: windows widened for drafts begin at their front after a prefill, not at their end.

    Both ways read the text that decoding gives, so that what a tie decides cannot spread; where the
    two likeliest tokens are nearer than bfloat16 can tell, they may differ.
    """
    given, new, draft = weights(), 24, 3
    prompt, lengths = words(21), torch.tensor([21, 1, 17, 2, 4])
    logits, plain = run(qn.prefill, given, qn.init_state(given.config, BATCH, 100), prompt, lengths)
    text, wanted = [], [logits]
    for _ in range(new):
        text.append(logits.argmax(-1))
        logits, plain = run(qn.decode, given, plain, text[-1])
        wanted.append(logits)
    text, wanted = torch.stack(text, dim=1), torch.stack(wanted, dim=1)
    logits, state = run(
        qn.prefill, given, qn.init_state(given.config, BATCH, 100, draft=draft), prompt, lengths
    )
    assert torch.equal(logits, wanted[:, 0])
    done, found = torch.zeros(BATCH, dtype=torch.int64), torch.full_like(wanted, torch.nan)
    generator = torch.Generator().manual_seed(6)
    while (done + draft < new).all():
        at = done[:, None] + torch.arange(draft + 1)
        tokens = text.gather(1, at)
        accepted = torch.randint(1, draft + 2, (BATCH,), generator=generator)
        wrong = torch.arange(draft + 1) >= accepted[:, None]  # what is rejected is another token
        tokens = torch.where(wrong, (tokens + 1) % VOCAB, tokens)
        logits, pending = run(qn.verify, given, state, tokens)
        state = qn.commit(pending, accepted)
        for row, count in enumerate(accepted.tolist()):
            found[row, done[row] + 1 : done[row] + 1 + count] = logits[row, :count]
        done += accepted
        logits, state = run(qn.decode, given, state, text.gather(1, done[:, None])[:, 0])
        done += 1
        found[torch.arange(BATCH), done] = logits
    valid = found.isfinite().all(-1)
    assert valid.sum() > BATCH * new // 2
    assert relative_rms(found[valid], wanted[valid]) < BUDGET
    best = wanted[valid].topk(2).values
    clear = best[:, 0] - best[:, 1] > 5 * BUDGET * wanted[valid].std()
    assert clear.float().mean() > 0.6
    assert torch.equal(found[valid].argmax(-1)[clear], wanted[valid].argmax(-1)[clear])
