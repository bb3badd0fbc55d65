"""The engine: what a request draws does not depend on what else there is."""

import random
from dataclasses import replace

import pytest
import torch

import qnext as qn
from qnext.errors import InputError
from qnext.runtime.request import ContextError, Output, RefusedError, Request
from tests.runtime.engines import (
    OPTIONS,
    VOCAB,
    alone,
    ends_of,
    engine,
    is_clean,
    mixture,
    params,
    serve,
    tokens_of,
)

SLOW = [(0, False), (1, True), (2, False), (2, True)]


@pytest.mark.parametrize(
    ("draft", "overlap"),
    [(0, True), *(pytest.param(*more, marks=pytest.mark.slow) for more in SLOW)],
)
def test_a_request_is_the_same_alone_and_in_company(draft: int, overlap: bool) -> None:
    """Through chunks, cached prefixes, swaps, priorities and mates that are aborted; to the bit,
    logprobs too, as on this target a token's result does not depend on what is computed with it."""
    requests = mixture(seed=draft, count=20)
    wanted = alone(engine(), requests)
    served = engine(draft, overlap=overlap)
    rng = random.Random(draft)
    outputs: list[list] = [[] for _ in requests]
    waiting, sequences, steps = list(enumerate(requests)), {}, 0
    while waiting or served.busy:
        if waiting and rng.random() < 0.8:
            number, request = waiting.pop(0)
            sequences[number] = served.submit(request, outputs[number].append)
        if steps in (9, 25, 60):
            served.abort(rng.choice([s for s in sequences.values() if s.finish is None]))
        served.step()
        steps += 1
    for mine, theirs in zip(outputs, wanted, strict=True):
        if mine[-1].finish == "abort":
            made = tokens_of(mine)
            assert made == tokens_of(theirs)[: len(made)]
        else:
            assert ends_of(mine) == ends_of(theirs)
    stats = served.stats
    assert stats.preempted and stats.cache_hits and stats.finished["abort"]  # all of it happened
    assert stats.finished["eos"] and stats.finished["length"]
    assert is_clean(served)
    served.close()


def test_a_prompt_that_fits_into_a_step_has_its_first_token_in_it() -> None:
    outputs: list[Output] = []
    served = engine(overlap=False)
    served.submit(Request(tokens=(5, 7, 11), max_new_tokens=2), outputs.append)
    served.step()
    assert [len(output.tokens) for output in outputs] == [1]


@pytest.mark.parametrize("draft", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_it_draws_what_generate_draws(draft: int) -> None:
    """The plain loop on the definitions; greedy, and where the likeliest is likely enough."""
    prompts = [[1, 2, 3], [9], [4, 5, 6, 7, 8] * 20]
    sampling = [qn.Sampling(temperature=t, seed=4) for t in (0.0, 0.9, 1.1)]
    requests = [
        Request(tokens=tuple(p), max_new_tokens=12, sampling=s, eos=())
        for p, s in zip(prompts, sampling, strict=True)
    ]
    for prompt, how, outputs in zip(prompts, sampling, serve(engine(draft), requests), strict=True):
        state = qn.init_state(params().config, 1, 200)
        made, _ = qn.generate(params(), state, torch.tensor([prompt]), 12, sampling=how)
        assert tokens_of(outputs) == made[0].tolist()


def test_one_token_prompts_and_answers() -> None:
    requests = [Request(tokens=(t,), max_new_tokens=1, eos=()) for t in (0, 1, VOCAB - 1)]
    outputs = serve(engine(), requests)
    assert [len(tokens_of(o)) for o in outputs] == [1, 1, 1]
    assert [o[-1].finish for o in outputs] == ["length"] * 3


def test_a_prompt_is_scored_without_drawing() -> None:
    """max_new_tokens=0: log probabilities of the prompt are forward's, in pieces or not."""
    prompt = [(7 * i) % VOCAB for i in range(75)]
    (outputs,) = serve(
        engine(), [Request(tokens=tuple(prompt), max_new_tokens=0, prompt_logprobs=2)]
    )
    state = qn.init_state(params().config, 1, 100)
    logits, _ = qn.forward(params(), state, torch.tensor([prompt]))
    wanted = logits[0].log_softmax(-1)
    told = [each for output in outputs for each in output.prompt_logprobs]
    assert [each.token for each in told] == prompt[1:]
    own = torch.tensor([each.logprob for each in told])
    torch.testing.assert_close(own, wanted[range(74), prompt[1:]], rtol=1e-5, atol=1e-5)
    best = [each.top[0][0] for each in told]
    assert best == wanted[:-1].argmax(-1).tolist()
    (nothing,) = serve(engine(), [Request(tokens=(3,), max_new_tokens=0, prompt_logprobs=0)])
    assert (nothing[-1].finish, nothing[-1].prompt_logprobs) == ("length", ())


def test_min_tokens_bias_and_eos() -> None:
    """A forbidden token is not drawn, an eos not too early, a wanted one at once."""
    every = tuple(range(VOCAB))
    base = Request(tokens=(1, 2), max_new_tokens=60, eos=every[:200])
    early, late, pulled, barred = serve(
        engine(),
        [
            base,
            replace(base, min_new_tokens=7),
            replace(base, bias={205: 100.0}, max_new_tokens=3),
            replace(base, eos=(), bias=dict.fromkeys(every[1:], float("-inf")), max_new_tokens=4),
        ],
    )
    assert (len(tokens_of(early)), early[-1].finish) == (1, "eos")
    assert all(t >= 200 for t in tokens_of(late)[:7])
    assert tokens_of(late)[-1] < 200 and late[-1].finish == "eos"
    assert (tokens_of(pulled), pulled[-1].finish) == ([205] * 3, "length")
    assert tokens_of(barred) == [0] * 4


def test_deadlines_and_the_queue() -> None:
    served = engine(max_waiting=2)
    base = Request(tokens=(1, 2, 3), max_new_tokens=5, eos=())
    late: list = []
    served.submit(replace(base, deadline=0.0), late.append)
    served.submit(base, late.append)
    with pytest.raises(RefusedError, match="2 requests are waiting"):
        served.submit(base, late.append)
    served.run()
    assert [o.finish for o in late if o.finish] == ["deadline", "length"]
    assert is_clean(served)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ()}, "empty prompt"),
        ({"tokens": (VOCAB,)}, rf"tokens: {VOCAB} is no token id: the vocabulary is 0..210"),
        ({"tokens": (True,)}, "tokens: True is no token id"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0 asks for nothing"),
        ({"max_new_tokens": 498}, "the capacity is 500 tokens, but the prompt has 3 and 498 more"),
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer >= 0"),
        ({"min_new_tokens": 6}, "min_new_tokens = 6 must not exceed max_new_tokens = 5"),
        ({"bias": {-1: 2.0}}, "bias: -1 is no token id"),
        ({"bias": {1: float("nan")}}, "bias: every value must be a number"),
        ({"eos": (999,)}, "eos: 999 is no token id"),
        ({"stops": ("",)}, "stops: an empty string stops nothing"),
        ({"stops": ("x",)}, "stops: an engine without a tokenizer"),
        ({"logprobs": -1}, r"logprobs must lie in 0\.\.211"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_served_is_refused(change: dict, message: str) -> None:
    served = engine()
    with pytest.raises(InputError, match=message):
        served.submit(replace(Request(tokens=(1, 2, 3), max_new_tokens=5), **change), print)
    assert not served.busy


def test_a_context_error_tells_the_numbers() -> None:
    with pytest.raises(ContextError) as caught:
        engine().submit(Request(tokens=(1,) * 400, max_new_tokens=101), print)
    assert (caught.value.prompt, caught.value.new, caught.value.capacity) == (400, 101, 500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows must be an integer >= 1, got 0"),
        ({"pages": 3}, "pages = 3 hold 384 tokens.*give it at least 4 pages"),
        ({"chunk": True}, "chunk must be an integer >= 1"),
        ({"draft": -1}, "draft must be an integer >= 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(OPTIONS, **change).check(params())


def test_what_a_step_draws_is_told_before_the_next_one_where_none_overlaps() -> None:
    outputs: list[Output] = []
    served = engine(overlap=False)
    served.submit(Request(tokens=(5,), max_new_tokens=3, eos=()), outputs.append)
    for made in (1, 2, 3):
        served.step()
        assert [output.made for output in outputs] == list(range(1, made + 1))


def test_cached_pages_are_not_held_for_those_who_wait_behind() -> None:
    """The first in the line needs the very pages that the second would share: it gets them."""
    served = engine(pages=4, cache_bytes=1 << 24)
    prompt = tuple((5 * i + 1) % VOCAB for i in range(300))
    other = tuple((7 * i + 2) % VOCAB for i in range(450))
    base = Request(tokens=prompt, max_new_tokens=2, eos=())
    serve(served, [base])
    requests = [replace(base, tokens=other), replace(base, tokens=(*prompt, 1, 2, 3))]
    outputs: list[list] = [[] for _ in requests]
    for request, into in zip(requests, outputs, strict=True):
        served.submit(request, into.append)
    for _ in range(200):  # `run` would not end where nobody is served
        served.step()
    assert [each[-1].finish for each in outputs] == ["length"] * 2
    wanted = alone(engine(), requests)
    assert [ends_of(each) for each in outputs] == [ends_of(each) for each in wanted]
    assert is_clean(served)
