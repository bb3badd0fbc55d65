"""POST /v1/completions against the model itself: what is told is what it computes."""

from typing import Any

import pytest
import torch

import qnext as qn
from tests.server.asks import COMPLETIONS, ask, refused, stream
from tests.server.conftest import Running

Demo = tuple[qn.Params, Any]
TEXT = "Nora has 12 pears and Finn has 7 of them."
QUESTION = (
    "<|im_start|>user\nTom has 3 apples and buys 4 more apples. How many apples does Tom have?"
    "<|im_end|>\n<|im_start|>assistant\n"
)
# float32 sums in another order than eager ones; log probabilities are of the order of 10
CLOSE = {"atol": 2e-4, "rtol": 1e-4}


def complete(server: Running, prompt: Any = TEXT, **body: Any) -> dict[str, Any]:
    """The only choice of a greedy answer, unless the body tells otherwise."""
    answer = ask(server, COMPLETIONS, prompt=prompt, **{"temperature": 0, **body})
    (choice,) = answer["choices"]
    return dict(choice)


def shares(demo: Demo, tokens: list[int]) -> torch.Tensor:
    """Log probabilities [seq, vocab] of what follows each token, computed eagerly."""
    params, _ = demo
    state = qn.init_state(params.config, 1, len(tokens))
    with torch.no_grad():
        logits, _ = qn.forward(params, state, torch.tensor([tokens]))
    return logits[0].log_softmax(-1)


def generated(demo: Demo, prompt: str, count: int, **sampling: Any) -> str:
    """The text that the reference loop draws."""
    params, tokenizer = demo
    tokens = tokenizer.encode(prompt)
    state = qn.init_state(params.config, 1, len(tokens) + count)
    drawn, _ = qn.generate(
        params, state, torch.tensor([tokens]), count, sampling=qn.Sampling(**sampling)
    )
    return str(tokenizer.decode(drawn[0].tolist()))


# ---- prompts


def test_the_answer_has_openais_shape(server: Running, demo: Demo) -> None:
    answer = ask(server, COMPLETIONS, model="demo", prompt=TEXT, max_tokens=6, temperature=0)
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion"
    assert answer["model"] == "demo" and isinstance(answer["created"], int)
    assert answer["choices"] == [
        {
            "index": 0,
            "text": generated(demo, TEXT, 6, temperature=0),
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    usage, count = answer["usage"], len(demo[1].encode(TEXT))
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (count, 6)
    assert usage["total_tokens"] == count + 6


def test_max_tokens_is_16_where_nothing_is_said(server: Running) -> None:
    assert ask(server, COMPLETIONS, prompt=TEXT)["usage"]["completion_tokens"] <= 16
    body = {"prompt": TEXT, "ignore_eos": True, "max_tokens": None}
    assert ask(server, COMPLETIONS, **body)["usage"]["completion_tokens"] == 16


def test_texts_and_tokens_are_prompts_one_or_many(server: Running, demo: Demo) -> None:
    texts = [TEXT, "Ruth saw", "Twelve ducks swam by."]
    ids = [demo[1].encode(text) for text in texts]
    alone = [complete(server, text, max_tokens=5)["text"] for text in texts]
    assert [complete(server, each, max_tokens=5)["text"] for each in ids] == alone
    for prompt in (texts, ids):
        answer = ask(server, COMPLETIONS, prompt=prompt, max_tokens=5, temperature=0)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert [choice["text"] for choice in answer["choices"]] == alone
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert answer["usage"]["completion_tokens"] == 15


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(server: Running) -> None:
    body: dict[str, Any] = {"max_tokens": 4, "temperature": 1, "seed": 3, "n": 2}
    both = ask(server, COMPLETIONS, prompt=[TEXT, "Ruth saw"], **body)["choices"]
    each = [ask(server, COMPLETIONS, prompt=p, **body)["choices"] for p in (TEXT, "Ruth saw")]
    assert [choice["index"] for choice in both] == [0, 1, 2, 3]
    assert [choice["text"] for choice in both] == [c["text"] for cs in each for c in cs]


BAD_PROMPTS = ["", [], [""], [[]], ["a", ""], [[1], []], None, 7, {}, [1, "a"], [True], [1.5]]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=str)
def test_no_prompt_is_refused(server: Running, prompt: Any) -> None:
    assert refused(server, COMPLETIONS, prompt=prompt)["param"] == "prompt"


def test_tokens_that_the_model_has_not_are_refused(server: Running) -> None:
    for prompt in ([5, 1024], [[5], [1024]], [-1]):
        assert refused(server, COMPLETIONS, prompt=prompt)["param"] == "prompt"


# ---- log probabilities


def test_logprobs_are_those_of_the_model(server: Running, demo: Demo) -> None:
    _, tokenizer = demo
    told = complete(server, max_tokens=8, logprobs=3, temperature=1, seed=11)["logprobs"]
    prompt = tokenizer.encode(TEXT)
    drawn = [tokenizer.token_id(text.replace(" ", "\u0120")) for text in told["tokens"]]
    expected = shares(demo, prompt + drawn)[len(prompt) - 1 : -1]
    own = torch.tensor(told["token_logprobs"])
    torch.testing.assert_close(own, expected[range(8), drawn], **CLOSE)
    for row, top in zip(expected, told["top_logprobs"], strict=True):
        values, ids = row.topk(3)
        likeliest = [tokenizer.decode([i]) for i in ids.tolist()]
        assert len(top) in (3, 4)  # the one that was drawn may be another
        torch.testing.assert_close(torch.tensor([top[t] for t in likeliest]), values, **CLOSE)


def test_logprobs_of_no_others_are_those_of_the_drawn_token(server: Running) -> None:
    told = complete(server, max_tokens=4, logprobs=0)["logprobs"]
    pairs = zip(told["tokens"], told["token_logprobs"], strict=True)
    assert told["top_logprobs"] == [{token: value} for token, value in pairs]


def test_echo_scores_the_prompt(server: Running, demo: Demo) -> None:
    _, tokenizer = demo
    told = complete(server, max_tokens=0, echo=True, logprobs=2)
    assert (told["text"], told["finish_reason"]) == (TEXT, "length")
    prompt = tokenizer.encode(TEXT)
    logprobs = told["logprobs"]
    assert "".join(logprobs["tokens"]) == TEXT
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    expected = shares(demo, prompt)[range(len(prompt) - 1), prompt[1:]]
    torch.testing.assert_close(torch.tensor(logprobs["token_logprobs"][1:]), expected, **CLOSE)
    assert logprobs["text_offset"] == [
        len("".join(logprobs["tokens"][:i])) for i in range(len(prompt))
    ]


def test_decode_and_prefill_tell_the_same_to_the_bit(server: Running) -> None:
    drawn = complete(server, max_tokens=12, logprobs=4, temperature=1, seed=2, ignore_eos=True)
    again = complete(server, TEXT + drawn["text"], max_tokens=0, logprobs=4, echo=True)
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert again["logprobs"][name][-12:] == drawn["logprobs"][name], name


def test_echo_precedes_what_is_drawn(server: Running) -> None:
    plain = complete(server, max_tokens=5, logprobs=1)
    assert complete(server, max_tokens=5, echo=True)["text"] == TEXT + plain["text"]
    both = complete(server, max_tokens=5, echo=True, logprobs=1)
    alone = complete(server, max_tokens=0, echo=True, logprobs=1)
    assert both["text"] == TEXT + plain["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert both["logprobs"][name] == alone["logprobs"][name] + plain["logprobs"][name]


def test_echo_of_one_token(server: Running) -> None:
    told = complete(server, [40], max_tokens=0, echo=True, logprobs=1)
    assert told["logprobs"]["token_logprobs"] == [None]
    assert complete(server, [40], max_tokens=0, echo=True)["logprobs"] is None


def test_nothing_to_do_is_refused(server: Running) -> None:
    assert refused(server, COMPLETIONS, prompt=TEXT, max_tokens=0)["param"] == "max_tokens"


# ---- streams


def joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices that a stream's events make."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for piece in event["choices"]:
            choice = choices.setdefault(piece["index"], {**piece, "text": "", "logprobs": None})
            assert not choice.get("ended"), "nothing follows the finish reason"
            choice["text"] += piece["text"]
            if piece["logprobs"] is not None:
                lists = choice["logprobs"] or {name: [] for name in piece["logprobs"]}
                choice["logprobs"] = {k: lists[k] + v for k, v in piece["logprobs"].items()}
            choice |= {k: piece[k] for k in ("finish_reason", "stop_reason")}
            choice["ended"] = piece["finish_reason"] is not None
    assert all(choice.pop("ended") for choice in choices.values())
    return [choices[index] for index in sorted(choices)]


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 9, "temperature": 1, "seed": 4, "logprobs": 2},
        {"max_tokens": 9, "temperature": 1, "seed": 4, "logprobs": 2, "echo": True},
        {"max_tokens": 0, "echo": True, "logprobs": 0},
        {"max_tokens": 0, "echo": True},
        {"max_tokens": 40, "temperature": 0, "stop": ["\n", "ing"]},
        {"max_tokens": 5, "temperature": 1, "seed": 4, "n": 3},
        {"max_tokens": 60, "temperature": 0, "prompt": QUESTION, "skip_special_tokens": False},
    ],
)
def test_streams_join_to_the_whole_answer(server: Running, body: dict[str, Any]) -> None:
    body = {"prompt": TEXT, **body}
    whole = ask(server, COMPLETIONS, **body)
    events = stream(server, COMPLETIONS, **body)
    assert joined(events) == whole["choices"]
    assert len({event["id"] for event in events}) == 1
    assert {event["object"] for event in events} == {"text_completion"}
    assert not any("usage" in event for event in events)


def test_usage_of_a_stream(server: Running) -> None:
    body: dict[str, Any] = {"prompt": TEXT, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    ask(server, COMPLETIONS, **body)  # so that the next two find the same in the cache
    usage = ask(server, COMPLETIONS, **body)["usage"]
    *pieces, last = stream(server, COMPLETIONS, stream_options={"include_usage": True}, **body)
    assert (last["choices"], last["usage"]) == ([], usage)
    assert not any("usage" in piece for piece in pieces)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *pieces, last = stream(server, COMPLETIONS, stream_options=options, **body)
    made = [piece["usage"]["completion_tokens"] for piece in pieces]
    assert made == sorted(made) and made[-1] == 5 and last["usage"] == usage


def test_a_prompt_that_comes_again_is_cached_but_for_its_last_token(server: Running) -> None:
    for prompt in ("Leo has seen this prompt before, has he not?", "Ducks! " * 90):
        first, second = (
            ask(server, COMPLETIONS, prompt=prompt, max_tokens=1)["usage"] for _ in range(2)
        )
        assert first["prompt_tokens_details"]["cached_tokens"] < 4  # others may begin as it does
        assert second["prompt_tokens_details"]["cached_tokens"] == first["prompt_tokens"] - 1


# ---- choices and seeds


def test_seeds_follow_one_another_and_differ(server: Running) -> None:
    body: dict[str, Any] = {"prompt": TEXT, "temperature": 1, "max_tokens": 8}
    texts = [c["text"] for c in ask(server, COMPLETIONS, n=3, seed=7, **body)["choices"]]
    assert len(set(texts)) == 3
    assert [complete(server, **body, seed=7 + i)["text"] for i in range(3)] == texts
    free = [complete(server, **body)["text"] for _ in range(6)]
    assert len(set(free)) > 1


@pytest.mark.parametrize("seed", [-1, 0, -(2**63), 2**63 - 1])
def test_any_64_bit_seed_will_do(server: Running, seed: int) -> None:
    body: dict[str, Any] = {"prompt": TEXT, "temperature": 1, "max_tokens": 3, "seed": seed}
    first, second = (ask(server, COMPLETIONS, n=2, **body)["choices"] for _ in range(2))
    assert first == second


def test_other_seeds_are_refused(server: Running) -> None:
    for seed in (2**63, -(2**63) - 1, 10**400, 1.5, "1", True):
        assert refused(server, COMPLETIONS, prompt=TEXT, seed=seed)["param"] == "seed"


def test_best_of_must_be_n(server: Running) -> None:
    for body in ({"best_of": 1}, {"n": 2, "best_of": 2}, {"n": 2, "best_of": None}):
        answer = ask(server, COMPLETIONS, prompt=TEXT, max_tokens=1, **body)
        assert len(answer["choices"]) == (body.get("n") or 1)
    for body in ({"best_of": 2}, {"n": 2, "best_of": 3}, {"n": 2, "best_of": 1}):
        assert refused(server, COMPLETIONS, prompt=TEXT, **body)["param"] == "best_of"


def test_suffix_is_refused(server: Running) -> None:
    assert refused(server, COMPLETIONS, prompt=TEXT, suffix="x")["param"] == "suffix"
    complete(server, suffix=None, max_tokens=1)


def test_the_capacity_is_exact_and_told(server: Running) -> None:
    prompt, eos = [40] * 900, {"2": 100}
    answer = ask(server, COMPLETIONS, prompt=prompt, max_tokens=124, logit_bias=eos)
    assert answer["choices"][0]["finish_reason"] == "stop"
    error = refused(server, COMPLETIONS, prompt=prompt, max_tokens=125)
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert error["type"] == "invalid_request_error"
    for number in ("1024", "900", "125", "124"):
        assert number in error["message"]
    with_stream = refused(server, COMPLETIONS, prompt=prompt, max_tokens=125, stream=True)
    assert with_stream == error


def test_a_model_that_is_not_here_is_404(server: Running) -> None:
    error = refused(server, COMPLETIONS, 404, model="gpt-4", prompt=TEXT)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "gpt-4" in error["message"] and "demo" in error["message"]
