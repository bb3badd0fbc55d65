"""A model's text as the parts of a message: the rules, and that how it is cut does not matter."""

import json
from collections.abc import Mapping, Sequence
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.errors import InputError
from qnext.server.parse import Parser, assemble, opens_reasoning
from qnext.server.parse_text import Arguments, CallBegun, Content, Event, Json, Reasoning, is_json
from qnext.server.parse_tools import as_json, parameter_types

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "s": {"type": "string"},
                    "i": {"type": "integer"},
                    "o": {"$ref": "#/$defs/object"},
                    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "flag": {"type": ["boolean", "null"]},
                    "colour": {"enum": ["red", "5"]},
                    "free": {},
                },
                "$defs": {"object": {"type": "object"}},
            },
        },
    },
    {"type": "function", "function": {"name": "g"}},
]
HERMES = '<tool_call>\n{"name": "f", "arguments": {"s": "a<b", "n": [1, -2.5e3]}}\n</tool_call>'
CODER = (
    '<tool_call>\n<function=f>\n<parameter=s>\nx\n"y"\n\n</parameter>\n<parameter=i>\n12\n'
    "</parameter>\n</function>\n</tool_call>"
)
PIECES = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "</function>"),
    *("<function=", "<parameter=s>", "<parameter=i>", "</parameter>", "<", ">", "</", "<tool"),
    *(
        "\n",
        "\n\n",
        " ",
        "f",
        "5",
        "true",
        "null",
        '"',
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\\",
        "\\u00",
    ),
    *('{"name": "f", "arguments": {', '{"name": "g"}', '"arguments": {}', '"name": "f"', '"x": 1'),
    *("\u00e9", "\U0001f600", "\x00", "Hello, ", HERMES, CODER),
]
MANY = settings(deadline=None, max_examples=200, derandomize=True)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SOUP = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=14).map("".join)


def events(pieces: Sequence[str], tools: Any = TOOLS, **how: bool) -> list[Event]:
    """The events of a text in pieces, neighbours of one kind joined."""
    numbers = count()
    parser = Parser(lambda: f"call_{next(numbers):024x}", tools, **how)
    joined: list[Event] = []
    for event in [e for piece in pieces for e in parser.push(piece)] + parser.finish():
        match (joined[-1] if joined else None), event:
            case Content(before), Content(text):
                joined[-1] = Content(before + text)
            case Reasoning(before), Reasoning(text):
                joined[-1] = Reasoning(before + text)
            case Arguments(index, before), Arguments(_, text):
                joined[-1] = Arguments(index, before + text)
            case _:
                joined.append(event)
    return joined


def message(text: str, tools: Any = TOOLS, **how: bool) -> tuple[Any, Any, list[Any]]:
    """Content, reasoning, and (name, arguments) of the calls of a text, letter by letter too."""
    whole = assemble(events([text], tools, **how))
    assert whole == assemble(events(list(text), tools, **how))
    calls: Any = whole["tool_calls"]
    shown = [(c["function"]["name"], c["function"]["arguments"]) for c in calls]
    return whole["content"], whole["reasoning_content"], shown


@MANY
@given(SOUP, st.lists(st.integers(0, 200), max_size=8), st.booleans(), st.booleans(), st.booleans())
def test_cuts_make_no_difference(
    text: str, cuts: list[int], reasoning: bool, opened: bool, parallel: bool
) -> None:
    how = {"reasoning": reasoning, "opened": opened, "parallel": parallel}
    at = [0, *sorted(cuts), max([len(text), *cuts])]
    pieces = [text[a:b] for a, b in pairwise(at)]
    whole = events([text], **how)
    assert events(pieces, **how) == whole == events(list(text), **how)


def letters(text: str) -> list[str]:
    """Characters that no rule may drop: tags' own and whitespace aside."""
    for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>"):
        text = text.replace(tag, "")
    return sorted(text.replace("\n", "").replace(" ", ""))


@MANY
@given(SOUP, st.booleans())
def test_nothing_is_lost_where_nothing_is_a_call(text: str, opened: bool) -> None:
    found = events(list(text), opened=opened)
    if not any(isinstance(event, CallBegun) for event in found):
        kept = "".join(e.text for e in found if isinstance(e, Content | Reasoning))
        assert letters(kept) == letters(text)
    plain = assemble(events([text], reasoning=False, tools=()))
    assert plain == {"content": text, "reasoning_content": None, "tool_calls": []}


@MANY
@given(SOUP)
def test_arguments_begin_json_at_any_time(text: str) -> None:
    for event in events([text]):
        if isinstance(event, Arguments):
            value = Json()
            assert value.feed(event.text) == len(event.text) and not value.failed


@MANY
@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | NUMBERS | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
        max_size=3,
    ),
    st.booleans(),
    st.text(alphabet="abc \n.", max_size=5),
)
def test_calls_come_back(values: list[Any], ascii: bool, before: str) -> None:
    given = [json.dumps({"x": value}, ensure_ascii=ascii, allow_nan=False) for value in values]
    calls = [f'<tool_call>\n{{"name": "f", "arguments": {a}}}\n</tool_call>' for a in given]
    text = "\n".join([before.strip(), *calls]) if before.strip() else "\n".join(calls)
    content, _, found = message(text)
    assert [arguments for _, arguments in found] == given
    assert content == (before.strip() or ("" if not calls else None))


@pytest.mark.parametrize(
    ("text", "how", "content", "reasoning"),
    [
        ("Hi", {}, "Hi", None),
        ("\n\n Hi\n", {}, "\n\n Hi\n", None),
        ("\nhm\n\n</think>\n\nHi\n", {"opened": True}, "Hi\n", "hm"),
        ("hm\n\n a</think> Hi", {"opened": True}, " Hi", "hm\n\n a"),
        ("\n<think>\nhm\n</think>\n\nHi", {}, "Hi", "hm"),
        ("<think>\n\n</think>\n\nHi", {}, "Hi", None),
        ("Hi <think>no</think>", {}, "Hi <think>no</think>", None),
        ("no</think>\nHi", {}, "no</think>\nHi", None),
        ("a</think>b</think>c", {"opened": True}, "b</think>c", "a"),
        ("a\n</thi", {"opened": True}, "", "a\n</thi"),
        ("<thi", {}, "<thi", None),
        ("  <thi", {}, "  <thi", None),
        ("", {"opened": True}, "", None),
        ("<think>a</think>b", {"reasoning": False}, "<think>a</think>b", None),
        ("a</think>b", {"reasoning": False, "opened": True}, "a</think>b", None),
        (f"plan {HERMES}</think>Hi", {"opened": True}, "Hi", f"plan {HERMES}"),
    ],
)
def test_reasoning(
    text: str, how: dict[str, bool], content: str | None, reasoning: str | None
) -> None:
    assert message(text, **how) == (content, reasoning, [])


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\nI was thinking that", True),
        ("<|im_start|>assistant\nThe tag <think> opens", False),
        ("<|im_start|>assistant\n<think>a</think>b<|im_end|><|im_start|>assistant\n", False),
        ("", False),
    ],
)
def test_what_prompts_open(prompt: str, opened: bool) -> None:
    assert opens_reasoning(prompt) is opened


ARGUMENTS = '{"s": "a<b", "n": [1, -2.5e3]}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (HERMES, None, [("f", ARGUMENTS)]),
        (f"Let me see.\n{HERMES}\n{HERMES}\n", "Let me see.", [("f", ARGUMENTS)] * 2),
        (f"A.\n\n{HERMES}", "A.\n", [("f", ARGUMENTS)]),
        (f"\n \n{HERMES}{HERMES}", None, [("f", ARGUMENTS)] * 2),
        (f"{HERMES}\nDone.", "\nDone.", [("f", ARGUMENTS)]),
        ('<tool_call>{"arguments":{"s":""},"name":"f"}</tool_call>', None, [("f", '{"s":""}')]),
        ('<tool_call>{"id": [1], "name": "g"}</tool_call>', None, [("g", "{}")]),
        # a string may hold the closing tag
        (
            '<tool_call>{"name":"f","arguments":{"s":"</tool_call>"}}</tool_call>',
            None,
            [("f", '{"s":"</tool_call>"}')],
        ),
        # no closing tag, and an outermost brace that is missing
        ('<tool_call>\n{"name": "g", "arguments": {}}', None, [("g", "{}")]),
        ('<tool_call>\n{"name": "g", "arguments": {}}\n</tool', None, [("g", "{}")]),
        ('<tool_call>{"name": "g", "arguments": {}\n</tool_call>', None, [("g", "{}")]),
        # cut short: what was told of stands, else it is text
        ('<tool_call>{"name": "f", "arguments": {"s": "a', None, [("f", '{"s": "a')]),
        ('x <tool_call>{"name": "f", "argum', 'x <tool_call>{"name": "f", "argum', []),
        ('<tool_call>{"arguments": {}, ', '<tool_call>{"arguments": {}, ', []),
        # broken: the text from there on is content
        ('<tool_call>{"name": "f", "arguments": {"s": }}', "}}", [("f", '{"s": ')]),
        ('<tool_call>{"name": "f", "arguments": {}} x', " x", [("f", "{}")]),
    ],
)
def test_hermes_calls(text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    assert message(text) == (content, None, calls)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
        '\n<tool_call>{"name": 5}</tool_call>\n',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        "<tool_call>{'name': 'f'}</tool_call>",
        '<tool_call>{"name": "f",}</tool_call>',
        '<tool_call>{"name" "f"}</tool_call>',
        "<tool_call>{}</tool_call>",
        "<tool_call>hello</tool_call> there",
        " a <tool_call>",
        "<tool_call>\n<function=other>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f\n>",
        "<tool_call><function=f></tool_call>",
        "a </tool_call> b <tool <tool_cal",
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert message(text) == (text, None, [])


def test_a_call_may_follow_what_is_none() -> None:
    text = '<tool_call>{"name": <tool_call>{"name": "g"}</tool_call>'
    assert message(text) == ('<tool_call>{"name": ', None, [("g", "{}")])


def test_coder_calls() -> None:
    found = message(f"Let me.\n{CODER}\n{CODER}")
    assert found == ("Let me.", None, [("f", '{"s": "x\\n\\"y\\"\\n", "i": 12}')] * 2)
    empty = "<tool_call>\n<function=g>\n</function>\n</tool_call>"
    assert message(empty) == (None, None, [("g", "{}")])
    inline = "<tool_call><function=f><parameter=s></parameter></function></tool_call>"
    assert message(inline) == (None, None, [("f", '{"s": ""}')])
    assert message(CODER.removesuffix("\n</tool_call>"))[2] == found[2][:1]
    short = "<tool_call><function=f><parameter=s>\nab\n"
    assert message(short) == (None, None, [("f", '{"s": "ab\\n')])
    short = "<tool_call><function=f><parameter=i>\n12"
    assert message(short) == ("12", None, [("f", '{"i": ')])


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        *(("s", "5", "5"), ("s", "null", "null"), ("colour", "5", "5"), ("i", "5", 5)),
        *(("i", "five", "five"), ("o", '{"a": [1]}', {"a": [1]}), ("o", "{'a'}", "{'a'}")),
        *(("maybe", "null", None), ("maybe", "None", None), ("maybe", "5", "5")),
        *(("flag", "True", True), ("flag", "false", False), ("flag", "None", None)),
        *(("free", "5", 5), ("free", "True", "True"), ("unknown", "a b", "a b")),
        *(("i", "9" * 5000, None), ("i", "NaN", "NaN"), ("free", "[" * 5000, "[" * 5000)),
    ],
)
def test_values_have_the_types_of_their_parameters(key: str, text: str, value: Any) -> None:
    call = f"<tool_call>\n<function=f>\n<parameter={key}>\n{text}\n</parameter>\n</function>"
    (((_, arguments),),) = (message(call)[2],)
    if len(text) == 5000 and value is None:  # more digits than Python reads
        assert arguments == f'{{"{key}": {text}}}'
    else:
        assert json.loads(arguments) == {key: value}


def test_references_in_circles_end() -> None:
    schema: Mapping[str, object] = {
        "properties": {"a": {"$ref": "#/$defs/a"}},
        "$defs": {"a": {"$ref": "#/$defs/a"}},
    }
    assert parameter_types(schema, "a") == frozenset()
    assert as_json("5", frozenset()) == "5"


def test_arguments_stream_as_they_come() -> None:
    parser = Parser(lambda: "call_x", TOOLS)
    assert parser.push('Hi.\n<tool_call>\n{"name": "f", ') == [Content("Hi.")]
    assert parser.push('"arguments"') == []
    assert parser.push(': {"s": "a') == [CallBegun(0, "call_x", "f"), Arguments(0, '{"s": "a')]
    assert parser.push("b") == [Arguments(0, "b")]
    assert parser.push('"}}\n</tool_') == [Arguments(0, '"}')]
    assert parser.push("call>\n<tool_call>\n<function=f>\n<parameter=s>\nab\n") == [
        CallBegun(1, "call_x", "f"),
        *(Arguments(1, text) for text in ('{"s": ', '"', "ab")),
    ]
    assert parser.push("c</para") == [Arguments(1, "\\nc")]
    assert parser.push("meter></function></tool_call>\n") == [
        Arguments(1, '"'),
        Arguments(1, "}"),
    ]
    assert parser.finish() == []


def test_no_part_of_a_tag_is_told() -> None:
    parser = Parser(lambda: "call_x", TOOLS)
    assert parser.push("<think>a\n</thi") == [Reasoning("a")]
    assert parser.push("s") == [Reasoning("\n</this")]
    assert parser.push("</think>\n") == []
    assert parser.push("\nb <too") == [Content("b")]
    assert parser.push("l ") == [Content(" <tool")]
    assert parser.finish() == [Content(" ")]


def test_without_tools_calls_are_content() -> None:
    assert message(f"a\n{HERMES}", tools=()) == (f"a\n{HERMES}", None, [])
    assert Parser(lambda: "", ()).push("a <tool_c") == [Content("a <tool_c")]


def test_only_the_first_call_counts_unless_parallel() -> None:
    for more in (f"\n{HERMES}", "\nDone.", "", "\n<tool_call>"):
        found = message(f"a\n{CODER}{more}", parallel=False)
        assert found == ("a", None, [("f", '{"s": "x\\n\\"y\\"\\n", "i": 12}')])
    other = '<tool_call>{"name": "x"}</tool_call>'
    assert message(f"{other}{HERMES}", parallel=False) == (other, None, [("f", ARGUMENTS)])


def test_the_assembled_message() -> None:
    found = assemble(events([f"<think>\nhm\n</think>\n\n{HERMES}"]))
    assert found == {
        "content": None,
        "reasoning_content": "hm",
        "tool_calls": [
            {
                "id": "call_" + "0" * 24,
                "type": "function",
                "function": {"name": "f", "arguments": ARGUMENTS},
            }
        ],
    }


def test_tools_that_are_none() -> None:
    with pytest.raises(InputError, match=r"tools\[1\].function.name"):
        Parser(lambda: "", [TOOLS[0], {"type": "function", "function": {"name": 5}}])


@MANY
@given(st.text(alphabet='{}[]",:0123456789.eE+-truefalsn \\u\n', max_size=12))
def test_json_is_what_python_reads(text: str) -> None:
    try:
        json.loads(text, parse_constant=lambda name: 1 / 0)
        valid = True
    except (ValueError, ZeroDivisionError):
        valid = False
    assert is_json(text) == valid
