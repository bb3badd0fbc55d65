"""Continuations as text: what is released when, and what ends one, against plain searching."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qnext.text import Continuation, Tokenizer

# Ids of the tiny tokenizer: bytes are their own ids, <|end|> is special.
HE, HELL, END, PADDING = 256, 258, 270, 5000
A_HALF = 264  # "a" and the first byte of another character
EURO = [0xE2, 0x82, 0xAC]

# Few characters, so that stop strings occur, overlap and hold each other; half characters too.
IDS = st.lists(
    st.sampled_from([*b"helabb!\x82\xac\xe2\xf0", *range(HE, 267), END, PADDING]), max_size=24
)
STOPS = st.lists(st.text("hela\u20ac!b\ufffd", min_size=1, max_size=5), max_size=4, unique=True)
unhurried = settings(deadline=None, max_examples=150)


class Told(NamedTuple):
    """What a continuation released after each token and in the end, and how it ended."""

    pieces: list[str]
    finish: str | None
    stopped_by: str | int | None
    tokens: int

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def continued(
    tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), **how: Any
) -> Told:
    """Push tokens until it ends, or there are no more and its length ends it."""
    row, pieces = Continuation(tokenizer, prompt, **how), []
    for token in ids:
        if row.finish is None:
            row.push(token)
            pieces.append(row.release())
    if row.finish is None:
        row.end("length")
        pieces.append(row.release())
    assert row.release() == "" == row.held
    return Told(pieces, row.finish, row.stopped_by, row.tokens)


def first_stop(text: str, stops: Sequence[str], after: int = 0) -> tuple[int, str] | None:
    """Where the stop string begins that is complete first, the longest of several, and which.

    Those that are complete within the first `after` characters do not count.
    """
    for end in range(after + 1, len(text) + 1):
        for begin in range(end):
            if text[begin:end] in stops:
                return begin, text[begin:end]
    return None


def certain(text: str, stops: Sequence[str]) -> str:
    """The text without an end that may become a stop string."""
    for begin in range(len(text)):
        if any(stop.startswith(text[begin:]) for stop in stops):
            return text[:begin]
    return text


def decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode([token for token in ids if token != PADDING])


@pytest.fixture(scope="module")
def ending(tiny: Tokenizer) -> Tokenizer:
    """The tiny tokenizer with an eos."""
    return replace(tiny, eos_ids=(END,))


# --- stop strings --------------------------------------------------------------------------------


@unhurried
@given(IDS, STOPS, st.booleans(), st.one_of(st.just(0), st.integers(0, 24)))
@example([HELL], ["hell", "e"], False, 0)
@example([0xE2], ["\ufffd"], True, 1)
@example([*b"aab"], ["ab", "aaa"], False, 0)
@example([*b"abe"], ["b", "abh"], False, 3)
def test_text_is_decode_up_to_the_first_stop(
    tiny: Tokenizer, ids: list[int], stops: list[str], keep: bool, least: int
) -> None:
    told = continued(tiny, ids, stops=stops, keep_stop=keep, least=least)
    whole, early = decoded(tiny, ids), decoded(tiny, ids[: max(least - 1, 0)])
    found = first_stop(whole, stops, len(early.removesuffix("\ufffd")))
    found = found if len(ids) >= least else None
    if found is None:
        assert (told.text, told.finish, told.stopped_by) == (whole, "length", None)
        assert told.tokens == len(ids)
    else:
        begin, stop = found
        assert told.text == whole[: begin + len(stop) if keep else begin]
        assert (told.finish, told.stopped_by) == ("stop", stop)


@unhurried
@given(IDS, STOPS)
def test_all_that_is_certain_is_released_at_once(
    tiny: Tokenizer, ids: list[int], stops: list[str]
) -> None:
    told = continued(tiny, ids, stops=stops)
    for count in range(1, told.tokens + (told.finish != "stop")):
        so_far = decoded(tiny, ids[:count]).removesuffix("\ufffd")
        assert "".join(told.pieces[:count]) == certain(so_far, stops)


@unhurried
@given(st.text("hela\u20ac!", max_size=12), STOPS, st.booleans(), st.data())
def test_any_split_into_tokens_gives_the_same(
    tiny: Tokenizer,
    tiny_bytes: tuple[bytes, ...],
    text: str,
    stops: list[str],
    keep: bool,
    data: st.DataObject,
) -> None:
    rest, ids = text.encode(), list[int]()
    while rest:
        begins = [id for id, piece in enumerate(tiny_bytes) if rest.startswith(piece)]
        ids.append(data.draw(st.sampled_from(begins)))
        rest = rest[len(tiny_bytes[ids[-1]]) :]
    one_by_one = continued(tiny, list(text.encode()), stops=stops, keep_stop=keep)
    told = continued(tiny, ids, stops=stops, keep_stop=keep)
    assert told[1:3] == one_by_one[1:3] and told.text == one_by_one.text


def test_a_stop_over_token_boundaries_is_held_back(tiny: Tokenizer) -> None:
    ids = [*b"xa", HE, *b"l?"]
    assert continued(tiny, ids, stops=["ahem"]).pieces == ["x", "", "", "ahel", "?", ""]
    assert continued(tiny, ids, stops=["ahel"]) == (["x", "", "", ""], "stop", "ahel", 4)
    assert continued(tiny, ids, stops=["ahel?!"]).pieces == ["x", "", "", "", "", "ahel?"]
    kept = continued(tiny, ids, stops=["el"], keep_stop=True)
    assert kept == (["x", "a", "h", "el"], "stop", "el", 4)
    assert continued(tiny, [*b"aab"], stops=["ab"]).pieces == ["", "a", ""]


def test_what_follows_a_stop_in_its_token_is_dropped(tiny: Tokenizer) -> None:
    for keep, text in ((False, "h"), (True, "he")):
        assert continued(tiny, [HELL], stops=["e"], keep_stop=keep).text == text


def test_the_stop_that_is_complete_first_wins(tiny: Tokenizer) -> None:
    """As it would if the text came a character at a time; of two, the one that began first."""
    for ids in ([*b"hell"], [HELL], [HE, *b"ll"]):
        assert continued(tiny, ids, stops=["ll", "e"])[1:3] == ("stop", "e")
        assert continued(tiny, ids, stops=["hell", "e"]).text == "h"
        assert continued(tiny, ids, stops=["l", "ell", "hel"]).stopped_by == "hel"
        assert continued(tiny, ids, stops=["hel", "el", "l"]).text == ""


def test_a_stop_does_not_begin_in_the_prompt(tiny: Tokenizer) -> None:
    assert continued(tiny, [*b"c"], prompt=[*b"ab"], stops=["abc"]).text == "c"
    told = continued(tiny, EURO[1:], prompt=EURO[:1], stops=["\u20ac"])  # its end is what counts
    assert told == (["", ""], "stop", "\u20ac", 2)
    assert continued(tiny, EURO[1:], prompt=EURO[:1]).text == "\u20ac"


def test_a_stop_may_hide_in_half_a_character(ending: Tokenizer) -> None:
    told = continued(ending, [*b"a", 0xE2], stops=["\ufffd"])
    assert told == (["a", "", ""], "stop", "\ufffd", 2)
    told = continued(ending, [*b"a", 0xE2, END], stops=["\ufffd"])  # eos is what shows it
    assert told == (["a", "", ""], "stop", "\ufffd", 3)


def test_a_second_end_changes_nothing(ending: Tokenizer) -> None:
    for ids, finish in (([*b"x", HE, 0xE2], "length"), ([*b"h", END], "eos")):
        row = Continuation(ending, ())
        for token in ids:
            row.push(token)
        row.end("length")
        assert row.finish == finish and row.release()
        row.end("abort")
        assert (row.finish, row.release()) == (finish, "")
    row = Continuation(ending, (), stops=["a"])
    row.push(A_HALF)
    row.end("length")
    assert (row.finish, row.stopped_by, row.release()) == ("stop", "a", "")


# --- eos -----------------------------------------------------------------------------------------


def test_eos_ends_and_has_no_text(ending: Tokenizer) -> None:
    for skip in (True, False):
        told = continued(ending, [*b"ab", END, *b"c"], stops=["bc"], skip_special_tokens=skip)
        assert told == (["a", "", "b"], "eos", END, 3)


def test_no_ends_or_others_let_eos_pass(ending: Tokenizer) -> None:
    ids = [*b"a", END, *b"bc"]
    assert continued(ending, ids, ends=()) == (["a", "", "b", "c", ""], "length", None, 4)
    assert continued(ending, ids, ends=(), skip_special_tokens=False).text == "a<|end|>bc"
    assert continued(ending, ids, ends=(ord("c"), 0)) == (["a", "", "b", ""], "eos", ord("c"), 4)
    told = continued(ending, ids, ends=(), skip_special_tokens=False, stops=["d|>b"])
    assert (told.text, told.finish, told.stopped_by) == ("a<|en", "stop", "d|>b")


def test_ids_beyond_the_vocabulary_have_no_text_but_may_end(ending: Tokenizer) -> None:
    ids = [*b"a", PADDING, *b"b"]
    assert continued(ending, ids, stops=["ab"]) == (["", "", ""], "stop", "ab", 3)
    assert continued(ending, ids, ends=(PADDING,)) == (["a", ""], "eos", PADDING, 2)


# --- at least so many tokens ---------------------------------------------------------------------


@pytest.mark.parametrize("least", range(6))
def test_eos_ends_after_the_least_tokens(ending: Tokenizer, least: int) -> None:
    """`least` tokens before it: an eos among them is one of them."""
    told = continued(ending, [END, *b"a", END, END, *b"b"], least=least)
    want = {0: 1, 1: 3, 2: 3, 3: 4}.get(least)
    assert (told.finish, told.tokens) == (("eos", want) if want else ("length", 5))


@pytest.mark.parametrize("least", range(6))
@pytest.mark.parametrize("keep", [False, True])
def test_a_stop_ends_once_there_are_the_least_tokens(
    tiny: Tokenizer, least: int, keep: bool
) -> None:
    """One that is complete before is text like any other, one that is complete later is not."""
    told = continued(tiny, [*b"xababz"], stops=["ab"], least=least, keep_stop=keep)
    end = 3 if least <= 3 else 5
    assert (told.finish, told.tokens) == (("stop", end) if least <= 5 else ("length", 6))
    assert told.text == "xabab"[: end if keep else end - 2]


def test_all_is_text_before_the_least_tokens(tiny: Tokenizer) -> None:
    told = continued(tiny, [*b"xabyz"], stops=["ab", "yzz"], least=5)
    assert told == (["x", "", "ab", "", "", "yz"], "length", None, 5)
