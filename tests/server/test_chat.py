"""POST /v1/chat/completions: conversations, streams, reasoning, log probabilities, later turns."""

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import qnext as qn
from qnext.embedded import MODEL
from qnext.runtime.engine import Engine
from qnext.runtime.service import Service
from qnext.server.asked import Reader
from qnext.server.guide import Grammars
from qnext.server.host import Host, Ready
from tests.server.asks import CHAT, COMPLETIONS, ask, post, refused, stream
from tests.server.conftest import OPTIONS, Running, serving

Demo = tuple[qn.Params, Any]
SYSTEM = {"role": "system", "content": "You solve problems."}
USER = {"role": "user", "content": "Tom has 3 apples and buys 4 more. How many does he have?"}

# as templates of models that reason: unless they are told not to, they open the reasoning
THINKING = """
{%- for message in messages -%}
{%- if message.content == "refuse" or message.content is not string -%}
{{- raise_exception("no: " + refusal) -}}
{%- endif -%}
{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|im_start|>assistant\\n" + ("" if enable_thinking is false else "<think>\\n") -}}
{%- endif -%}
"""


class Literal(Grammars):
    """A regular expression of letters alone is what the model says from the very beginning."""

    def regex(self, pattern: str, *, after: str | None = None, field: str = "regex") -> Any:
        return super().regex(re.escape(pattern), field=field)


@pytest.fixture(scope="module")
def thinking(
    demo: Demo, server: Running, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """The demo model with a template that opens `<think>`; `guided_regex` is what it says."""
    path = tmp_path_factory.mktemp("thinking")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(MODEL / name, path / name)
    Path(path, "chat_template.jinja").write_text(THINKING, encoding="utf-8")
    tokenizer, vocab = qn.tokenizer(path), demo[0].config.vocab_size
    engine = Engine(demo[0], tokenizer, OPTIONS, server.service.engine.steps)
    reader = Reader(tokenizer, Literal(tokenizer, vocab), OPTIONS.capacity, vocab)
    host = Host("demo", {"target": "cpu"})
    host.loaded(Ready(Service(engine), tokenizer, reader))
    with serving(host) as running:
        yield running


def said(server: Running, *messages: Any, **body: Any) -> dict[str, Any]:
    """The message of a greedy answer, unless the body tells otherwise."""
    answer = ask(server, CHAT, messages=messages, **{"temperature": 0, "max_tokens": 200, **body})
    return dict(answer["choices"][0]["message"])


def joined(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices that the deltas of a stream make."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        assert event["object"] == "chat.completion.chunk"
        for piece in event["choices"]:
            delta, index = dict(piece["delta"]), piece["index"]
            if index not in choices:
                assert delta == {"role": "assistant", "content": ""}, "the role comes first"
                message = {"role": "assistant", "content": "", "reasoning_content": None}
                choices[index] = {**piece, "message": message, "told": []}
            choice = choices[index]
            assert choice["finish_reason"] is None, "nothing follows the finish reason"
            choice["finish_reason"] = piece["finish_reason"]
            choice["told"] += (piece["logprobs"] or {}).get("content", [])
            message = choice["message"]
            message["content"] += delta.get("content") or ""
            if "reasoning_content" in delta:
                message["reasoning_content"] = (message["reasoning_content"] or "") + delta[
                    "reasoning_content"
                ]
    return [choices[index] for index in sorted(choices)]


# ---- messages


def test_the_answer_has_openais_shape(server: Running, demo: Demo) -> None:
    answer = ask(server, CHAT, model="demo", messages=[USER], temperature=0, max_tokens=200)
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    prompt = demo[1].render_chat([USER])
    text = ask(server, COMPLETIONS, prompt=prompt, temperature=0, max_tokens=200)
    assert choice == {
        "index": 0,
        "finish_reason": "stop",
        "stop_reason": None,
        "logprobs": None,
        "message": {
            "role": "assistant",
            "content": text["choices"][0]["text"],
            "reasoning_content": None,
        },
    }
    assert choice["message"]["content"]
    assert answer["usage"]["prompt_tokens"] == len(demo[1].encode(prompt))


def test_parts_of_text_are_joined(server: Running) -> None:
    text = USER["content"]
    parts = [{"type": "text", "text": piece} for piece in (text[:9], text[9:10], text[10:])]
    assert said(server, {"role": "user", "content": parts}) == said(server, USER)
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    error = refused(server, CHAT, messages=[{"role": "user", "content": [image]}])
    assert error["param"] == "messages" and "messages.0.content.0.type" in error["message"]


def test_developers_speak_as_the_system(server: Running) -> None:
    developer = {**SYSTEM, "role": "developer"}
    assert said(server, developer, USER) == said(server, SYSTEM, USER)
    assert said(server, SYSTEM, USER) != said(server, USER)


def test_no_content_is_empty_content(server: Running) -> None:
    nothing = {"role": "assistant", "content": None}
    empty = {"role": "assistant", "content": ""}
    assert said(server, USER, nothing, USER) == said(server, USER, empty, USER)


def test_what_the_template_refuses_is_told(server: Running) -> None:
    message = {"role": "tool", "content": "7", "tool_call_id": "call_1"}
    error = refused(server, CHAT, messages=[USER, message])
    assert "unknown role: tool" in error["message"] and error["param"] == "messages"
    assert str(MODEL) not in error["message"]


def test_a_refusal_may_quote_what_utf8_cannot_express(thinking: Running) -> None:
    messages = [{"role": "user", "content": "refuse"}]
    error = refused(thinking, CHAT, messages=messages, chat_template_kwargs={"refusal": "a\ud800"})
    assert "no: a\ud800" in error["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "hi",
        [{}],
        [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": "\ud800"}],
        [{"content": "x"}],
        ["x"],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    ],
    ids=str,
)
def test_what_is_no_conversation_is_refused(server: Running, messages: Any) -> None:
    assert refused(server, CHAT, messages=messages)["param"] == "messages"


def test_arguments_of_earlier_calls_may_not_be_too_deep(server: Running) -> None:
    call = {"function": {"name": "f", "arguments": "[" * 5000}}
    error = refused(server, CHAT, messages=[{"role": "assistant", "tool_calls": [call]}])
    assert "deep" in error["message"]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [0, -1, "7", True, 7.5]),
        ("max_completion_tokens", [0, "7", True]),
        ("logprobs", [5, 1, "true"]),
        ("top_logprobs", [21, -1, True, "3", 3]),  # the last for want of logprobs
        ("tools", [5, [5], [{}], [{"type": "function", "function": {"name": ""}}]]),
        ("parallel_tool_calls", [0, "false"]),
        ("chat_template_kwargs", [5, [], {"messages": []}, {"self": 1}, {"tools": 1}]),
    ],
)
def test_wrong_types_are_refused_by_name(server: Running, field: str, values: list[Any]) -> None:
    for value in values:
        assert refused(server, CHAT, messages=[USER], **{field: value})["param"] == field, value


def test_nulls_and_unknown_fields_are_as_nothing(server: Running) -> None:
    names = (
        "model stream stream_options n seed stop logit_bias response_format guided_json user "
        "max_completion_tokens logprobs top_logprobs tools tool_choice parallel_tool_calls "
        "separate_reasoning chat_template_kwargs"
    ).split()
    more = {"store": False, "reasoning_effort": "low", "metadata": {"a": 1}, "modalities": ["text"]}
    assert said(server, USER, **dict.fromkeys(names), **more) == said(server, USER)


# ---- how long


def test_the_rest_of_the_capacity_is_the_most_of_an_answer(server: Running) -> None:
    long = {"role": "user", "content": "ducks " * 240}
    answer = ask(server, CHAT, messages=[long], temperature=0, ignore_eos=True)
    usage = answer["usage"]
    assert usage["total_tokens"] == 1024 and 0 < usage["completion_tokens"] < 100
    assert answer["choices"][0]["finish_reason"] == "length"
    for body in ({}, {"max_tokens": 5}):
        error = refused(server, CHAT, messages=[long, long, USER], **body)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_max_completion_tokens_goes_before_max_tokens(server: Running) -> None:
    for body, most in (
        ({"max_completion_tokens": 3}, 3),
        ({"max_tokens": 4}, 4),
        ({"max_tokens": 9, "max_completion_tokens": 2}, 2),
        ({"max_tokens": 2, "max_completion_tokens": 5}, 5),
    ):
        answer = ask(server, CHAT, messages=[USER], ignore_eos=True, **body)
        assert answer["usage"]["completion_tokens"] == most
        assert answer["choices"][0]["finish_reason"] == "length"


def test_a_stop_string_or_token_that_ended_an_answer_is_told(server: Running, demo: Demo) -> None:
    text = said(server, USER)["content"]
    token = demo[1].encode(text)[3]
    for body, reason in (
        ({"stop": ["~", text[5:8]]}, text[5:8]),
        ({"stop_token_ids": [token]}, token),
    ):
        answer = ask(server, CHAT, messages=[USER], temperature=0, **body)
        (choice,) = answer["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", reason)
        assert (
            text.startswith(choice["message"]["content"]) and choice["message"]["content"] != text
        )


# ---- streams


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 0},
        {"temperature": 1, "seed": 3, "n": 2, "max_tokens": 8},
        {"temperature": 0, "stop": [" apples", "."]},
        {"temperature": 0, "logprobs": True, "top_logprobs": 2},
        {"temperature": 0, "logprobs": True, "stop": "ppl"},
    ],
    ids=str,
)
def test_streams_join_to_the_whole_answer(server: Running, body: dict[str, Any]) -> None:
    body = {"messages": [USER], "max_tokens": 200, **body}
    ask(server, CHAT, **body)  # so that the next two find the same in the cache
    whole = ask(server, CHAT, **body)
    options = {"include_usage": True}
    *events, last = stream(server, CHAT, **body, stream_options=options)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len({event["id"] for event in [*events, last]}) == 1
    choices = joined(events)
    assert len(choices) == len(whole["choices"])
    for choice, expected in zip(choices, whole["choices"], strict=True):
        assert choice["message"] == expected["message"]
        assert choice["finish_reason"] == expected["finish_reason"]
        assert choice["told"] == (expected["logprobs"] or {"content": []})["content"]


def test_a_stream_tells_its_usage_all_the_time_where_it_is_asked_to(server: Running) -> None:
    options = {"continuous_usage_stats": True}
    body = {"messages": [USER], "max_tokens": 5, "ignore_eos": True}
    events = stream(server, CHAT, stream_options=options, **body)
    made = [event["usage"]["completion_tokens"] for event in events]
    assert made == sorted(made) and made[-1] == 5
    assert not any("usage" in event for event in stream(server, CHAT, **body))


def test_what_is_wrong_with_a_stream_is_no_stream(server: Running) -> None:
    body = {"messages": [USER], "max_tokens": 2000, "stream": True}
    response = post(server, CHAT, body)
    assert (response.status_code, response.headers["content-type"]) == (400, "application/json")


# ---- reasoning


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    ("reasoning", "content"), [("3 and 4.\nThat is 7.", "Seven."), ("", "Seven."), ("Hm", "")]
)
def test_reasoning_is_apart_from_the_answer(
    thinking: Running, opened: bool, reasoning: str, content: str
) -> None:
    says = f"{reasoning}\n</think>\n\n{content}"
    body: dict[str, Any] = {
        "guided_regex": says if opened else f"<think>\n{says}",
        "chat_template_kwargs": {"enable_thinking": opened},
    }
    message = said(thinking, USER, **body)
    assert message["content"] == content
    assert message["reasoning_content"] == (reasoning or None)
    (choice,) = joined(stream(thinking, CHAT, messages=[USER], max_tokens=200, **body))
    assert choice["message"] == message
    together = said(thinking, USER, separate_reasoning=False, **body)
    assert together == {**together, "content": body["guided_regex"], "reasoning_content": None}


def test_reasoning_that_does_not_end_is_all_there_is(thinking: Running) -> None:
    message = said(thinking, USER, max_tokens=5)
    assert message["content"] == "" and message["reasoning_content"]
    plain = said(thinking, USER, max_tokens=5, chat_template_kwargs={"enable_thinking": False})
    assert plain["content"] and plain["reasoning_content"] is None


# ---- log probabilities


def test_logprobs_tell_tokens_and_their_bytes(server: Running, demo: Demo) -> None:
    body: dict[str, Any] = {"messages": [USER], "temperature": 1, "seed": 5, "max_tokens": 10}
    answer = ask(server, CHAT, logprobs=True, top_logprobs=3, **body)
    (choice,) = answer["choices"]
    told = choice["logprobs"]["content"]
    assert len(told) == answer["usage"]["completion_tokens"]
    assert bytes(b for each in told for b in each["bytes"]).decode() == choice["message"]["content"]
    prompt = demo[1].render_chat([USER])
    plain = {name: value for name, value in body.items() if name != "messages"}
    same = ask(server, COMPLETIONS, prompt=prompt, logprobs=3, **plain)["choices"][0]["logprobs"]
    assert [each["token"] for each in told] == same["tokens"]
    assert [each["logprob"] for each in told] == same["token_logprobs"]
    for each, top in zip(told, same["top_logprobs"], strict=True):
        assert len(each["top_logprobs"]) == 3
        pairs = {t["token"]: t["logprob"] for t in each["top_logprobs"]}
        assert pairs.items() <= top.items()
        assert all(t["token"].encode() == bytes(t["bytes"]) for t in each["top_logprobs"])
        assert [*pairs.values()] == sorted(pairs.values(), reverse=True)
    alone = ask(server, CHAT, logprobs=True, **body)["choices"][0]["logprobs"]["content"]
    assert alone == [{**each, "top_logprobs": []} for each in told]


# ---- later turns


def test_a_second_turn_finds_all_of_the_first_in_the_cache(server: Running) -> None:
    asked = {"role": "user", "content": "Ruth has 9 pears and eats 2 of them. How many are left?"}
    body: dict[str, Any] = {"temperature": 0, "max_tokens": 200}
    first = ask(server, CHAT, messages=[SYSTEM, asked], **body)
    (choice,) = first["choices"]
    assert choice["finish_reason"] == "stop"
    messages = [SYSTEM, asked, choice["message"], USER]
    usage = ask(server, CHAT, messages=messages, **body)["usage"]
    # all but the reply's last token, <|im_end|>, which was drawn and never consumed
    assert usage["prompt_tokens_details"]["cached_tokens"] == first["usage"]["total_tokens"] - 1
    assert usage["prompt_tokens"] > first["usage"]["total_tokens"]
