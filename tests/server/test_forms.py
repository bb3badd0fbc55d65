"""Answers of a prescribed form, tool calls among them: right at any temperature, whole or not."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import qnext as qn
from qnext.runtime.engine import Engine
from qnext.runtime.options import Options
from tests.server.asks import CHAT, COMPLETIONS, ask, refused, stream
from tests.server.conftest import Running, ready_host, serving

pytestmark = pytest.mark.slow

Demo = tuple[qn.Params, Any]
USER = {"role": "user", "content": "Tom has 3 apples and buys 4 more. How many does he have?"}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "kinds": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "count", "kinds"],
    "additionalProperties": False,
}
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
EMPTY: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS, NAMED = [tool("add", ADD), tool("now", EMPTY)], tool("add")
ONE_CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def drafting(demo: Demo) -> Iterator[Running]:
    """The same model, guessing a token ahead."""
    options = Options(rows=1, capacity=256, chunk=64, draft=1)
    with serving(ready_host(Engine(*demo, options))) as running:
        yield running


@pytest.fixture(scope="module")
def brief(demo: Demo) -> dict[str, float]:
    """A bias against whitespace and for ends, as the demo never learned to write JSON."""
    texts = {token: demo[1].decode([token]) for token in range(3, demo[1].vocab_size)}
    blank = {str(token): -100.0 for token, text in texts.items() if not text.strip()}
    ends = {str(token): 16.0 for token, text in texts.items() if text in '"}]'}
    return blank | ends


def chat(server: Running, **body: Any) -> dict[str, Any]:
    """The only choice, at temperature 1 unless the body tells otherwise."""
    body = {"messages": [USER], "max_tokens": 120, "seed": 0, **body}
    return dict(ask(server, CHAT, **body)["choices"][0])


def streamed(server: Running, **body: Any) -> dict[str, Any]:
    """The same from a stream, its deltas joined; tool calls without their ids."""
    body = {"messages": [USER], "max_tokens": 120, "seed": 0, **body}
    content, calls, finish = "", {}, None
    for event in stream(server, CHAT, **body):
        for piece in event["choices"]:
            content += piece["delta"].get("content") or ""
            for delta in piece["delta"].get("tool_calls", ()):
                if delta["index"] not in calls:
                    assert re.fullmatch("call_[0-9a-f]{24}", delta["id"])
                    assert delta["type"] == "function" and len(calls) == delta["index"]
                    calls[delta["index"]] = {"name": delta["function"]["name"], "arguments": ""}
                else:
                    assert set(delta) == {"index", "function"}
                calls[delta["index"]]["arguments"] += delta["function"]["arguments"]
            finish = piece["finish_reason"]
    return {"content": content, "calls": [*calls.values()], "finish_reason": finish}


def parts(choice: dict[str, Any]) -> dict[str, Any]:
    """A whole choice in the shape of `streamed`."""
    calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
    content = choice["message"]["content"] or ""
    return {"content": content, "calls": calls, "finish_reason": choice["finish_reason"]}


def fits(value: Any) -> bool:
    """Whether a value is one of SCHEMA."""
    return (
        [*value] == ["name", "count", "kinds"]
        and len(value["name"]) <= 8
        and value["count"] in range(100)
        and len(value["kinds"]) <= 3
        and {*value["kinds"]} <= {"red", "green"}
    )


# ---- JSON

OBJECT = {"type": "json_object"}
FITTING = {"type": "json_schema", "json_schema": {"name": "fruit", "schema": SCHEMA}}


@pytest.mark.parametrize("seed", range(4))
def test_json_objects_are_json(server: Running, brief: dict[str, float], seed: int) -> None:
    body = {"response_format": OBJECT, "logit_bias": brief, "seed": seed}
    choice = chat(server, **body)
    assert choice["finish_reason"] == "stop"
    assert isinstance(json.loads(choice["message"]["content"]), dict)
    assert streamed(server, **body) == parts(choice)


@pytest.mark.parametrize("seed", range(3))
def test_json_fits_its_schema(server: Running, brief: dict[str, float], seed: int) -> None:
    body = {"response_format": FITTING, "logit_bias": brief, "seed": seed}
    choice = chat(server, **body)
    assert choice["finish_reason"] == "stop"
    assert fits(json.loads(choice["message"]["content"]))
    assert streamed(server, **body) == parts(choice)


def test_guided_json_is_an_object_or_its_text(server: Running, brief: dict[str, float]) -> None:
    body = {"logit_bias": brief, "seed": 1}
    expected = parts(chat(server, response_format=FITTING, **body))
    assert parts(chat(server, guided_json=SCHEMA, **body)) == expected
    assert parts(chat(server, guided_json=json.dumps(SCHEMA), **body)) == expected
    assert parts(chat(server, guided_json='{"type": "boolean"}'))["content"] in ("true", "false")


def test_plain_text_is_no_form(server: Running) -> None:
    plain = {"response_format": {"type": "text"}, "temperature": 0}
    assert chat(server, **plain) == chat(server, temperature=0)


# ---- other forms


NAMES = ["seven", 'a "quoted" name', "\u00fc"]
NUMBERS = 'start: "[" NUMBER ("," NUMBER)* "]"\nNUMBER: /[0-9]{2}/'
OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"guided_choice": NAMES}, "|".join(NAMES)),
    ({"guided_regex": r"[a-c]{3}-\d{2}"}, r"[a-c]{3}-\d{2}"),
    ({"guided_grammar": NUMBERS}, r"\[\d\d(,\d\d)*\]"),
]


def test_choices_expressions_and_grammars(server: Running) -> None:
    assert chat(server, guided_choice=NAMES[:1])["message"]["content"] == NAMES[0]
    for given, form in OTHERS:
        for seed in range(3):
            body = {**given, "seed": seed, "temperature": 1.5}
            choice = chat(server, **body)
            assert re.fullmatch(form, choice["message"]["content"])
            assert choice["finish_reason"] == "stop"
            assert streamed(server, **body) == parts(choice)


@pytest.mark.slow  # the steps of drafting must be compiled
def test_guesses_change_no_form(
    server: Running, drafting: Running, brief: dict[str, float]
) -> None:
    called: dict[str, Any] = {"tools": TOOLS, "tool_choice": NAMED, "logit_bias": brief}
    shaped = {"response_format": FITTING, "logit_bias": brief}
    for given in ({}, *(given for given, _ in OTHERS), shaped, called):
        for seed in range(3):
            expected = parts(chat(server, **given, seed=seed))
            assert parts(chat(drafting, **given, seed=seed)) == expected
            assert streamed(drafting, **given, seed=seed) == expected
    assert drafting.metrics()["vllm:spec_decode_num_accepted_tokens_total"] > 0


def test_completions_may_have_a_form_too(server: Running) -> None:
    body: dict[str, Any] = {"prompt": "7 apples", "max_tokens": 20, "n": 3, "seed": 2}
    choices = ask(server, COMPLETIONS, guided_regex="[xyz]{4}", **body)["choices"]
    texts = [choice["text"] for choice in choices]
    assert all(re.fullmatch("[xyz]{4}", text) for text in texts) and len({*texts}) > 1
    assert {choice["finish_reason"] for choice in choices} == {"stop"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": OBJECT, "guided_choice": ["a"]}, "response_format"),
        ({"guided_grammar": 'start: "a"', "guided_choice": ["a"]}, "guided_grammar"),
        ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
    ],
)
def test_only_one_form_may_be_given(server: Running, body: dict[str, Any], param: str) -> None:
    error = refused(server, CHAT, messages=[USER], **body)
    assert error["param"] == param and "give one" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"guided_json": "{"},
        {"guided_json": "5"},
        {"guided_json": {"type": "strange"}},
        {"guided_json": {"\ud800": 1}},
        {"guided_regex": "(("},
        {"guided_regex": "\ud800"},
        {"guided_choice": []},
        {"guided_choice": ["\ud800"]},
        {"guided_grammar": "nothing"},
        {"guided_grammar": "start: \ud800"},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
    ],
    ids=str,
)
def test_forms_that_are_none_are_refused(server: Running, body: dict[str, Any]) -> None:
    (name,) = body
    assert refused(server, CHAT, messages=[USER], max_tokens=3, **body)["param"] == name


def test_a_form_that_nothing_has_is_refused(server: Running) -> None:
    for body in ({"guided_json": {"$ref": "#"}}, {"guided_grammar": "start: start"}):
        refused(server, CHAT, messages=[USER], max_tokens=3, **body)
        refused(server, CHAT, messages=[USER], max_tokens=3, stream=True, **body)
    server.assert_nothing_is_held()


# ---- tools


def called(choice: dict[str, Any]) -> Sequence[tuple[str, Any]]:
    """The calls of a choice that has nothing else."""
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    calls = choice["message"]["tool_calls"]
    assert len({call["id"] for call in calls}) == len(calls)
    assert {call["type"] for call in calls} == {"function"}
    pairs = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    return [(name, json.loads(arguments)) for name, arguments in pairs]


def is_addition(arguments: Any) -> bool:
    return [*arguments] == ["a", "b"] and arguments["a"] in range(10) and arguments["b"] in (0, 1)


def test_a_tool_that_is_required_is_called(server: Running, brief: dict[str, float]) -> None:
    names = set()
    for seed in (0, 1):
        body = {"tools": TOOLS, "tool_choice": "required", "seed": seed, "logit_bias": brief}
        body["temperature"] = 2
        choice = chat(server, **body)
        for name, arguments in called(choice):
            names.add(name)
            assert is_addition(arguments) if name == "add" else arguments == {}
        assert streamed(server, **body) == parts(choice)
        assert len(called(chat(server, **body, parallel_tool_calls=False))) == 1
    assert names == {"add", "now"}


def test_a_tool_that_is_named_is_called_once(server: Running, brief: dict[str, float]) -> None:
    for seed in range(2):
        body = {"tools": TOOLS, "tool_choice": NAMED, "seed": seed, "logit_bias": brief}
        choice = chat(server, **body)
        ((name, arguments),) = called(choice)
        assert name == "add" and is_addition(arguments)
        assert streamed(server, **body) == parts(choice)


def test_tools_that_may_be_called_leave_the_text_free(server: Running) -> None:
    plain = chat(server, temperature=0)
    assert plain["finish_reason"] == "stop" and "tool_calls" not in plain["message"]
    for choice in ("auto", "none", None):
        assert chat(server, temperature=0, tools=TOOLS, tool_choice=choice) == plain
        assert chat(server, temperature=0, tools=[], tool_choice=choice) == plain


def test_text_and_calls_are_told_apart_unless_no_tool_may_be_called(server: Running) -> None:
    text = f"I add.\n{ONE_CALL}\n{ONE_CALL}"
    body = {"tools": TOOLS, "guided_choice": [text], "max_tokens": 200}
    call = {"name": "now", "arguments": "{}"}
    choice = chat(server, **body)
    expected = {"content": "I add.", "calls": [call, call], "finish_reason": "tool_calls"}
    assert parts(choice) == streamed(server, **body) == expected
    one = parts(chat(server, **body, parallel_tool_calls=False))
    assert one == streamed(server, **body, parallel_tool_calls=False)
    assert one == {**expected, "calls": [call]}
    none = chat(server, **body, tool_choice="none")
    assert parts(none) == {"content": text, "calls": [], "finish_reason": "stop"}


def test_a_call_that_is_cut_off_is_no_finished_call(server: Running) -> None:
    body = {"tools": TOOLS, "guided_choice": [ONE_CALL], "max_tokens": 28}
    choice = parts(chat(server, **body))
    assert choice["finish_reason"] == "length" == streamed(server, **body)["finish_reason"]
    assert choice["calls"] == streamed(server, **body)["calls"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": NAMED}, "tool_choice"),
        ({"tool_choice": "always", "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": tool("no"), "tools": TOOLS}, "tool_choice"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tools": [tool("a b")]}, "tools"),
        ({"tools": [tool("a", 5)]}, "tools"),
        ({"tools": [tool("a", {"type": "x"})], "tool_choice": "required"}, "tools"),
    ],
)
def test_calls_that_cannot_be_are_refused(
    server: Running, body: dict[str, Any], param: str
) -> None:
    assert refused(server, CHAT, messages=[USER], **body)["param"] == param
