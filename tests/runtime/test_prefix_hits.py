"""A cached prefix never changes a token: lengths and tails of every kind, hit against miss."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qnext as qn
from qnext.functional.config import PAGE
from qnext.runtime.digest import weights_digest
from qnext.runtime.engine import Engine
from qnext.runtime.request import Request
from tests.runtime.engines import OPTIONS, VOCAB, alone, ends_of, engine, params, serve, steps

LONG = tuple(random.Random(5).randrange(VOCAB) for _ in range(2 * PAGE + 80))
WARM = qn.Sampling(temperature=0.9, seed=2)


def asked(length: int, new: int = 3) -> Request:
    return Request(tokens=LONG[:length], max_new_tokens=new, sampling=WARM, eos=(), logprobs=1)


def pairs(every: bool) -> list[tuple[int, int]]:
    """(length of a prefix, length of what follows): each length mod page, many tails."""
    rng = random.Random(1)
    if every:
        return [(n, t) for n in range(1, PAGE + 2) for t in (*range(1, 2 * OPTIONS.chunk, 3), 130)]
    near = {n + k * PAGE for n in (-1, 0, 1, 2) for k in (0, 1, 2)} | {*range(3, 250, 17)}
    return [(n, rng.randrange(1, 2 * OPTIONS.chunk)) for n in sorted(near) if n > 0]


@pytest.mark.parametrize(
    ("draft", "every"),
    [
        (0, False),
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(0, True, marks=pytest.mark.slow),
        pytest.param(2, True, marks=pytest.mark.slow),
    ],
)
def test_a_hit_is_a_miss_to_the_bit(draft: int, every: bool) -> None:
    """Tokens and log probabilities, and `cached` is what the shorter prompt left."""
    served, plain = engine(draft, cache_bytes=1 << 24), engine(draft)
    wanted = {
        length: ends_of(alone(plain, [asked(length)])[0])
        for length in sorted({n + tail for n, tail in pairs(every)})
    }
    for length, tail in pairs(every):
        served.board.cache.clear()
        (first,) = serve(served, [replace(asked(length), max_new_tokens=1)])
        assert first[-1].cached == 0
        (then,) = serve(served, [asked(length + tail)])
        # all but its last token; all, if by chance the answer is what the longer one goes on with
        assert then[-1].cached in (length - 1, length)
        assert ends_of(then) == wanted[length + tail]


def test_the_same_prompt_again_reads_one_token() -> None:
    served = engine()
    outputs = [serve(served, [asked(200)])[0] for _ in range(3)]
    assert [each[-1].cached for each in outputs] == [0, 199, 199]
    assert len({str(ends_of(each)) for each in outputs}) == 1
    assert (served.stats.cache_queries, served.stats.cache_hits) == (600, 398)


def test_a_conversation_goes_on_where_the_answer_ended() -> None:
    """The next turn begins with the last one's prompt and answer, and reads neither again."""
    served = engine()
    (first,) = serve(served, [asked(60, new=20)])
    answer = [t for output in first for t in output.tokens]
    longer = replace(asked(60), tokens=(*LONG[:60], *answer, *LONG[100:130]))
    (then,) = serve(served, [longer])
    assert then[-1].cached in (79, 80)  # the last token drawn may or may not have been consumed
    assert ends_of(then) == ends_of(alone(engine(), [longer])[0])


def test_ends_of_messages_are_kept() -> None:
    """A retried last message hits the end of the one before, another user the system's."""
    served = engine()
    serve(served, [replace(asked(150), marks=(20, 90, 140))])
    retried = replace(asked(150), tokens=(*LONG[:100], *LONG[200:230]))
    another = replace(asked(150), tokens=(*LONG[:30], *LONG[200:230]))
    assert [serve(served, [r])[0][-1].cached for r in (retried, another)] == [90, 20]


@pytest.mark.slow
def test_a_page_is_not_shared_where_the_next_token_differs() -> None:
    """What an MTP module keeps of a page's last token depends on the token after it."""
    served = engine(draft=2)
    other = (*LONG[:PAGE], (LONG[PAGE] + 1) % VOCAB, *LONG[PAGE + 1 : 180])
    requests = [
        replace(asked(1, new=8), tokens=tokens, marks=(PAGE,)) for tokens in (LONG[:180], other)
    ]
    both = [serve(served, [r])[0] for r in requests]
    assert both[1][-1].cached == PAGE
    for mine, theirs in zip(both, alone(engine(draft=2), requests), strict=True):
        assert ends_of(mine) == ends_of(theirs)
        assert mine[-1].acceptance == theirs[-1].acceptance


@pytest.mark.parametrize("draft", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_snapshots_survive_a_restart(draft: int, tmp_path: Path) -> None:
    options = replace(OPTIONS, draft=draft, cache_dir=tmp_path, cache_bytes=1 << 24)

    def made() -> Engine:
        return Engine(params(), None, options, steps(draft))

    first = made()
    (wanted,) = serve(first, [asked(200)])
    first.close()
    second = made()
    (again,) = serve(second, [asked(200)])
    (longer,) = serve(second, [asked(230)])
    second.close()
    assert (again[-1].cached, longer[-1].cached) == (199, 199)
    assert ends_of(again) == ends_of(wanted)
    assert ends_of(longer) == ends_of(alone(engine(draft), [asked(230)])[0])
    assert {path.name for path in tmp_path.iterdir()} == {weights_digest(params())}


def test_files_of_other_weights_or_broken_ones_are_not_read(tmp_path: Path) -> None:
    options = replace(OPTIONS, cache_dir=tmp_path, cache_bytes=1 << 24)
    first = Engine(params(), None, options, steps())
    serve(first, [asked(90)])
    first.close()
    other = params()._replace(norm=params().norm + 1)
    assert weights_digest(other) != weights_digest(params())
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:-50])
    second = Engine(params(), None, options, steps())
    (again,) = serve(second, [asked(90)])
    second.close()
    assert again[-1].cached == 0
    assert ends_of(again) == ends_of(alone(engine(), [asked(90)])[0])


@pytest.mark.parametrize(
    ("change", "options", "why"),
    [
        ({}, {}, None),
        ({"cache": False}, {}, "cache=false"),
        ({"prompt_logprobs": 0}, {}, "prompt_logprobs"),
        ({}, {"cache_bytes": 0}, "cache_bytes=0"),
    ],
)
def test_why_no_prefix_was_looked_for_is_told(
    change: dict[str, Any], options: dict[str, Any], why: str | None
) -> None:
    served = engine(**options)
    twice = [asked(41), replace(asked(41), **change)]
    last = [serve(served, [request])[0][-1] for request in twice][1]
    assert last.uncached == why and (last.cached > 0) == (why is None)


def test_a_cache_too_small_for_any_state_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = engine(cache_bytes=9)
    for _ in range(2):
        assert serve(served, [asked(41)])[0][-1].cached == 0
    (told,) = [r.getMessage() for r in caplog.records if "cache_bytes is 9" in r.getMessage()]
    assert "are not kept" in told
