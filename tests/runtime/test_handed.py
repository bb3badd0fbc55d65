"""Prompts read by one engine and answered by another: the same answers as of one engine alone."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext.errors import InputError
from qnext.functional.config import PAGE
from qnext.functional.state import pages_of
from qnext.functional.tree import leaves, map_leaves
from qnext.handoff.layout import layout_of, places
from qnext.runtime.engine import Engine
from qnext.runtime.kept import Kept
from qnext.runtime.request import ContextError, FullError, Handoff, Output, Portion, Request, Start
from qnext.runtime.service import Service
from tests.runtime.engines import VOCAB, alone, ends_of, engine, is_clean, mixture, serve


class Gathered:
    """Room for the value of a prompt of so many tokens; `failed` tells why there is none.

    parts: of each, its first page, how many, and whether it ended it.
    """

    def __init__(self, reader: Engine, length: int = 300) -> None:
        self.layout = layout_of(reader.worker.like, pages_of(length - 1))
        self.memory = torch.full((self.layout.nbytes,), 0xA5, dtype=torch.uint8)
        self.parts: list[tuple[int, int, bool]] = []
        self.value: Kept | None = None
        self.failed: list[str] = []

    def portion(self, first: int, count: int, ends: bool) -> Portion:
        assert self.value is None and not self.failed
        return Room(self, first, count, ends)

    def fail(self, why: str) -> None:
        self.failed.append(why)


class Room:
    """A portion of what is gathered."""

    def __init__(self, whole: Gathered, *part: Any) -> None:
        self.whole, self.part = whole, part
        first, count, _ = part
        self.into = places(whole.layout, whole.memory, first, count)

    def filled(self, whole: bool) -> None:
        if whole:
            self.whole.parts.append(self.part)
            if self.part[2]:
                self.whole.value = places(self.whole.layout, self.whole.memory)


def asked(request: Request, to: Gathered) -> Request:
    """The request's prompt alone."""
    return Request(
        tokens=request.tokens,
        max_new_tokens=0,
        handoff=to,
        cache=request.cache,
        marks=request.marks,
        priority=request.priority,
    )


def go_on(served: Engine, requests: list[Request], values: list[Kept]) -> list[list[Output]]:
    """The outputs of requests whose prompts were read elsewhere."""
    begun = [
        replace(request, start=Start(len(request.tokens) - 1, value))
        for request, value in zip(requests, values, strict=True)
    ]
    return serve(served, begun)


def of_two_tokens(count: int, seed: int = 0) -> list[Request]:
    return [r for r in mixture(seed, 2 * count) if len(r.tokens) > 1][:count]


@pytest.mark.parametrize(
    ("reads", "answers", "overlap"),
    [
        (0, 0, False),
        (1, 1, True),
        pytest.param(1, 0, False, marks=pytest.mark.slow),
        pytest.param(0, 1, True, marks=pytest.mark.slow),
        pytest.param(1, 2, False, marks=pytest.mark.slow),
    ],
)
def test_an_answer_does_not_tell_where_its_prompt_was_read(
    reads: int, answers: int, overlap: bool
) -> None:
    """Through chunks, cached prefixes and swaps on the side that reads and on the one that answers;
    to the bit, whatever each of them guesses ahead."""
    requests = of_two_tokens(12, seed=reads)
    reader = engine(reads, overlap=overlap)
    sinks = [Gathered(reader, len(request.tokens)) for request in requests]
    told = serve(reader, [asked(*pair) for pair in zip(requests, sinks, strict=True)])
    assert [outputs[-1].finish for outputs in told] == ["length"] * len(requests)
    assert reader.stats.cache_hits and is_clean(reader)
    values = [sink.value for sink in sinks if sink.value is not None]
    answerer = engine(answers, overlap=overlap)
    got = go_on(answerer, requests, values)
    for mine, theirs in zip(got, alone(engine(), requests), strict=True):
        assert ends_of(mine) == ends_of(theirs)
    assert is_clean(answerer) and not any(sink.failed for sink in sinks)
    reader.close()
    answerer.close()


def long(sink: Handoff, length: int = 300, **more: Any) -> Request:
    tokens = tuple((7 * i + 3) % VOCAB for i in range(length))
    return Request(tokens=tokens, max_new_tokens=0, handoff=sink, **more)


def test_pages_go_ahead_as_they_are_complete() -> None:
    served = engine()
    sink = Gathered(served)
    serve(served, [long(sink)])
    assert sink.parts == [(0, 1, False), (1, 1, False), (2, 1, True)]
    assert pages_of(299) == 3


@pytest.mark.parametrize("length", [2, PAGE, PAGE + 1, PAGE + 2])
def test_prompts_that_end_where_a_page_does(length: int) -> None:
    served = engine()
    sink = Gathered(served, length)
    serve(served, [long(sink, length)])
    assert sink.value is not None and not sink.failed
    assert [first for first, _, _ in sink.parts] == list(range(len(sink.parts)))
    assert sum(count for _, count, _ in sink.parts) == pages_of(length - 1)


def test_a_chunk_that_ends_a_token_before_the_prompt_does() -> None:
    served = engine()
    sink = Gathered(served, PAGE + 3)
    serve(served, [long(sink, PAGE + 3, marks=(PAGE + 1,))])
    assert [first for first, _, _ in sink.parts] == [0, 1] and sink.value is not None
    (answer,) = go_on(engine(), [_answered(sink, PAGE + 3)], [sink.value])
    assert ends_of(answer) == ends_of(alone(engine(), [_answered(sink, PAGE + 3)])[0])


def _answered(sink: Handoff, length: int = 300) -> Request:
    return replace(long(sink, length), max_new_tokens=9, handoff=None)


def test_a_prompt_that_is_cached_is_handed_off_all_the_same() -> None:
    served = engine()
    sinks = [Gathered(served) for _ in range(2)]
    for sink in sinks:
        serve(served, [long(sink)])
    assert served.stats.cache_hits >= 2 * PAGE
    first, second = (sink.value for sink in sinks)
    request = _answered(sinks[0])
    one, two = (go_on(engine(), [request], [value])[0] for value in (first, second))
    assert ends_of(one) == ends_of(two) == ends_of(alone(engine(), [request])[0])


@pytest.mark.parametrize("end", ["abort", "deadline", "closed", "a step that fails"])
def test_a_prompt_that_is_not_read_fails_once(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served, outputs = engine(), list[Output]()
    sink = Gathered(served)
    more = {"deadline": 0.0} if end == "deadline" else {}
    sequence = served.submit(long(sink, **more), outputs.append)
    if end != "deadline":
        served.step()
    if end == "abort":
        served.abort(sequence)
    if end == "closed":
        served.close()
    if end == "a step that fails":
        monkeypatch.setattr(served.worker, "_prefill", None)
    served.run()
    assert len(sink.failed) == 1 and sink.failed[0].startswith("its prompt was not read: ")
    assert sink.value is None and outputs[-1].finish not in ("length", None)


def test_who_is_not_taken_in_fails_the_handoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder need not wait for what nobody reads."""
    with Service(engine(max_waiting=1)) as service:
        full, long_one = Gathered(service.engine), Gathered(service.engine, 5000)
        with pytest.raises(ContextError):
            next(service.stream(long(long_one, 5000)))
        monkeypatch.setattr(service, "_arriving", 1)
        with pytest.raises(FullError):
            next(service.stream(long(full)))
        monkeypatch.undo()
    assert len(long_one.failed) == len(full.failed) == 1
    assert long_one.failed[0].startswith("its prompt was not read: ")
    assert full.failed[0].startswith("its prompt was not read: 1 requests are waiting already")


def test_a_state_to_begin_with_is_let_go_as_soon_as_it_is_put() -> None:
    reader, served = engine(), engine()
    sink = Gathered(reader)
    serve(reader, [long(sink)])
    value, sink.value = map_leaves(Tensor.clone, sink.value), None
    watched = [weakref.ref(leaf) for leaf in leaves(value)]
    request = replace(_answered(sink), start=Start(299, value))
    del value
    taken = served.submit(request, list[Output]().append)
    assert all(ref() is not None for ref in watched)
    served.step()
    assert all(ref() is None for ref in watched) and taken.finish is None
    served.run()


def test_a_state_is_taken_as_often_as_it_was_meant() -> None:
    served = engine()
    sink = Gathered(served)
    serve(served, [long(sink)])
    assert sink.value is not None
    start = Start(299, sink.value, uses=2)
    answers = serve(engine(), [replace(_answered(sink), start=start) for _ in range(2)])
    assert ends_of(answers[0]) == ends_of(answers[1])
    with pytest.raises(InputError, match="start: it was taken by as many requests"):
        served.submit(replace(_answered(sink), start=start), print)


def test_what_cannot_be_handed_off_is_refused() -> None:
    served = engine()
    sink = Gathered(served)
    for request, why in (
        (long(sink, 1), "handoff: of a prompt of one token there is no state"),
        (replace(long(sink), max_new_tokens=1), "handoff: what is decoded elsewhere"),
        (replace(long(sink), prompt_logprobs=1), "handoff: what is decoded elsewhere"),
    ):
        with pytest.raises(InputError, match=why):
            served.submit(request, print)
    serve(served, [long(sink)])
    plain = replace(long(sink), handoff=None, max_new_tokens=3)
    assert sink.value is not None and isinstance(sink, Handoff)
    for length in (0, -1, 300):
        with pytest.raises(InputError, match=f"start: a state after {length} tokens is none"):
            served.submit(replace(plain, start=Start(length, sink.value)), print)
    assert not sink.failed and is_clean(served)
