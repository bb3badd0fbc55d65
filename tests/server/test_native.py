"""Routes beside OpenAI's: health, models, metrics, the page, the document."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.resources import files
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import qnext as qn
from qnext.runtime.engine import Engine
from qnext.server.app import create_app
from qnext.server.guide import Grammars
from qnext.server.host import Host
from tests.server.asks import CHAT, COMPLETIONS, ask, error_of, refused, stream
from tests.server.conftest import OPTIONS, SECONDS, Running, ready_host, serving

Demo = tuple[qn.Params, Any]
TEXT = "Nora has 12 pears and Finn has 7 of them."


@pytest.fixture
def fresh(demo: Demo, server: Running) -> Iterator[Running]:
    """A server that nobody has asked anything."""
    engine = Engine(*demo, OPTIONS, server.service.engine.steps)
    with serving(ready_host(engine)) as running:
        yield running


def get(server: Running, path: str, status: int = 200) -> dict[str, Any]:
    response = httpx.get(f"{server.url}{path}", timeout=60)
    assert response.status_code == status, response.text
    body: dict[str, Any] = response.json()
    return body


def answer_of(host: Host, method: str, path: str, body: Any = None) -> httpx.Response:
    """What an application whose host has no model answers."""

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(host))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, json=body)

    return asyncio.run(asked())


# ---- health


def test_a_server_that_serves_is_healthy(server: Running) -> None:
    assert get(server, "/health") == {"status": "serving"}
    assert get(server, "/health_generate") == {"status": "serving"}


def test_a_server_without_a_model_answers_what_it_can() -> None:
    host = Host("demo", {"target": "cpu"})
    answer = answer_of(host, "GET", "/health")
    assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
    assert answer_of(host, "GET", "/v1/models").json()["data"][0]["id"] == "demo"
    assert answer_of(host, "GET", "/server_info").json()["state"] == "loading"
    assert answer_of(host, "GET", "/metrics").status_code == 200
    for method, path, body in (
        ("POST", COMPLETIONS, {"prompt": "a"}),
        ("POST", CHAT, {"messages": [{"role": "user", "content": "a"}]}),
        ("POST", "/generate", {"text": "a"}),
        ("POST", "/tokenize", {"prompt": "a"}),
        ("GET", "/health_generate", None),
        ("GET", "/tokenizer_info", None),
    ):
        answer = answer_of(host, method, path, body)
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert "loading" in error_of(answer)["message"]


def test_a_server_that_failed_says_why() -> None:
    host = Host("demo", failure="loading failed: no such file")
    answer = answer_of(host, "GET", "/health")
    body = {"status": "failed", "message": "loading failed: no such file"}
    assert (answer.status_code, answer.json()) == (503, body)


def test_a_server_that_drains_refuses_what_is_new(fresh: Running) -> None:
    fresh.service.drain()
    assert get(fresh, "/health", 503) == {"status": "draining"}
    error = refused(fresh, COMPLETIONS, 503, prompt=TEXT)
    assert "draining" in error["message"]
    assert refused(fresh, COMPLETIONS, 503, prompt=TEXT, stream=True) == error


class Slow(Grammars):
    """Grammars that take as long as a test wants."""

    begun, enough = threading.Event(), threading.Event()

    def regex(self, pattern: str, *, after: str | None = None, field: str = "regex") -> Any:
        self.begun.set()
        assert self.enough.wait(60)
        return super().regex(pattern, after=after, field=field)


def test_what_takes_long_to_read_holds_nobody_up(fresh: Running) -> None:
    ready = fresh.host.ready
    assert ready is not None
    slow = Slow(ready.tokenizer, ready.reader.vocab)
    fresh.host.ready = replace(ready, reader=replace(ready.reader, grammars=slow))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, fresh, COMPLETIONS, prompt=TEXT, guided_regex="[ab]{3}")
        try:
            assert slow.begun.wait(60)
            assert get(fresh, "/health") == {"status": "serving"}
            assert ask(fresh, COMPLETIONS, prompt=TEXT, max_tokens=1)["choices"]
            assert not asked.done()
        finally:
            slow.enough.set()
        assert asked.result()["choices"][0]["text"].strip("ab") == ""


# ---- what is served


def test_the_model_and_the_server_tell_of_themselves(server: Running) -> None:
    assert get(server, "/version") == {"version": qn.__version__}
    listed = get(server, "/v1/models")
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("demo", "model", 1024)
    assert get(server, "/v1/models/demo") == card
    info = get(server, "/model_info")
    assert info == {"model_path": "demo", "is_generation": True, "target": "cpu"}
    server.idle()
    told = get(server, "/server_info")
    assert (told["model"], told["state"], told["target"]) == ("demo", "serving", "cpu")
    assert (told["capacity"], told["rows"], told["rows_free"]) == (1024, 4, 4)
    assert (told["pages"], told["running"], told["waiting"]) == (24, 0, 0)
    assert (told["draft"], told["fallbacks"]) == (0, 0)


@pytest.mark.parametrize("name", ["other", "other/one", "demo/x", "", "%0a"])
def test_another_model_is_not_here(server: Running, name: str) -> None:
    response = httpx.get(f"{server.url}/v1/models/{name}", timeout=SECONDS)
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_other_paths_and_methods_are_told_in_the_same_shape(server: Running) -> None:
    for method, path, status in (
        ("GET", "/nope", 404),
        ("GET", "/v1", 404),
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/health", 405),
        ("POST", "/metrics", 405),
    ):
        response = httpx.request(method, f"{server.url}{path}", timeout=SECONDS)
        assert response.status_code == status
        error = error_of(response)
        assert error["type"] == "invalid_request_error" and path in error["message"]
        assert ("allow" in response.headers) == (status == 405)


# ---- metrics


def samples(server: Running) -> dict[tuple[str, str], float]:
    """Values by name and the labels beside the model's, as a parser of Prometheus reads them."""
    response = httpx.get(f"{server.url}/metrics", timeout=SECONDS)
    assert response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            found[sample.name, ",".join(sorted(labels.values()))] = sample.value
    return found


def test_metrics_count_exactly(fresh: Running) -> None:
    question = {"role": "user", "content": "Tom has 3 apples and buys 4. How many are they?"}
    words: dict[str, Any] = {"prompt": TEXT, "max_tokens": 5, "ignore_eos": True, "seed": 1}
    answers = [
        ask(fresh, COMPLETIONS, **words),
        ask(fresh, COMPLETIONS, **words),
        ask(fresh, CHAT, messages=[question], temperature=0),
    ]
    stream(fresh, COMPLETIONS, **words)
    answers.append(
        ask(fresh, COMPLETIONS, prompt="Ruth", max_tokens=40, guided_regex="ab?c", seed=1)
    )
    assert [a["choices"][0]["finish_reason"] for a in answers] == "length length stop stop".split()
    refused(fresh, COMPLETIONS, prompt="")
    usages = [answer["usage"] for answer in answers] + [answers[1]["usage"]]
    found = samples(fresh)
    assert found["vllm:request_success_total", "length"] == 3
    assert found["vllm:request_success_total", "stop"] == 2
    assert found["vllm:request_success_total", "abort"] == 0
    prompt, made = (sum(u[f"{name}_tokens"] for u in usages) for name in ("prompt", "completion"))
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert found["vllm:generation_tokens_total", ""] == made
    assert found["vllm:prefix_cache_queries_total", ""] == prompt
    assert found["vllm:prefix_cache_hits_total", ""] == cached
    assert found["vllm:prompt_tokens_total", ""] == prompt
    assert found["vllm:request_prompt_tokens_sum", ""] == prompt
    assert found["vllm:request_generation_tokens_sum", ""] == made
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_time_per_output_token_seconds",
    ):
        assert found[f"vllm:{name}_count", ""] == 5
        assert found[f"vllm:{name}_bucket", "+Inf"] == 5
    # tokens that came at once with a first one are not between any
    assert 0 < found["vllm:inter_token_latency_seconds_count", ""] <= made - 5
    assert found["http_requests_total", f"{COMPLETIONS},200"] == 4
    assert found["http_requests_total", f"{COMPLETIONS},400"] == 1
    assert found["http_requests_total", f"{CHAT},200"] == 1
    assert found["qnext:rows", ""] == found["qnext:rows_free", ""] == 4
    assert found["qnext:fallback_sites", ""] == 0
    assert found["vllm:num_requests_running", ""] == found["vllm:num_requests_waiting", ""] == 0


@pytest.mark.parametrize(("path", "least"), [("/metrics", 1000), ("/", 1000), ("/health", 5)])
def test_head_is_get_without_a_body(server: Running, path: str, least: int) -> None:
    response = httpx.head(f"{server.url}{path}", timeout=SECONDS)
    assert (response.status_code, response.content) == (200, b"")
    assert int(response.headers["content-length"]) > least


# ---- the page and the document


def test_the_root_is_the_page(server: Running) -> None:
    response = httpx.get(server.url, timeout=SECONDS)
    page = files("qnext.server").joinpath("page.html").read_text(encoding="utf-8")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.text == page


def test_the_document_is_whole_and_true(server: Running) -> None:
    document = get(server, "/openapi.json")
    assert document["openapi"].startswith("3.") and document["info"]["title"] == "qnext"
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)):
        found = document
        for part in reference.split("/"):
            found = found[part]
    paths = document["paths"]
    assert {COMPLETIONS, CHAT, "/health", "/generate", "/tokenize", "/v1/models"} <= {*paths}
    error = {"$ref": "#/components/schemas/ErrorBody"}
    for path, operations in paths.items():
        for method, operation in operations.items():
            assert method in ("get", "post") and "422" not in operation["responses"], path
            refusal = operation["responses"]["400"]["content"]["application/json"]["schema"]
            assert refusal == error
            if method == "post":
                body = operation["requestBody"]["content"]["application/json"]["schema"]
                assert body["$ref"].startswith("#/components/schemas/")
    names = set(document["components"]["schemas"])
    assert not {name for name in names if "Validation" in name}
    asked = document["components"]["schemas"]["CompletionRequest"]
    assert asked["required"] == ["prompt"] and "temperature" in asked["properties"]
