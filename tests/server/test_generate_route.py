"""/tokenize, /detokenize, and SGLang's /generate."""

import json
import re
from itertools import pairwise
from typing import Any

import httpx
import pytest

import qnext as qn
from tests.server.asks import CHAT, COMPLETIONS, ask, refused, stream
from tests.server.conftest import SECONDS, Running

Demo = tuple[qn.Params, Any]
TEXT = "Nora has 12 pears and Finn has 7 of them."


# ---- the tokenizer


TEXTS = [TEXT, "", " a  b\n\n", "<|im_start|>user\nhi<|im_end|>", "\u00fc\U0001f600\u0301", "\0"]
LEN = {"max_model_len": 1024}


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_there_and_back(server: Running, demo: Demo, text: str) -> None:
    told = ask(server, "/tokenize", prompt=text)
    assert told == {"tokens": demo[1].encode(text), "count": len(told["tokens"]), **LEN}
    assert ask(server, "/detokenize", tokens=told["tokens"]) == {"prompt": text}
    special = demo[1].encode(text, add_special_tokens=True)
    assert ask(server, "/tokenize", prompt=text, add_special_tokens=True)["tokens"] == special


def test_conversations_are_tokenized_as_the_template_writes_them(
    server: Running, demo: Demo
) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    plain = [{**messages[0], "role": "system"}, messages[1]]
    for begun in (True, False):
        tokens = demo[1].encode_chat(plain, add_generation_prompt=begun)
        told = ask(server, "/tokenize", messages=messages, add_generation_prompt=begun)
        assert told["tokens"] == tokens
    default = ask(server, "/tokenize", messages=messages)
    assert default["tokens"] == demo[1].encode_chat(plain)
    usage = ask(server, CHAT, messages=messages, max_tokens=1)["usage"]
    assert usage["prompt_tokens"] == default["count"]


def test_what_cannot_be_tokenized_is_refused(server: Running) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for body in ({}, {"prompt": "a", "messages": messages}, {"prompt": "\ud800"}, {"prompt": 5}):
        assert refused(server, "/tokenize", **body)["param"] == "prompt"
    assert refused(server, "/tokenize", messages=[])["param"] == "messages"
    for tokens in (None, [True], ["a"], [-1], [2**31], 5):
        assert refused(server, "/detokenize", tokens=tokens)["param"] == "tokens"
    assert "1024" in refused(server, "/detokenize", tokens=[1024])["message"]


def test_clients_without_files_learn_of_the_tokenizer(server: Running, demo: Demo) -> None:
    told = httpx.get(f"{server.url}/tokenizer_info", timeout=SECONDS).json()
    assert (told["eos_token"], told["eos_token_ids"]) == ("<|im_end|>", [2, 0])
    assert told["vocab_size"] == demo[1].vocab_size
    assert "<|im_start|>" in told["chat_template"]


# ---- /generate


def generated(server: Running, params: Any = None, **body: Any) -> dict[str, Any]:
    body = {"text": TEXT, **body}
    return ask(server, "/generate", sampling_params=params, **body)


def test_generate_continues_text_or_tokens(server: Running, demo: Demo) -> None:
    params = {"temperature": 0, "max_new_tokens": 6}
    told = generated(server, params, rid="mine")
    assert told["text"] == demo[1].decode(told["output_ids"])
    count = len(demo[1].encode(TEXT))
    meta = told["meta_info"]
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 6},
        "prompt_tokens": count,
        "completion_tokens": 6,
        "cached_tokens": meta["cached_tokens"],
    }
    again = generated(server, params, text=None, input_ids=demo[1].encode(TEXT))
    assert again["output_ids"] == told["output_ids"]
    assert again["meta_info"]["cached_tokens"] == count - 1
    assert re.fullmatch(r"request-[0-9a-f]{32}-0", again["meta_info"]["id"])


def test_generate_draws_as_completions_do(server: Running) -> None:
    params: dict[str, Any] = {
        "max_new_tokens": 12,
        "sampling_seed": 6,
        "temperature": 1.2,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "min_new_tokens": 3,
        "stop": ["zzz"],
    }
    body = {name.replace("_new_", "_"): value for name, value in params.items()}
    body["seed"] = body.pop("sampling_seed")
    text = ask(server, COMPLETIONS, prompt=TEXT, **body)["choices"][0]["text"]
    assert generated(server, params)["text"] == text
    assert generated(server, {**params, "sampling_seed": 7})["text"] != text
    assert generated(server, {"regex": "[a-c]{5}", "n": 1})["text"].strip("abc") == ""
    schema = json.dumps({"enum": [7, True]})
    assert generated(server, {"json_schema": schema})["text"] in ("7", "true")


def test_generate_tells_what_ended_a_text(server: Running) -> None:
    greedy = {"temperature": 0, "max_new_tokens": 12}
    told = generated(server, greedy)
    stopped = generated(server, {**greedy, "stop": told["text"][4:7]})
    reason = {"type": "stop", "matched": told["text"][4:7]}
    assert stopped["meta_info"]["finish_reason"] == reason
    token = told["output_ids"][5]
    stopped = generated(server, {**greedy, "stop_token_ids": [token]})
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
    formed = generated(server, {"regex": "x"})
    assert formed["meta_info"]["finish_reason"] == {"type": "stop"}


def test_generate_makes_128_tokens_where_nothing_is_said(server: Running) -> None:
    told = generated(server, {"ignore_eos": True, "temperature": 0})
    assert told["meta_info"]["completion_tokens"] == 128


def test_a_stream_of_generate_tells_all_the_text_so_far(server: Running) -> None:
    params = {"temperature": 0, "max_new_tokens": 60}
    generated(server, params)
    whole = generated(server, params, rid="r")
    events = stream(server, "/generate", text=TEXT, sampling_params=params, rid="r")
    assert len(events) > 1 and events[-1] == whole
    for before, after in pairwise(events):
        assert after["text"].startswith(before["text"])
        assert before["meta_info"]["finish_reason"] is None
        made = len(before["output_ids"])
        assert after["output_ids"][:made] == before["output_ids"]
        assert made == before["meta_info"]["completion_tokens"]


def test_generate_refuses_by_name(server: Running) -> None:
    for body, param in (
        ({}, "text"),
        ({"text": "a", "input_ids": [5]}, "text"),
        ({"text": ""}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [1024]}, "input_ids"),
        ({"text": ["a"]}, "text"),
        ({"text": "a", "sampling_params": 5}, "sampling_params"),
        ({"text": "a", "sampling_params": {"n": 2}}, "sampling_params"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 0}}, "sampling_params"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 1024}}, "text"),
    ):
        assert refused(server, "/generate", **body)["param"] == param
    for params in ({"json_schema": "{"}, {"regex": "(("}, {"regex": "a", "json_schema": "{}"}):
        refused(server, "/generate", text="a", sampling_params=params)


def test_generate_lets_unknown_parameters_through(server: Running) -> None:
    params = {"temperature": 0, "max_new_tokens": 3}
    more = {"response_format": 5, "seed": "x", "logprobs": "x", "n": None, "spaces": True}
    assert generated(server, {**params, **more})["text"] == generated(server, params)["text"]
