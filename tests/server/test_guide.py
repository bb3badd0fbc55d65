"""What guides allow: whatever is drawn under one has the form it prescribes."""

import dataclasses
import json
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import pytest
import tokenizers
import torch

import qnext as qn
from qnext.errors import InputError
from qnext.server.guide import GrammarGuide, Grammars
from qnext.server.parse import Parser, assemble
from qnext.text import Tokenizer

VOCAB = 1100  # more than the tokenizer's 1,024, as models' vocabularies are padded
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
CLOSING = re.compile(r'["\]},:0-9.-]+|true|</?[a-z_]*>?')

POINT = {
    "type": "object",
    "properties": {"x": {"type": "number"}, "y": {"type": "integer"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "nested": {
        "type": "object",
        "properties": {"at": POINT, "name": {"type": "string", "maxLength": 12}},
        "required": ["at"],
        "additionalProperties": False,
    },
    "enums": {"enum": ["red", "gr\u00fcn", 7, None, {"a": [True]}, '\u0001\n\\"', "\U0001f600"]},
    "array": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 5},
    "bounded": {"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 120}},
    "strings": {"type": "array", "items": {"type": "string"}, "minItems": 2},
    "pattern": {"type": "string", "pattern": "^[a-f]{2,4}(-[0-9]+)?$"},
    "any of": {"anyOf": [POINT, {"type": "string"}, {"type": "boolean"}, {"type": "null"}]},
    "references": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "leaf": {"$ref": "#/$defs/point"},
                    "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                },
                "required": ["leaf", "next"],
                "additionalProperties": False,
            },
            "point": POINT,
        },
        "$ref": "#/$defs/tree",
    },
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "properties": {"city": {"type": "string"}, "at": {"$ref": "#/$defs/p"}},
                "required": ["city", "at"],
                "additionalProperties": False,
                "$defs": {"p": POINT},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def with_tags(special: bool) -> Tokenizer:
    """The demo's tokenizer with Qwen's tags as tokens."""
    plain = qn.tokenizer()
    backend = tokenizers.Tokenizer.from_str(plain.backend.to_str())
    backend.add_tokens([tokenizers.AddedToken(t, special=special, normalized=False) for t in TAGS])
    return dataclasses.replace(plain, backend=backend)


MADE: dict[str, Callable[[], Tokenizer]] = {
    "spelled": qn.tokenizer,
    "tokens": lambda: with_tags(False),
    "special": lambda: with_tags(True),
}


@pytest.fixture(scope="module", params=MADE)
def each(request: pytest.FixtureRequest) -> Grammars:
    """Grammars where the tags are spelled, are tokens, are special tokens."""
    return Grammars(MADE[request.param](), VOCAB)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(qn.tokenizer(), VOCAB)


def draw(made: Grammars, guide: GrammarGuide, seed: int, most: int = 800) -> str:
    """The text of tokens drawn at random among those allowed, often ones that come to an end."""
    choose, tokens = random.Random(seed), []
    tokenizer = made.tokenizer
    for _ in range(most):
        mask = guide.allowed(())
        assert mask is not None and mask.dtype == torch.bool and mask.shape == (VOCAB,)
        assert not mask[tokenizer.vocab_size :].any()
        found = mask.nonzero().flatten().tolist()
        ends = [i for i in found if i in tokenizer.eos_ids]
        ids = [i for i in found if i not in ends]
        closing = [i for i in ids if CLOSING.fullmatch(tokenizer.decode([i]))]
        if closing and choose.random() < 0.7:
            ids = closing
        if ends and (not ids or choose.random() < 0.5):
            ids = ends
        token = choose.choice(ids)
        if token not in tokenizer.eos_ids:
            tokens.append(token)
        if guide.advance([token]):
            break
    assert guide.complete and guide.error is None
    rest = guide.allowed(())
    assert rest is not None and set(rest.nonzero().flatten().tolist()) == {*tokenizer.eos_ids}
    assert guide.allowed([*tokenizer.eos_ids]) is None
    return tokenizer.decode(tokens, skip_special_tokens=False)


def fits(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    """Whether a value fits a schema, as far as the schemas here go."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(fits(value, part, root) for part in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] in ("integer", "number"):
        kinds = (int,) if schema["type"] == "integer" else (int, float)
        least, most = schema.get("minimum", -1e999), schema.get("maximum", 1e999)
        return isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most
    if not isinstance(value, KINDS[schema["type"]]):
        return False
    if isinstance(value, dict):
        known = schema.get("properties", {})
        if schema.get("additionalProperties") is False and not {*value} <= {*known}:
            return False
        return {*schema.get("required", ())} <= {*value} and all(
            fits(value[name], known[name], root) for name in value if name in known
        )
    if isinstance(value, list):
        enough = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return enough and all(fits(item, schema["items"], root) for item in value)
    if isinstance(value, str) and "pattern" in schema:
        return re.search(schema["pattern"], value) is not None
    return not isinstance(value, str) or len(value) <= schema.get("maxLength", len(value))


def parsed(text: str, tools: Sequence[Mapping[str, object]] = (), **how: bool) -> dict[str, Any]:
    numbers = count()
    parser = Parser(lambda: f"call_{next(numbers):024x}", tools, **how)
    return assemble([*parser.push(text), *parser.finish()])


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_fits_its_schema(grammars: Grammars, name: str) -> None:
    schema = SCHEMAS[name]
    for seed in range(12):
        ask = grammars.json_object() if name == "any object" else grammars.json_schema(schema)
        text = draw(grammars, ask, seed)
        assert fits(json.loads(text), schema, schema), text


def test_escapes_of_strings(grammars: Grammars) -> None:
    guide = grammars.json_schema({"type": "string"})
    text = '"\\u001f\\n\\"\\\\ \u00e9\U0001f600"'
    assert guide.advance(grammars.tokenizer.encode(text))
    assert guide.error is None
    assert (
        grammars.json_schema({"type": "string"}).allowed(grammars.tokenizer.encode('"\n')) is None
    )


@pytest.mark.parametrize(
    "pattern", [r"[a-z]{2,4}-[0-9]+", r"(yes|no)( sure)?", r"a/b\n\"?", "^x+$"]
)
def test_regex_matches_as_a_whole(grammars: Grammars, pattern: str) -> None:
    for seed in range(10):
        text = draw(grammars, grammars.regex(pattern), seed)
        assert re.fullmatch(pattern, text), text


def test_choice(grammars: Grammars) -> None:
    choices = ["ab", "a", 'abc "d"\n', "\U0001f600", "<think>"]
    drawn = {draw(grammars, grammars.choice(choices), seed) for seed in range(120)}
    assert {"ab", "a"} <= drawn <= {*choices}


def test_lark(grammars: Grammars) -> None:
    grammar = 'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,3}/'
    for seed in range(10):
        text = draw(grammars, grammars.lark(grammar), seed)
        assert re.fullmatch(r"\d{1,3}(\+\d{1,3})*", text)


def test_tool_calls(each: Grammars) -> None:
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in TOOLS}
    counts = set()
    for seed in range(12):
        text = draw(each, each.tool_calls(TOOLS), seed)
        message = parsed(text, TOOLS)
        assert message["content"] is None
        counts.add(len(message["tool_calls"]))
        for call in message["tool_calls"]:
            schema = schemas[call["function"]["name"]]
            arguments = json.loads(call["function"]["arguments"])
            assert fits(arguments, {"type": "object", **(schema or {})}, schema or {})
    assert min(counts) == 1 and max(counts) > 1


def test_one_tool_call(each: Grammars) -> None:
    for seed in range(6):
        text = draw(each, each.tool_calls(TOOLS, parallel=False), seed)
        assert text.startswith('<tool_call>\n{"name": "') and text.endswith("}\n</tool_call>")
        assert len(parsed(text, TOOLS)["tool_calls"]) == 1
        text = draw(each, each.tool_calls(TOOLS, named="now"), seed)
        (call,) = parsed(text, TOOLS)["tool_calls"]
        assert call["function"]["name"] == "now"


def test_tool_calls_that_are_optional(each: Grammars) -> None:
    tokenizer, tags = each.tokenizer, (None, *map(each.tokenizer.token_id, TAGS))
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for text in ("Hi. ", "", "Let me see.\n" + call, call, f"{call}\n{call}"):
        guide = each.tool_calls(TOOLS, required=False)
        guide.advance(tokenizer.encode(text))
        assert guide.error is None
        mask = guide.allowed(())
        assert mask is not None and mask[tokenizer.eos_ids[0]]
    guide = each.tool_calls(TOOLS, required=False)
    guide.advance(tokenizer.encode("Hi <tool_call>\n"))
    assert guide.allowed(tokenizer.encode('{"name": "now')) is not None
    assert guide.allowed(tokenizer.encode('{"name": "other')) is None
    spelled = [token for piece in ("<tool", "_call>") for token in tokenizer.encode(piece)]
    if any(tags):  # where the tag is a token nothing else may look like it
        assert each.tool_calls(TOOLS, required=False).allowed(spelled) is None


def test_what_comes_after_reasoning(each: Grammars) -> None:
    tokenizer = each.tokenizer
    thought = 'Hm, {"x": <b> ...\n'
    for text in (thought, "", "\n\n"):
        guide = each.json_schema(POINT, after="</think>")
        assert not guide.advance(tokenizer.encode(text))
        mask = guide.allowed(())
        assert mask is not None and not mask[[*tokenizer.eos_ids]].any()
        assert guide.allowed(tokenizer.encode("</think>\n\nx")) is None
        assert not guide.advance(tokenizer.encode("</think>\n\n"))
        assert guide.error is None
        text = draw(each, guide, 3)
        assert fits(json.loads(text), POINT, POINT)
    guide = each.choice(["</think>", "yes"], after="</think>")
    assert guide.advance(tokenizer.encode(thought + "</think>yes")) and guide.error is None
    guide = each.tool_calls(TOOLS, named="now", after="</think>")
    guide.advance(tokenizer.encode(thought + "</think>\n\n"))
    text = f"{thought}</think>\n\n{draw(each, guide, 4)}"
    message = parsed(text, TOOLS, opened=True)
    assert message["reasoning_content"] == thought.strip() and len(message["tool_calls"]) == 1


def test_masks_are_exact(each: Grammars) -> None:
    """A mask has a token if and only if it fits, also where the grammar leaves one text alone."""
    tokenizer = each.tokenizer
    made = [
        (each.json_schema({"const": {"<think>": "<tool_call>"}}), '{"<'),
        (each.tool_calls(TOOLS), '<tool_call>\n{"na'),
        (each.choice(["yes", "yesterday"], after="</think>"), "Hm.</think>\ny"),
    ]
    for guide, text in made:
        for token in (*tokenizer.encode(text), None):
            mask = guide.allowed(())
            assert mask is not None
            for other in {*range(VOCAB)} - {*tokenizer.eos_ids}:
                assert (guide.allowed([other]) is not None) == bool(mask[other])
            if token is not None:
                assert mask[token]
                guide.advance([token])


def test_allowed_leaves_the_state_alone(grammars: Grammars) -> None:
    tokenizer, choose = grammars.tokenizer, random.Random(5)
    asked, other = (grammars.json_schema(SCHEMAS["references"]) for _ in range(2))
    tokens = tokenizer.encode('{"leaf": {"x": 1.5, "y": -2}, "next": null}')
    for at, token in enumerate(tokens):
        for ahead in (tokens[at : at + 3], [*tokens[at : at + 2], 5], tokens[at:], [7, 8]):
            asked.allowed(ahead)
        asked.allowed([choose.randrange(-2, VOCAB + 3) for _ in range(3)])
        asked.allowed([*tokens[at:], tokenizer.eos_ids[0]])
        mine, theirs = asked.allowed(()), other.allowed(())
        assert mine is not None and theirs is not None and torch.equal(mine, theirs)
        assert asked.advance([token]) == other.advance([token]) == (at == len(tokens) - 1)
    assert asked.error is other.error is None


def test_allowed_ahead_is_what_is_allowed_then(grammars: Grammars) -> None:
    tokens = grammars.tokenizer.encode("[1, -2.5e3, 4]")
    guide = grammars.json_schema(SCHEMAS["array"])
    for at in range(len(tokens) + 1):
        then = grammars.json_schema(SCHEMAS["array"])
        then.advance(tokens[:at])
        ahead, later = guide.allowed(tokens[:at]), then.allowed(())
        assert ahead is not None and later is not None and torch.equal(ahead, later)
    assert guide.advance(tokens) and guide.error is None  # several at once


def test_an_eos_completes_what_may_end(grammars: Grammars) -> None:
    tokenizer = grammars.tokenizer
    guide = grammars.regex("a+")
    assert not guide.advance(tokenizer.encode("a"))
    assert guide.advance([tokenizer.eos_ids[1]]) and guide.error is None
    early = grammars.regex("a+b")
    assert early.advance([*tokenizer.encode("a"), tokenizer.eos_ids[0]])
    assert "early" in str(early.error)


def test_a_token_that_does_not_fit_ends_the_text(grammars: Grammars) -> None:
    for token in (*grammars.tokenizer.encode("b"), -1, VOCAB + 7, 1050):
        guide = grammars.regex("a+")
        assert guide.advance([token]) and guide.error
        mask = guide.allowed(())
        assert mask is not None and mask.nonzero().flatten().tolist() == [0, 2]


def test_without_eos_texts_go_on(grammars: Grammars) -> None:
    made = Grammars(dataclasses.replace(grammars.tokenizer, eos_ids=()), VOCAB)
    guide = made.regex("a{1,2}")
    guide.advance(made.tokenizer.encode("a"))
    mask = guide.allowed(())
    assert mask is not None and mask.nonzero().flatten().tolist() == made.tokenizer.encode("a")
    assert guide.advance(made.tokenizer.encode("a"))


def test_a_vocabulary_smaller_than_the_tokenizer() -> None:
    mask = Grammars(qn.tokenizer(), 900).regex(".+").allowed(())
    assert mask is not None and mask.shape == (900,)


def one(parameters: object) -> list[dict[str, object]]:
    return [{"name": "f", "parameters": parameters}, TOOLS[1]]


WRONG: dict[str, tuple[Callable[[Grammars], object], str]] = {
    "type": (lambda g: g.json_schema({"type": "thing"}), "response_format: Invalid type: thing"),
    "keyword": (lambda g: g.json_schema({"not": {}}), 'response_format: Unimplemented keys: ["not'),
    "remote": (
        lambda g: g.json_schema({"$ref": "http://localhost/x"}),
        "response_format: Resource",
    ),
    "empty": (lambda g: g.json_schema({"const": 1, "enum": [2]}, field="x"), "x: Unsatisfiable"),
    "surrogate": (lambda g: g.json_schema({"const": "\ud800"}), "response_format: "),
    "no schema": (lambda g: g.json_schema([]), "response_format: must be a JSON schema"),  # type: ignore[arg-type]
    "no JSON": (lambda g: g.json_schema({"const": {1}}), "response_format: must be JSON"),
    "regex": (lambda g: g.regex("("), "regex: at 1(8): invalid regex"),
    "lookaround": (lambda g: g.regex("a(?=b)"), "regex: at 1(8): invalid regex"),
    "choices": (lambda g: g.choice([]), "choice: must be a list of strings"),
    "lark": (lambda g: g.lark("begin: /a/"), "grammar: no start rule found"),
    "no tools": (lambda g: g.tool_calls([]), "tools: must not be empty"),
    "no name": (lambda g: g.tool_calls([{}]), "tools[0].function.name: must be"),
    "twice": (lambda g: g.tool_calls([TOOLS[0], TOOLS[0]]), "tools[1].function.name: 'weather'"),
    "other": (lambda g: g.tool_calls(TOOLS, named="then"), "tool_choice: tools has no function"),
    "parameters": (lambda g: g.tool_calls(one({"required": 3})), "tools: parameters of 'f': "),
    "arguments": (lambda g: g.tool_calls(one({"type": "array"})), "tools: parameters of 'f': type"),
    "list": (lambda g: g.tool_calls(one([1])), "tools[0].function.parameters: must be a JSON"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused(grammars: Grammars, name: str) -> None:
    ask, message = WRONG[name]
    with pytest.raises(InputError) as caught:
        ask(grammars)
    assert str(caught.value).startswith(message)


def test_many_threads_share_one_tokenizer() -> None:
    made, found = Grammars(qn.tokenizer(), VOCAB), []

    def ask(seed: int) -> None:
        schema = {"type": "array", "items": {"type": "integer"}, "minItems": seed % 3}
        found.append((seed % 3, json.loads(draw(made, made.json_schema(schema), seed))))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert len(found) == 12 and all(len(items) >= least for least, items in found)
