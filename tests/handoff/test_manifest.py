"""Messages of a hand-off, what they refuse, and the regions that they name."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import qnext as qn
from qnext.handoff.layout import ALIGNMENT, layout_of
from qnext.handoff.manifest import (
    ANSWER,
    Claim,
    Commit,
    HandoffError,
    Offer,
    Part,
    Refusal,
    claim_of,
    differences,
    digest,
    refuse,
    shared,
)
from qnext.handoff.regions import Regions
from tests.sequences import BATCH, model

TOKENS = tuple(range(5, 205))


def claim(draft: int = 1, pages: int = 2, **changes: Any) -> Claim:
    params = model(mtp_num_hidden_layers=1)
    state = qn.init_state(params.config, BATCH, 290, draft=draft)
    made = claim_of(params.config.fingerprint, "weights", TOKENS, layout_of(state, pages))
    return made.model_copy(update=changes)


def test_messages_survive_the_way() -> None:
    mine = claim()
    offer = Offer(room="7", attempt="a", address="group:h:1", begin=64, claim=mine, seconds=3)
    assert Offer.model_validate_json(offer.model_dump_json()) == offer
    for answer in (
        Commit(room="7", attempt="a", claim=mine, checksums={"layers[0].window": 2**32 - 1}),
        Part(room="7", attempt="a", checksums={"layers[3].key": 2**64 - 1}),
        Refusal(room="7", attempt="a", why="the prompt is another"),
    ):
        assert ANSWER.validate_json(answer.model_dump_json()) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"kind": "commit"}',
        '{"kind": "other", "room": "1", "attempt": "2"}',
        '{"kind": "refusal", "room": "1", "attempt": "2", "why": "3", "more": 4}',
        '{"kind": "refusal", "room": "1", "attempt": "2", "wh',
    ],
)
def test_torn_and_strange_messages_are_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        ANSWER.validate_json(text)


def test_the_same_value_is_taken() -> None:
    assert differences(claim(), claim()) == []
    refuse(claim(), claim())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": "other"}, "another config: other, not "),
        ({"weights": "other"}, "another weights: other, not weights"),
        ({"position": 199}, "another position: 199, not 200"),
        ({"tokens": digest(TOKENS[:-1])}, "another prompt: "),
        ({"pages": 3}, r"layers\[3\].key is float32 \[3, 128, "),
    ],
)
def test_another_value_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(HandoffError, match="it is another value: .*" + why):
        refuse(claim(), claim(**changes))


def test_layouts_that_differ_are_told_by_tensor() -> None:
    mine = claim()
    first, second, *rest = mine.tensors
    other = second.model_copy(update={"dtype": "bfloat16"})
    unknown = first.model_copy(update={"path": "layers[99].key"})
    got = mine.model_copy(update={"tensors": (other, *rest, unknown)})
    assert differences(mine, got) == [
        f"{first.path} is missing",
        f"{second.path} is bfloat16 {list(second.shape)} at {second.begin}, "
        f"not float32 {list(second.shape)} at {second.begin}",
        "layers[99].key is unknown",
    ]
    many = mine.model_copy(update={"tensors": (), "model": "other", "weights": "others"})
    with pytest.raises(HandoffError, match=r" and \d+ more$"):
        refuse(mine, many)


def test_a_side_without_guesses_hands_over_what_both_have() -> None:
    """Of the module's part nothing goes; guesses begin badly, texts are the same."""
    with_mtp, without = claim(draft=1), claim(draft=0)
    assert differences(with_mtp, without) == differences(without, with_mtp) == []
    assert shared(with_mtp, without) == shared(without, with_mtp)
    assert not any(path.startswith("mtp") for path in shared(with_mtp, without))
    assert any(path.startswith("mtp") for path in shared(with_mtp, with_mtp))


def test_a_claim_is_of_a_token_at_least() -> None:
    params = model()
    layout = layout_of(qn.init_state(params.config, 1, 290), 1)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        claim_of("model", "weights", (), layout)


@given(st.lists(st.one_of(st.integers(1, 300), st.none()), max_size=60), st.integers(0, 200))
def test_regions_never_overlap(orders: list[int | None], first: int) -> None:
    """A number takes so many bytes, None gives the oldest piece back."""
    regions, held = Regions(2000, first), list[tuple[int, int]]()
    for nbytes in orders:
        if nbytes is None:
            if held:
                regions.give_back(held.pop(0)[0])
            continue
        begin = regions.take(nbytes)
        if begin is None:
            gaps = sorted([(first, first), *((b, b + n) for b, n in held), (2000, 2000)])
            ends = [(-(-end // ALIGNMENT) * ALIGNMENT, b) for (_, end), (b, _) in pairwise(gaps)]
            assert max(b - end for end, b in ends) < nbytes
            continue
        assert begin % ALIGNMENT == 0 and first <= begin and begin + nbytes <= 2000
        assert all(begin + nbytes <= b or b + n <= begin for b, n in held)
        held.append((begin, nbytes))
        assert regions.taken == sum(n for _, n in held)
    for begin, _ in held:
        regions.give_back(begin)
    assert (
        regions.taken == 0 and regions.take(2000 - -(-first // ALIGNMENT) * ALIGNMENT) is not None
    )
