"""The tokenizer against transformers on Qwen3's files, and against plain bytes on a tiny one."""

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, processors

from qnext.text import Tokenizer, TokenizerError

Checkpoint = Callable[..., Path]

# Ids of the tiny tokenizer: bytes, then merged pieces, then added tokens; the last two are special.
FIRST_MERGED, START, END, TINY_SIZE = 256, 269, 270, 271

HELLO = [{"role": "user", "content": "hello"}]
EOS = {"eos_token": "<|end|>"}
TINY_IDS = st.lists(st.integers(0, TINY_SIZE - 1), max_size=40)
# Ids of the tiny tokenizer that split characters: far denser than all ids.
EDGE_IDS = st.lists(
    st.sampled_from(
        [*b"A\x80\x82\xac\xbd\xbf\xc0\xe0\xe2\xed\xef\xf0\xf4\xff", *range(FIRST_MERGED, TINY_SIZE)]
    ),
    max_size=24,
)
unhurried = settings(deadline=None)


def streamed(
    tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), skip: bool = True
) -> list[str]:
    stream = tokenizer.stream(prompt, skip_special_tokens=skip)
    return [*(stream.push(token) for token in ids), stream.finish()]


def test_encode_applies_merges_and_finds_added_tokens(
    tiny: Tokenizer, tiny_bytes: tuple[bytes, ...]
) -> None:
    ids = tiny.encode("hello<|end|>\u20ac!<think>")
    pieces = [b"hell", b"o", b"<|end|>", b"\xe2\x82", b"\xac!", b"<think>"]
    assert [tiny_bytes[token] for token in ids] == pieces
    assert tiny.encode("") == []


def test_vocabulary(tiny: Tokenizer) -> None:
    assert tiny.vocab_size == TINY_SIZE
    assert tiny.token_id("<|end|>") == END
    assert tiny.token_id("<think>") == START - 2
    assert tiny.token_id("<|nothing|>") is None


@unhurried
@given(st.one_of(TINY_IDS, EDGE_IDS), st.booleans())
def test_decode_is_the_bytes_of_the_ids(
    tiny: Tokenizer, tiny_bytes: tuple[bytes, ...], ids: list[int], skip: bool
) -> None:
    kept = [tiny_bytes[token] for token in ids if not (skip and token in (START, END))]
    expected = b"".join(kept).decode("utf-8", errors="replace")  # by Python's own decoder
    assert tiny.decode(ids, skip_special_tokens=skip) == expected


def test_special_tokens_are_added_only_on_demand(checkpoint: Checkpoint, backend: Backend) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", START)]
    )
    tokenizer = Tokenizer.from_directory(checkpoint(backend=backend))
    assert tokenizer.encode("o") == [ord("o")]
    assert tokenizer.encode("o", add_special_tokens=True) == [START, ord("o")]


def test_limits_stored_in_the_file_do_not_apply(checkpoint: Checkpoint, backend: Backend) -> None:
    backend.enable_truncation(2)
    backend.enable_padding(length=5)
    assert backend.encode("abc").ids != [97, 98, 99]
    assert Tokenizer.from_directory(checkpoint(backend=backend)).encode("abc") == [97, 98, 99]


def test_tokenizer_is_frozen(tiny: Tokenizer) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.eos_ids = (1,)


@given(st.one_of(TINY_IDS, EDGE_IDS), st.booleans())
@settings(deadline=None, max_examples=500)
def test_stream_is_decode_and_holds_back_one_character(
    tiny: Tokenizer, ids: list[int], skip: bool
) -> None:
    pieces = streamed(tiny, ids, skip=skip)
    assert "".join(pieces) == tiny.decode(ids, skip_special_tokens=skip)
    for count in range(len(ids) + 1):
        so_far = tiny.decode(ids[:count], skip_special_tokens=skip)
        assert "".join(pieces[:count]) == so_far.removesuffix("\ufffd")


def test_stream_is_decode_for_every_short_sequence_of_edge_bytes(tiny: Tokenizer) -> None:
    edges = [0x41, 0x80, 0x90, 0xA0, 0xBF, 0xBD, 0xC2, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xFF]
    for length in range(1, 5):
        for ids in itertools.product(edges, repeat=length):
            pieces = streamed(tiny, ids)
            assert "".join(pieces) == bytes(ids).decode("utf-8", errors="replace"), ids


@unhurried
@given(st.text())
def test_stream_of_text_never_shows_half_a_character(tiny: Tokenizer, text: str) -> None:
    pieces = streamed(tiny, tiny.encode(text), skip=False)
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@unhurried
@given(st.one_of(TINY_IDS, EDGE_IDS), st.one_of(TINY_IDS, EDGE_IDS), st.booleans())
@example([0xF1, 0x80, 0x80, 0x80], [0x41], False)  # a whole character
@example([0xF0, 0x9F, 0x98, 0x80, 0x80], [0x80], True)
def test_stream_after_a_prompt_goes_on_where_the_prompt_stopped(
    tiny: Tokenizer, prompt: list[int], ids: list[int], skip: bool
) -> None:
    whole = streamed(tiny, prompt + ids, skip=skip)
    assert streamed(tiny, ids, prompt, skip) == whole[len(prompt) :]


def test_stream_is_as_new_after_finish(tiny: Tokenizer) -> None:
    stream = tiny.stream()
    assert (stream.push(0xE2), stream.finish(), stream.finish()) == ("", "\ufffd", "")
    assert (stream.push(0x82), stream.push(0x41)) == ("", "\ufffdA")


def test_stream_is_unchanged_by_an_unknown_id(tiny: Tokenizer) -> None:
    stream = tiny.stream([0xE2, END, 0x82, END])  # skipped ids do not part a character
    with pytest.raises(TokenizerError, match="id 9999"):
        stream.push(9999)
    assert stream.push(0xAC) == "\u20ac"


def test_stream_decodes_a_bounded_window(tiny: Tokenizer) -> None:
    lengths = []

    class Recorder:
        def __getattr__(self, name: str) -> object:
            return getattr(tiny.backend, name)

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            lengths.append(len(ids))
            return tiny.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    recorded = dataclasses.replace(tiny, backend=Recorder())
    ids = [0x80] * 300 + [END] * 300 + [0xF0, 0xFF] * 300
    assert "".join(streamed(recorded, ids)) == tiny.decode(ids)
    assert max(lengths) == 4
    lengths.clear()
    recorded.stream(ids)
    assert 0 < len(lengths) < 20


def test_template_sees_what_transformers_gives_it(
    checkpoint: Checkpoint, transformers: ModuleType
) -> None:
    source = """{% for message in messages %}
    {% if message.role == "tool" %}
        {% continue %}
    {% endif %}
    [{{ message.role }}]{{ message.content }}{{ message.extra is defined }}
{% endfor %}
{{ tools | tojson }} {{ tools | tojson(indent=2, sort_keys=true) }} {{ documents is none }}
{{ tools[0] | tojson(separators=(",", ":")) }}
{{ eos_token }}{{ bos_token is defined }}{{ add_generation_prompt }}{{ level + 1 }}"""
    eos = {"__type": "AddedToken", "content": "<|end|>", "special": True}
    path = checkpoint(template=source, tokenizer_config={"eos_token": eos})
    messages = [
        {"role": "user", "content": "<b> & 'x'", "extra": None},
        {"role": "tool", "content": "left out"},
        {"role": "assistant", "content": "\u20ac", "extra": 1},
    ]
    before = copy.deepcopy(messages)
    tools = [{"name": "f", "description": "<b> & '\u20ac'"}]
    ours = Tokenizer.from_directory(path)
    expected = """    [user]<b> & 'x'False
    [assistant]\u20acTrue
[{"name": "f", "description": "<b> & '\u20ac'"}] [
  {
    "description": "<b> & '\u20ac'",
    "name": "f"
  }
] True
{"name":"f","description":"<b> & '\u20ac'"}
<|end|>FalseTrue3"""
    assert ours.render_chat(messages, tools=tools, level=2) == expected
    assert messages == before
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    assert expected == theirs.apply_chat_template(
        messages, tools=tools, level=2, add_generation_prompt=True, tokenize=False
    )


def test_encode_chat_is_encode_of_render_chat(checkpoint: Checkpoint) -> None:
    source = "<|start|>{{ messages[0].content }}{{ tools }}{{ add_generation_prompt }}{{ x }}"
    tokenizer = Tokenizer.from_directory(checkpoint(template=source))
    options = {"tools": [], "add_generation_prompt": False, "x": "<|end|>"}
    text = tokenizer.render_chat(HELLO, **options)
    assert text == "<|start|>hello[]False<|end|>"
    assert tokenizer.encode_chat(HELLO, **options) == tokenizer.encode(text)
    assert tokenizer.encode_chat(HELLO, **options)[0] == START


def test_clock_can_be_replaced(checkpoint: Checkpoint) -> None:
    tokenizer = Tokenizer.from_directory(checkpoint(template="{{ strftime_now('%Y-%m') }}"))
    assert re.fullmatch(r"20\d\d-[01]\d", tokenizer.render_chat(HELLO))
    assert tokenizer.render_chat(HELLO, strftime_now=lambda pattern: f"{pattern}!") == "%Y-%m!"


def test_template_places_in_order(checkpoint: Checkpoint) -> None:
    path = checkpoint(
        template="chat_template.jinja",
        chat_template={"chat_template": "chat_template.json"},
        tokenizer_config={"chat_template": "tokenizer_config.json"},
    )
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        assert Tokenizer.from_directory(path).render_chat(HELLO) == name
        (path / name).unlink()
    assert Tokenizer.from_directory(path).template is None


@pytest.mark.parametrize("stem", ["chat_template", "tokenizer_config"])
def test_named_templates(checkpoint: Checkpoint, stem: str) -> None:
    named = [{"name": name, "template": name} for name in ("rag", "tool_use", "default")]
    tokenizer = Tokenizer.from_directory(checkpoint(**{stem: {"chat_template": named}}))
    assert tokenizer.render_chat(HELLO) == "default"
    assert tokenizer.render_chat(HELLO, tools=[]) == "tool_use"
    tokenizer = Tokenizer.from_directory(checkpoint(**{stem: {"chat_template": named[2:]}}))
    assert tokenizer.render_chat(HELLO, tools=[]) == "default"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"generation_config": {"eos_token_id": 7}}, (7,)),
        ({"generation_config": {"eos_token_id": [9, 7, 9]}}, (9, 7)),
        ({"generation_config": {"eos_token_id": 0}, "config": {"eos_token_id": 8}}, (0,)),
        ({"generation_config": {}, "config": {"eos_token_id": [8]}}, (8,)),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 8}}, (8,)),
        ({"tokenizer_config": EOS}, (END,)),
        ({"tokenizer_config": {"eos_token": {"content": "<|end|>"}}}, (END,)),
        ({"tokenizer_config": EOS, "config": {"eos_token_id": 8}}, (8, END)),
        ({"generation_config": {"eos_token_id": [END, 3]}, "tokenizer_config": EOS}, (END, 3)),
    ],
)
def test_eos_ids(checkpoint: Checkpoint, files: dict[str, object], expected: tuple) -> None:
    assert Tokenizer.from_directory(checkpoint(**files)).eos_ids == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer": "{"}, r"tokenizer\.json: is not a tokenizer"),
        ({"tokenizer": {"model": 3}}, r"tokenizer\.json: is not a tokenizer"),
        ({"tokenizer_config": "{,}"}, r"tokenizer_config\.json: is not valid JSON: .*line 1"),
        ({"tokenizer_config": b"\xff"}, r"tokenizer_config\.json: must be a readable .* UTF-8"),
        ({"generation_config": []}, r"generation_config\.json: must hold .* holds a list"),
        ({"tokenizer_config": {"bos_token": 3}}, r'"bos_token" must be a string .* not 3'),
        ({"tokenizer_config": {"eos_token": {}}}, r'"eos_token" must be a string .* not {}'),
        ({"tokenizer_config": {"eos_token": "<eos>"}}, r'"eos_token" \'<eos>\' is not in the voc'),
        ({"generation_config": {"eos_token_id": "7"}}, r"generation_config.*an int or a list"),
        ({"config": {"eos_token_id": [1, True]}}, r"/config\.json.* not \[1, True\]"),
        ({"config": {"eos_token_id": 5000}}, r'"eos_token_id" 5000 is not in the vocabulary'),
        ({"config": {"eos_token_id": -1}}, r'"eos_token_id" -1 is not in the vocabulary'),
        ({"chat_template": {}}, r'chat_template\.json: has no "chat_template"'),
        ({"chat_template": {"chat_template": 3}}, r"must be a string or a list .* not '3'"),
        ({"chat_template": {"chat_template": [{"name": "default"}]}}, r"string or a list"),
        ({"chat_template": {"chat_template": {"name": "default", "template": ""}}}, "or a list"),
        ({"chat_template": {"chat_template": []}}, r'named \[\]; one must be "default"'),
        ({"template": "a\n{% if x %}"}, r"template\.jinja, line 2: .* is not valid Jinja"),
    ],
)
def test_broken_files(checkpoint: Checkpoint, files: dict[str, object], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_directory(checkpoint(**files))


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: is missing"):
        Tokenizer.from_directory(tmp_path)


def test_decoder_that_is_not_byte_level(checkpoint: Checkpoint, backend: Backend) -> None:
    backend.decoder = decoders.Metaspace()
    with pytest.raises(TokenizerError, match=r"decoder must be ByteLevel.*not Metaspace"):
        Tokenizer.from_directory(checkpoint(backend=backend))


@pytest.mark.parametrize("token", [-1, TINY_SIZE, 2**32, 2**70])
def test_unknown_ids(tiny: Tokenizer, token: int) -> None:
    for call in (tiny.decode, tiny.stream):
        with pytest.raises(TokenizerError, match=f"id {token}: is not in this vocabulary of 271"):
            call([1, token])


def test_text_that_is_not_unicode(tiny: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"without lone surrogates, not 'a\\ud83d'"):
        tiny.encode("a\ud83d")


def test_no_template(tiny: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="this checkpoint has none"):
        tiny.encode_chat(HELLO)


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([], None, "messages: is empty"),
        (["hello"], None, r"messages\[0\]: must be a mapping with a role, not a str"),
        ([*HELLO, {"role": "bot"}], None, r"messages\[1\]: role 'bot' is unknown; use .* tool"),
        ([{"content": "hello"}], None, r"messages\[0\]: role None is unknown"),
        (HELLO, ["weather"], r"tools\[0\]: must be a JSON schema as a mapping, not a str"),
    ],
)
def test_broken_conversations(
    checkpoint: Checkpoint, messages: list, tools: list | None, message: str
) -> None:
    tokenizer = Tokenizer.from_directory(checkpoint(template="{{ messages }}"))
    with pytest.raises(TokenizerError, match=message):
        tokenizer.render_chat(messages, tools=tools)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no roles') }}", "refuses this conversation: no roles"),
        ("{{ messages[0].__class__.__mro__ }}", "the sandbox forbids: .*__class__"),
        ("{{ messages.append(1) }}", "the sandbox forbids: .*append"),
        ("{{ messages[0].missing.deeper }}", "UndefinedError: .*missing"),
        ("{{ nothing | tojson }}", "TypeError: .*Undefined"),
        ("{% macro f() %}{{ 1 / 0 }}{% endmacro %}\n\n{{ f() }}", "ZeroDivisionError"),
    ],
)
def test_failing_templates(checkpoint: Checkpoint, source: str, message: str) -> None:
    tokenizer = Tokenizer.from_directory(checkpoint(template=f"first\n{source}\nlast"))
    with pytest.raises(TokenizerError, match=rf"template\.jinja, line 2: .*{message}"):
        tokenizer.render_chat(HELLO)


def test_qwen_vocabulary(qwen: Tokenizer, oracle: Any) -> None:
    assert qwen.vocab_size == len(oracle) == 151669
    assert qwen.eos_ids == (oracle.eos_token_id,) == (151645,)
    assert qwen.token_id("<think>") == oracle.convert_tokens_to_ids("<think>")


def test_qwen_texts(qwen: Tokenizer, oracle: Any, text: str) -> None:
    ids = qwen.encode(text)
    assert ids == oracle.encode(text, add_special_tokens=False)
    assert qwen.encode(text, add_special_tokens=True) == oracle.encode(text)
    for skip in (False, True):
        decoded = qwen.decode(ids, skip_special_tokens=skip)
        assert decoded == oracle.decode(ids, skip_special_tokens=skip)
        assert "".join(streamed(qwen, ids, skip=skip)) == decoded


@unhurried
@given(st.text())
def test_qwen_any_text(qwen: Tokenizer, oracle: Any, text: str) -> None:
    assert qwen.encode(text) == oracle.encode(text, add_special_tokens=False)


@unhurried
@given(
    st.lists(st.integers(0, 255) | st.integers(0, 151668) | st.integers(151640, 151668)),
    st.booleans(),
)
def test_qwen_any_ids(qwen: Tokenizer, oracle: Any, ids: list[int], skip: bool) -> None:
    decoded = qwen.decode(ids, skip_special_tokens=skip)
    assert decoded == oracle.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(qwen, ids, skip=skip)) == decoded


@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_qwen_chat(
    qwen: Tokenizer,
    oracle: Any,
    conversation: list,
    weather: dict,
    with_tools: bool,
    prompt: bool,
    variables: dict,
) -> None:
    tools = [weather] if with_tools else None
    options = {"tools": tools, "add_generation_prompt": prompt, **variables}
    expected = oracle.apply_chat_template(conversation, tokenize=False, **options)
    assert qwen.render_chat(conversation, **options) == expected
    ids = oracle.apply_chat_template(conversation, return_dict=False, **options)
    assert qwen.encode_chat(conversation, **options) == ids
