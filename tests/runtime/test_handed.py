"""Prompts read by one engine and answered by another: the same answers as of one engine alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext.errors import InputError
from qnext.functional.config import PAGE
from qnext.functional.state import KV, Mtp, pages_of
from qnext.functional.tree import map_leaves
from qnext.runtime.engine import Engine
from qnext.runtime.kept import Kept
from qnext.runtime.request import Handoff, Output, Request
from tests.runtime.engines import VOCAB, alone, ends_of, engine, is_clean, mixture, serve


class Gathered:
    """Puts the parts of a value together; `failed` tells why there is none."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, Kept]] = []
        self.value: Kept | None = None
        self.failed: list[str] = []

    def pages(self, kept: Any, first: int) -> None:
        assert self.value is None and not self.failed
        # its states are the pools' own memory, which goes on
        self.parts.append((first, map_leaves(Tensor.clone, kept)))

    def rest(self, kept: Any, first: int) -> None:
        self.pages(kept, first)
        values = [value for _, value in self.parts]

        def whole(*each: Any) -> Any:
            if isinstance(each[0], KV | Mtp):
                paged = {n: torch.cat([getattr(e, n) for e in each]) for n in ("key", "value")}
                return each[-1]._replace(**paged)
            return each[-1]

        layers = tuple(map(whole, *(value.layers for value in values)))
        self.value = Kept(layers, tuple(map(whole, *(value.mtp for value in values))))

    def fail(self, why: str) -> None:
        self.failed.append(why)


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
        replace(request, start=(len(request.tokens) - 1, value))
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
    sinks = [Gathered() for _ in requests]
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
    sink = Gathered()
    serve(engine(), [long(sink)])
    counts = [value.layers[1].key.shape[0] for _, value in sink.parts]
    assert [first for first, _ in sink.parts] == [0, 1, 2] and counts == [1, 1, 1]
    assert sum(counts) == pages_of(299)


@pytest.mark.parametrize("length", [2, PAGE, PAGE + 1, PAGE + 2])
def test_prompts_that_end_where_a_page_does(length: int) -> None:
    sink = Gathered()
    serve(engine(), [long(sink, length)])
    (*_, (first, last)) = sink.parts
    assert sink.value is not None and not sink.failed
    assert sink.value.layers[1].key.shape[0] == pages_of(length - 1)
    assert first + last.layers[1].key.shape[0] == pages_of(length - 1)


def test_a_chunk_that_ends_a_token_before_the_prompt_does() -> None:
    sink = Gathered()
    serve(engine(), [long(sink, PAGE + 3, marks=(PAGE + 1,))])
    assert [first for first, _ in sink.parts] == [0, 1] and sink.value is not None
    (answer,) = go_on(engine(), [_answered(sink, PAGE + 3)], [sink.value])
    assert ends_of(answer) == ends_of(alone(engine(), [_answered(sink, PAGE + 3)])[0])


def _answered(sink: Handoff, length: int = 300) -> Request:
    return replace(long(sink, length), max_new_tokens=9, handoff=None)


def test_a_prompt_that_is_cached_is_handed_off_all_the_same() -> None:
    served, sinks = engine(), [Gathered(), Gathered()]
    for sink in sinks:
        serve(served, [long(sink)])
    assert served.stats.cache_hits >= 2 * PAGE
    first, second = (sink.value for sink in sinks)
    request = _answered(sinks[0])
    one, two = (go_on(engine(), [request], [value])[0] for value in (first, second))
    assert ends_of(one) == ends_of(two) == ends_of(alone(engine(), [request])[0])


@pytest.mark.parametrize("end", ["abort", "deadline", "closed", "a step that fails"])
def test_a_prompt_that_is_not_read_fails_once(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sink, outputs = Gathered(), list[Output]()
    served = engine()
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


def test_what_cannot_be_handed_off_is_refused() -> None:
    served, sink = engine(), Gathered()
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
            served.submit(replace(plain, start=(length, sink.value)), print)
    assert not sink.failed and is_clean(served)
