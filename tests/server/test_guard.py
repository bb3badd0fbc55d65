"""What stands before every route: keys, sizes, request ids, logs; and bodies that are none."""

import http.client
import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qnext as qn
from qnext.runtime.engine import Engine
from tests.server.asks import CHAT, COMPLETIONS, ask, error_of, post
from tests.server.conftest import OPTIONS, SECONDS, Running, ready_host, serving

Demo = tuple[qn.Params, Any]
KEYS = ("a-long-key", "an\u00fcther")
MOST = 3000
BODY = {"prompt": "Ruth saw", "max_tokens": 1}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def guarded(demo: Demo, server: Running) -> Iterator[Running]:
    """A server with keys, small bodies, one origin, and a log of JSON."""
    engine = Engine(*demo, OPTIONS, server.service.engine.steps)
    origins = ["https://here.example"]
    with serving(
        ready_host(engine), keys=KEYS, most_bytes=MOST, origins=origins, json_log=True
    ) as running:
        yield running


def bearer(key: str, scheme: str = "Bearer") -> dict[str, Any]:
    return {"Authorization": f"{scheme} {key}".encode()}


# ---- keys


def test_without_a_key_nothing_is_answered_but_health_and_the_page(guarded: Running) -> None:
    for path in ("/", "/health"):
        assert httpx.get(guarded.url + path, timeout=SECONDS).status_code == 200
    for path in ("/metrics", "/v1/models", "/openapi.json", "/nope", "//", "/health/", "/health/x"):
        response = httpx.get(guarded.url + path, timeout=SECONDS)
        assert response.status_code == 401, path
        error = error_of(response)
        assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
        assert response.headers["www-authenticate"] == "Bearer"
    assert post(guarded, COMPLETIONS, BODY).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (bearer(KEYS[0]), 200),
        (bearer(KEYS[1]), 200),
        (bearer(KEYS[0], "bearer"), 200),
        ({"X-Api-Key": KEYS[0]}, 200),
        ({"X-Api-Key": KEYS[1].encode()}, 200),
        (bearer(KEYS[0], "Basic"), 401),
        (bearer(KEYS[0], "Bearer,"), 401),
        ({"Authorization": KEYS[0]}, 401),
        ({"Authorization": "Bearer"}, 401),
        (bearer(KEYS[0][:-1]), 401),
        (bearer(KEYS[0] + "x"), 401),
        (bearer(KEYS[0].upper()), 401),
        (bearer(" ".join(KEYS)), 401),
        ({"X-Api-Key": ""}, 401),
        ({"X-Api-Key": "wrong"}, 401),
        ({**bearer("wrong"), "X-Api-Key": KEYS[0]}, 401),
        ({**bearer("wrong", "Basic"), "X-Api-Key": KEYS[0]}, 200),
    ],
    ids=str,
)
def test_a_key_opens_as_it_is(guarded: Running, headers: dict[str, Any], status: int) -> None:
    response = httpx.get(f"{guarded.url}/version", headers=headers, timeout=SECONDS)
    assert response.status_code == status
    assert not any(key in response.text for key in KEYS)


# ---- sizes


def connection(server: Running) -> http.client.HTTPConnection:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return http.client.HTTPConnection(host, int(port), timeout=60)


def exchange(
    to: http.client.HTTPConnection, body: Any, headers: Any, path: str = COMPLETIONS
) -> tuple[int, Any]:
    to.request("POST", path, body, headers, encode_chunked=not isinstance(body, bytes))
    response = to.getresponse()
    return response.status, json.loads(response.read())


def padded(size: int) -> bytes:
    text = json.dumps(BODY).encode()
    return text + b" " * (size - len(text))


def test_bodies_may_have_just_so_many_bytes(guarded: Running) -> None:
    headers = {**JSON, "X-Api-Key": KEYS[0]}
    chunked = {**headers, "Transfer-Encoding": "chunked"}
    with closing(connection(guarded)) as to:
        for size, status in ((MOST, 200), (MOST + 1, 413), (MOST, 200), (9 * MOST, 413)):
            assert exchange(to, padded(size), headers)[0] == status
            sock = to.sock
            pieces = [padded(size)[at : at + 700] for at in range(0, size, 700)]
            got, body = exchange(to, iter(pieces), chunked)
            assert got == status
            assert status == 200 or str(MOST) in body["error"]["message"]
            assert to.sock is sock is not None, "the connection is kept"


# ---- request ids


@pytest.mark.parametrize("name", ["a", "0f-9:_x/+=.", "~" * 128])
def test_plain_request_ids_are_echoed(server: Running, name: str) -> None:
    for path, status in (("/health", 200), ("/nope", 404), ("/v1/completions", 405)):
        response = httpx.get(server.url + path, headers={"X-Request-Id": name}, timeout=SECONDS)
        assert (response.headers["x-request-id"], response.status_code) == (name, status)


@pytest.mark.parametrize("name", [b"", b"a b", b"a\tb", b"\xff", "\u00fc".encode(), b"~" * 129])
def test_odd_request_ids_are_replaced(server: Running, name: bytes) -> None:
    response = httpx.get(f"{server.url}/health", headers={"X-Request-Id": name}, timeout=SECONDS)
    assert len(response.headers["x-request-id"]) == 32
    int(response.headers["x-request-id"], 16)


def test_requests_without_an_id_get_one_each(guarded: Running) -> None:
    names = [
        httpx.get(f"{guarded.url}/health", timeout=SECONDS).headers["x-request-id"]
        for _ in range(3)
    ]
    refused = httpx.get(f"{guarded.url}/version", timeout=SECONDS).headers["x-request-id"]
    assert len({*names, refused}) == 4


@pytest.mark.parametrize("line", [b"a\nEvil: 1", b"a\rEvil: 1", b"a\x00b", b"a\r\n Evil: 1"])
def test_no_request_id_makes_a_header(server: Running, line: bytes) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n")
        sock.sendall(b"X-Request-Id: " + line + b"\r\n\r\n")
        answer = b""
        while piece := sock.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 ") and b"evil" not in answer.lower()


# ---- logs


def lines(caplog: pytest.LogCaptureFixture, count: int) -> list[str]:
    """The lines of the access log, once there are so many: each is written after its answer."""
    until = time.monotonic() + 30
    while True:
        found = [r.getMessage() for r in caplog.records if r.name == "qnext.access"]
        if len(found) >= count or time.monotonic() > until:
            return found
        time.sleep(0.01)


SECRET = "My secret is elderberry."


def test_a_line_of_log_tells_figures_and_no_words(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    messages = [{"role": "user", "content": SECRET}]
    body = {"messages": messages, "max_tokens": 4, "ignore_eos": True, "stop": "elderberry"}
    used = ask(server, CHAT, **body)["usage"]
    post(server, CHAT, {**body, "stream": True})
    for wrong in (
        {**body, "temperature": "elderberry"},
        {**body, "max_tokens": 5000},
        {**body, "guided_regex": "((elderberry"},
        {"messages": [{"role": "tool", "content": SECRET}]},
        {"messages": [{"role": "elderberry", "content": SECRET}]},
    ):
        assert post(server, CHAT, wrong).status_code == 400
    found = lines(caplog, 7)
    assert len(found) == 7
    assert not any("elderberry" in record.getMessage() for record in caplog.records)
    first = dict(fact.split("=", 1) for fact in found[0].split())
    assert float(first.pop("seconds")) > 0 and len(first.pop("id")) == 32
    cached = used["prompt_tokens_details"]["cached_tokens"]
    expected = {"prompt": used["prompt_tokens"], "cached": cached, "new": 4, "finish": "length"}
    facts = {"method": "POST", "path": CHAT, "status": 200, **expected}
    assert first == {name: str(value) for name, value in facts.items()}
    assert f"prompt={used['prompt_tokens']} " in found[1] and " new=4 " in found[1]
    assert all(" status=400 " in line for line in found[2:])


def test_the_log_tells_why_no_prefix_was_looked_for(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ask(server, COMPLETIONS, prompt="Tom", max_tokens=1, echo=True, logprobs=0)
    ask(server, COMPLETIONS, prompt="Tom", max_tokens=1)
    scores, plain = lines(caplog, 2)
    assert " uncached=prompt_logprobs" in scores and "uncached" not in plain


def test_the_log_may_be_json(guarded: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    headers = {"X-Api-Key": KEYS[0], "X-Request-Id": "mine"}
    httpx.post(f"{guarded.url}{COMPLETIONS}", json={**BODY, "n": 2}, headers=headers, timeout=60)
    httpx.get(f"{guarded.url}/a%0ab%20c", headers={"X-Request-Id": "other"}, timeout=SECONDS)
    first, second = map(json.loads, lines(caplog, 2))
    assert first.pop("seconds") > 0
    prompt = 2 * len(qn.tokenizer().encode(BODY["prompt"]))
    made = {"prompt": prompt, "cached": first["cached"], "new": 2, "finish": "length"}
    assert first == {"method": "POST", "path": COMPLETIONS, "status": 200, "id": "mine", **made}
    assert (second["path"], second["status"], second["id"]) == ("/a\nb c", 401, "other")
    assert not any(key in record.getMessage() for record in caplog.records for key in KEYS)


def test_a_path_cannot_forge_a_line(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    httpx.get(f"{server.url}/a%0astatus=200%20id=1", timeout=SECONDS)
    (line,) = lines(caplog, 1)
    assert "\n" not in line and " status=404 " in line and r"\n" in line


# ---- origins


def test_pages_of_known_origins_may_ask(guarded: Running) -> None:
    asking = {
        "Origin": "https://here.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    response = httpx.options(guarded.url + CHAT, headers=asking, timeout=SECONDS)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://here.example"
    assert "authorization" in response.headers["access-control-allow-headers"].lower()
    for path in ("/health", "/version"):  # refused without a key, but readably
        answer = httpx.get(
            guarded.url + path, headers={"Origin": "https://here.example"}, timeout=SECONDS
        )
        assert answer.headers["access-control-allow-origin"] == "https://here.example"
        other = httpx.get(
            guarded.url + path, headers={"Origin": "https://there.example"}, timeout=SECONDS
        )
        assert "access-control-allow-origin" not in other.headers


def test_without_origins_no_page_may_ask(server: Running) -> None:
    answer = httpx.get(
        f"{server.url}/health", headers={"Origin": "https://here.example"}, timeout=SECONDS
    )
    assert "access-control-allow-origin" not in answer.headers


# ---- bodies that are none

DEEP = b'{"prompt": ' + b"[" * 100_000
NONE = {
    "empty": b"",
    "blank": b"  \n",
    "null": b"null",
    "number": b"7",
    "text": b'"prompt"',
    "array": b"[]",
    "array of bodies": b'[{"prompt": "a"}]',
    "broken": b'{"prompt": "a"',
    "single quotes": b"{'prompt': 'a'}",
    "trailing": b'{"prompt": "a"} x',
    "not utf-8": b'{"prompt": "\xff\xfe"}',
    "latin-1": b'{"prompt": "\xfc"}',
    "deep": DEEP,
    "deep and closed": DEEP + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000,
    "huge digits": b'{"prompt": "a", "seed": ' + b"9" * 6000 + b"}",
    "surrogate name": b'{"prompt": "a", "\\ud800": 1}',
}
WRONG = {
    "nan": b'{"prompt": "a", "temperature": NaN}',
    "infinite": b'{"prompt": "a", "top_p": Infinity}',
    "infinite bias": b'{"prompt": "a", "logit_bias": {"5": -Infinity}}',
    "nan tokens": b'{"prompt": [NaN]}',
    "huge": b'{"prompt": "a", "seed": 1' + b"0" * 400 + b"}",
    "huge float": b'{"prompt": "a", "temperature": 1e999}',
    "huge id": b'{"prompt": [1' + b"0" * 400 + b"]}",
    "surrogate": b'{"prompt": "a\\ud800"}',
    "surrogate in a list": b'{"prompt": ["\\udfff"]}',
    "surrogate to stop": b'{"prompt": "a", "stop": ["\\ud800"]}',
    "surrogate bias": b'{"prompt": "a", "logit_bias": {"\\ud800": "x"}}',
    "surrogate model": b'{"prompt": "a", "model": "\\ud800"}',
    "surrogate schema": b'{"prompt": "a", "guided_json": {"\\ud800": 1}}',
    "surrogate expression": b'{"prompt": "a", "guided_regex": "\\ud800"}',
}


@pytest.mark.parametrize("name", [*NONE, *WRONG])
def test_what_is_no_body_is_refused_and_the_connection_kept(server: Running, name: str) -> None:
    paths = (COMPLETIONS, CHAT, "/generate", "/tokenize", "/detokenize")
    with closing(connection(server)) as to:
        for path in paths if name in NONE else (COMPLETIONS,):
            status, body = exchange(to, (NONE | WRONG)[name], JSON, path)
            sock = to.sock
            assert status == 400, body
            assert set(body) == {"error"} and body["error"]["type"] == "invalid_request_error"
            to.request("GET", "/version")
            assert to.getresponse().read() and to.sock is sock and sock is not None


def test_a_body_that_is_not_called_json_is_refused(server: Running) -> None:
    content = json.dumps(BODY).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"):
        response = httpx.post(
            server.url + COMPLETIONS,
            content=content,
            headers={"Content-Type": kind},
            timeout=SECONDS,
        )
        assert response.status_code == 400
        assert "application/json" in error_of(response)["message"]
    for kind in ("application/json", "application/json; charset=utf-8", "APPLICATION/JSON"):
        response = httpx.post(
            server.url + COMPLETIONS,
            content=content,
            headers={"Content-Type": kind},
            timeout=SECONDS,
        )
        assert response.status_code == 200


def test_it_is_told_that_a_body_is_too_deep(server: Running) -> None:
    response = httpx.post(server.url + COMPLETIONS, content=DEEP, headers=JSON, timeout=SECONDS)
    assert "deep" in error_of(response)["message"]


def test_what_is_deep_but_unknown_is_let_through(server: Running) -> None:
    deep: dict[str, Any] = {}
    for _ in range(300):
        deep = {"a": deep}
    ask(server, COMPLETIONS, **BODY, unknown=deep)
    message = {"role": "user", "content": "hi", "unknown": deep}
    ask(server, CHAT, messages=[message], max_tokens=1, chat_template_kwargs=deep)


# ---- any body

WORDS = st.one_of(st.text(max_size=6), st.sampled_from(["a", "\ud800", "\0", "user", "function"]))
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 9), st.floats(), st.floats(0, 2), WORDS
)
ANY = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"])},
        optional={"content": WORDS | ANY, "name": ANY, "tool_calls": ANY, "extra": ANY},
    ),
    max_size=3,
)
FIELDS = (
    "model stream stream_options seed temperature top_p top_k min_p presence_penalty "
    "frequency_penalty repetition_penalty logit_bias stop stop_token_ids min_tokens ignore_eos "
    "skip_special_tokens include_stop_str_in_output priority response_format guided_json "
    "guided_regex guided_choice guided_grammar user echo logprobs suffix best_of top_logprobs "
    "add_special_tokens tools tool_choice parallel_tool_calls chat_template_kwargs"
).split()
SMALL = st.integers(0, 3) | st.none()
SHAPES = st.fixed_dictionaries(
    {"max_tokens": SMALL | ANY.filter(lambda value: not isinstance(value, int | float))},
    optional={"n": st.integers(0, 2) | WORDS, "prompt": WORDS | ANY, "messages": MESSAGES | ANY},
)


@settings(
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(SHAPES, st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=4))
def test_no_body_makes_the_server_fail(
    server: Running, shape: dict[str, Any], more: dict[str, Any]
) -> None:
    body = shape | more
    body |= {"max_completion_tokens": 2} if body["max_tokens"] is None else {}
    for path in (COMPLETIONS, CHAT):
        response = post(server, path, body)
        assert response.status_code < 500, response.text
        if response.status_code != 200:
            error_of(response)
