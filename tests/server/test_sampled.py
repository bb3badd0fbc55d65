"""How tokens are drawn, what ends a text, and which values of these fields are refused."""

from typing import Any

import pytest
import torch

import qnext as qn
from tests.server.asks import COMPLETIONS, ask, refused, stream
from tests.server.conftest import Running

pytestmark = pytest.mark.slow

Demo = tuple[qn.Params, Any]
TEXT = "Nora has 12 pears and Finn has 7 of them."
QUESTION = (
    "<|im_start|>user\nTom has 3 apples and buys 4 more apples. How many apples does Tom have?"
    "<|im_end|>\n<|im_start|>assistant\n"
)
END, OTHER_END = 2, 0


def complete(server: Running, prompt: Any = TEXT, **body: Any) -> dict[str, Any]:
    """The only choice of a greedy answer, unless the body tells otherwise."""
    answer = ask(server, COMPLETIONS, prompt=prompt, **{"temperature": 0, **body})
    (choice,) = answer["choices"]
    return {**choice, "made": answer["usage"]["completion_tokens"]}


def tokens_of(server: Running, prompt: Any = TEXT, **params: Any) -> list[int]:
    """The ids of a greedy answer."""
    params = {"temperature": 0, **params}
    answer = ask(server, "/generate", text=prompt, sampling_params=params)
    return list(answer["output_ids"])


# ---- drawing


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.7},
    {"temperature": 2, "min_p": 0.1},
    {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0, "repetition_penalty": 1.7},
    {"temperature": 0, "frequency_penalty": 2.0},
    {"temperature": 0, "presence_penalty": 2},
    {"temperature": 1, "presence_penalty": -2, "frequency_penalty": 0.5},
]
DRAWN = 16


@pytest.fixture(scope="module")
def drawn(demo: Demo) -> list[str]:
    """What the reference loop draws with each of these."""
    params, tokenizer = demo
    prompt, each = tokenizer.encode(TEXT), [qn.Sampling(**s, seed=9) for s in SAMPLINGS]
    state = qn.init_state(params.config, len(each), len(prompt) + DRAWN)
    rows, _ = qn.generate(params, state, torch.tensor([prompt] * len(each)), DRAWN, sampling=each)
    return [tokenizer.decode(row) for row in rows.tolist()]


@pytest.mark.parametrize("at", range(len(SAMPLINGS)))
def test_draws_are_those_of_the_reference_loop(server: Running, drawn: list[str], at: int) -> None:
    told = complete(server, **SAMPLINGS[at], seed=9, max_tokens=DRAWN, ignore_eos=True)
    assert told["text"] == drawn[at] and len(set(drawn)) > 6


def test_the_temperature_is_1_where_nothing_is_said(server: Running) -> None:
    body: dict[str, Any] = {"prompt": TEXT, "seed": 5, "max_tokens": 12}
    answers = [ask(server, COMPLETIONS, **body, **more) for more in ({}, {"temperature": 1})]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["choices"][0]["text"] != complete(server, max_tokens=12)["text"]


@pytest.mark.parametrize(
    "more",
    [{"temperature": 1e-300}, {"temperature": 1, "top_p": 0}, {"temperature": 1e30, "top_k": 1}],
    ids=str,
)
def test_what_leaves_the_likeliest_is_greedy(server: Running, more: dict[str, Any]) -> None:
    assert complete(server, max_tokens=8, seed=1, **more) == complete(server, max_tokens=8)


def test_top_k_of_minus_1_is_off(server: Running) -> None:
    body: dict[str, Any] = {"temperature": 1, "seed": 3, "max_tokens": 8}
    assert complete(server, top_k=-1, **body) == complete(server, **body)


def test_bias_forbids_and_forces_tokens(server: Running, demo: Demo) -> None:
    likeliest, word = tokens_of(server, max_new_tokens=1)[0], demo[1].encode(" apples")[0]
    told = complete(server, max_tokens=1, logit_bias={str(likeliest): -100}, logprobs=1)
    assert told["logprobs"]["tokens"] != [demo[1].decode([likeliest])]
    assert demo[1].decode([likeliest]) in told["logprobs"]["top_logprobs"][0]  # the model's own
    forced = complete(server, max_tokens=4, logit_bias={str(word): 100}, temperature=1)
    assert forced["text"] == demo[1].decode([word] * 4)


@pytest.mark.parametrize("key", ["1024", "-1", "x", "", "1.0", " 5", "\u0665", "9" * 5000])
def test_bias_of_no_token_is_refused(server: Running, key: str) -> None:
    assert refused(server, COMPLETIONS, prompt=TEXT, logit_bias={key: 1})["param"] == "logit_bias"


# ---- ends


def test_a_text_ends_before_a_stop_string_wherever_tokens_end(server: Running) -> None:
    told = complete(server, max_tokens=24, logprobs=0)
    tokens, text = told["logprobs"]["tokens"], told["text"]
    assert "".join(tokens) == text
    for at in (3, 8, 13):
        across = tokens[at][-1] + tokens[at + 1] + tokens[at + 2][:1]
        stopped = complete(server, max_tokens=24, stop=across)
        assert stopped["text"] == text[: text.find(across)]
        assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", across)
        kept = complete(server, max_tokens=24, stop=[across], include_stop_str_in_output=True)
        assert kept["text"] == stopped["text"] + across
        pieces = stream(server, COMPLETIONS, prompt=TEXT, max_tokens=24, temperature=0, stop=across)
        assert "".join(c["text"] for p in pieces for c in p["choices"]) == stopped["text"]


def test_the_first_of_several_stop_strings_ends_a_text(server: Running) -> None:
    text = complete(server, max_tokens=24)["text"]
    first, later = text[5:8], text[12:15]
    assert text.find(first) < text.find(later)
    told = complete(server, max_tokens=24, stop=["never said", later, first])
    assert (told["text"], told["stop_reason"]) == (text[: text.find(first)], first)


def test_what_only_looks_like_a_stop_string_is_told_at_the_end(server: Running) -> None:
    text = complete(server, max_tokens=10)["text"]
    told = complete(server, max_tokens=10, stop=text[-3:] + "~")
    assert (told["text"], told["finish_reason"]) == (text, "length")


def test_stop_strings_in_the_prompt_are_no_matter(server: Running) -> None:
    assert complete(server, max_tokens=3, stop="Nora has", echo=True)["text"].startswith(TEXT)


def test_stop_tokens_end_a_text(server: Running, demo: Demo) -> None:
    drawn = tokens_of(server, max_new_tokens=12)
    token = drawn[6]
    told = complete(server, max_tokens=12, stop_token_ids=[token, 5])
    made = drawn.index(token) + 1
    assert (told["made"], told["finish_reason"]) == (made, "stop")
    assert told["stop_reason"] == token
    assert told["text"] == demo[1].decode(drawn[: made - 1])
    assert refused(server, COMPLETIONS, prompt=TEXT, stop_token_ids=[1024])["param"] == (
        "stop_token_ids"
    )


def test_eos_ends_a_text_unless_it_is_ignored(server: Running) -> None:
    told = complete(server, QUESTION, max_tokens=200)
    assert (told["finish_reason"], told["stop_reason"]) == ("stop", None)
    made = told["made"]
    assert 2 < made < 200 and "<|im_end|>" not in told["text"]
    drawn = tokens_of(server, QUESTION, max_new_tokens=200)
    assert drawn[-1] in (END, OTHER_END) and len(drawn) == made
    longer = complete(server, QUESTION, max_tokens=made + 4, ignore_eos=True)
    assert (longer["made"], longer["finish_reason"]) == (made + 4, "length")
    assert longer["text"].startswith(told["text"])
    spelled = complete(
        server, QUESTION, max_tokens=made + 4, ignore_eos=True, skip_special_tokens=False
    )
    assert spelled["text"].startswith(told["text"] + "<|im_end|>")


def test_eos_is_not_drawn_before_the_least_tokens(server: Running) -> None:
    made = complete(server, QUESTION, max_tokens=200)["made"]
    told = complete(server, QUESTION, max_tokens=made + 9, min_tokens=made + 5, logprobs=0)
    assert told["made"] >= made + 5
    assert not {"<|im_end|>", "<|endoftext|>"} & set(told["logprobs"]["tokens"][: made + 4])
    text = complete(server, max_tokens=12)["text"]
    late = complete(server, max_tokens=12, min_tokens=12, stop=text[3:6])
    assert (late["text"], late["made"]) == (text, 12)
    error = refused(server, COMPLETIONS, prompt=TEXT, min_tokens=5, max_tokens=4)
    assert error["param"] == "min_tokens" and "5" in error["message"] and "4" in error["message"]


# ---- types


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", ["7", True, 7.5, -1, [7], 2**63, 10**400]),
        ("n", [0, 129, "1", True, 1.5, {}]),
        ("temperature", ["1", True, -0.1, 1e31, [1], 10**400]),
        ("top_p", [-0.1, 1.1, "1", False]),
        ("top_k", [-2, 1.5, "1", True, 2**63]),
        ("min_p", [-0.1, 1.1, "1"]),
        ("presence_penalty", [-2.1, 2.1, "1", True]),
        ("frequency_penalty", [-2.1, 2.1, "1", True]),
        ("repetition_penalty", [0, 1e-300, -1, 101, "1", True]),
        ("logprobs", [-1, 21, True, "1", 1.5]),
        ("logit_bias", [[1], {"5": 101}, {"5": -101}, {"5": "1"}, {"5": None}, {"5": True}, 5]),
        ("stop", [5, "", [""], [5], ["a"] * 65, {}]),
        ("stop_token_ids", [5, ["5"], [-1], [True], [1.5], [2**31]]),
        ("min_tokens", [-1, "1", True, 1.5]),
        ("echo", [1, "true", 0]),
        ("stream", [1, "true"]),
        ("stream_options", [1, {"include_usage": 1}, []]),
        ("ignore_eos", [1, "true"]),
        ("model", [5, ["demo"]]),
        ("best_of", [0, "1", True]),
        ("priority", ["1", True, 1.5]),
        ("user", [5]),
        ("response_format", ["json_object", {"type": "xml"}, {}]),
    ],
)
def test_wrong_types_and_sizes_are_refused_by_name(
    server: Running, field: str, values: list[Any]
) -> None:
    for value in values:
        error = refused(server, COMPLETIONS, prompt=TEXT, **{field: value})
        assert (error["param"], error["type"]) == (field, "invalid_request_error"), value


def test_whole_floats_are_integers(server: Running) -> None:
    whole = {"max_tokens": 3.0, "n": 1.0, "top_k": 7.0, "seed": 5.0, "logprobs": 2.0}
    plain = {name: int(value) for name, value in whole.items()}
    answers = [ask(server, COMPLETIONS, prompt=[7.0, 9], **body) for body in (whole, plain)]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["completion_tokens"] == 3


def test_unknown_fields_and_nulls_are_as_nothing(server: Running) -> None:
    names = (
        "model stream stream_options n seed temperature top_p top_k min_p presence_penalty "
        "frequency_penalty repetition_penalty logit_bias stop stop_token_ids min_tokens ignore_eos "
        "skip_special_tokens include_stop_str_in_output priority response_format guided_json "
        "guided_regex guided_choice guided_grammar user echo logprobs suffix best_of "
        "add_special_tokens"
    ).split()
    ask(server, COMPLETIONS, prompt=TEXT, max_tokens=1, **dict.fromkeys(names))
    nulls = dict.fromkeys(set(names) - {"temperature"})
    unknown = {"store": True, "metadata": {"a": [None, {}]}, "x": 1e300, "model_config": 5}
    plain = complete(server, max_tokens=6)
    assert complete(server, max_tokens=6, **nulls) == plain
    assert complete(server, max_tokens=6, **unknown) == plain
