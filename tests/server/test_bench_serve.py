"""`qnext bench serve` against a small server that answers, dawdles and fails as it is told."""

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qnext.bench.command import add_bench
from qnext.bench.events import Events
from qnext.bench.figures import INTERRUPTED, Record, measure, report, spread
from qnext.bench.plot import draw, throughput, under_way
from qnext.bench.prompts import arrivals
from qnext.bench.serve import Bench, Options
from qnext.embedded import PROBLEMS
from qnext.errors import InputError
from tests.server.fake import ACCEPTED, CACHED, INPUT, REJECTED, TOKENS, Fake, serve

pytestmark = pytest.mark.slow

LAUNCH = """
import argparse, sys
from qnext.bench.command import add_bench
top = argparse.ArgumentParser()
add_bench(top.add_subparsers())
args = top.parse_args(sys.argv[1:])
print("ready", flush=True)
try:
    args.run(args)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serve() as server:
        yield server


def parsed(*words: str) -> argparse.Namespace:
    top = argparse.ArgumentParser(prog="qnext")
    add_bench(top.add_subparsers(required=True))
    return top.parse_args(["bench", "serve", *words])


def run(*words: str) -> int:
    args = parsed(*words)
    return int(args.run(args))


def measured(fake: Fake, **options: Any) -> Bench:
    bench = Bench(Options(fake.url, **{"prompts": PROBLEMS, "requests": 8, **options}))
    asyncio.run(bench.run())
    return bench


# ---- what is asked


def test_closed_loop_counts_everything(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.first, fake.gap = 0.02, 0.01
    bench = measured(fake, requests=20, concurrency=4)
    assert fake.most == 4 and len(fake.bodies) == 20
    assert sorted(record.index for record in bench.records) == list(range(20))
    figures = measure(bench.records, bench.seconds)
    assert (figures.sent, figures.answered, figures.failed) == (20, 20, 0)
    assert (figures.input_tokens, figures.output_tokens) == (20 * INPUT, 20 * TOKENS)
    assert figures.cached_tokens == 20 * CACHED
    assert (figures.accepted_guesses, figures.rejected_guesses) == (20 * ACCEPTED, 20 * REJECTED)
    assert figures.ttft and figures.tpot and figures.gaps and figures.latency
    assert figures.ttft.min >= 0.018  # what the server waits; no machine is faster
    assert 0.009 <= figures.tpot.mean < 0.2
    assert figures.gaps.count == 20 * (TOKENS - 1) and figures.lateness is None
    for record in bench.records:
        assert len(record.text_times) == TOKENS and record.finish == "length"
        assert record.sent < record.text_times[0] < record.text_times[-1] <= record.ended


def test_bodies_are_openai_s(fake: Fake) -> None:
    words = ["--requests", "2", "--output-tokens", "9", "--temperature", "0.5", "--ignore-eos"]
    words += ["--api-key", "secret", "--concurrency", "1"]
    assert run("--url", f"{fake.url}/v1/", *words) == 0
    assert fake.keys == ["Bearer secret"] * 2
    assert fake.bodies[0] == {
        "model": "fake",
        "messages": [{"role": "user", "content": _problem(0)}],
        "max_tokens": 9,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


def _problem(line: int) -> str:
    return str(json.loads(PROBLEMS.read_text().split("\n")[line])["question"])


def test_problems_for_completions(fake: Fake) -> None:
    measured(fake, endpoint="completions", requests=1, model="other")
    assert fake.bodies[0]["prompt"] == f"Question: {_problem(0)}\nAnswer:"
    assert fake.bodies[0]["model"] == "other" and "ignore_eos" not in fake.bodies[0]


def test_prompts_of_a_file(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "B?"}]
    rows = [{"prompt": "A\u2028?"}, {"messages": messages}, {"question": "C?", "answer": "c"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n\n".join(lines), encoding="utf-8")
    measured(fake, prompts=file, requests=4, concurrency=1)
    asked = [body["messages"] for body in fake.bodies]
    assert asked[0] == asked[3] == [{"role": "user", "content": "A\u2028?"}]
    assert asked[1] == messages and asked[2][0]["content"] == "C?"
    with pytest.raises(InputError, match="line 3: messages are for --endpoint chat"):
        measured(fake, prompts=file, endpoint="completions")
    file.write_text('{"prompt": "fine"}\n{"text": "what?"}\n')
    with pytest.raises(InputError, match="line 2: want an object with prompt"):
        measured(fake, prompts=file)


def test_random_prompts_share_a_prefix_and_follow_the_seed(fake: Fake) -> None:
    def drawn(seed: int) -> list[list[int]]:
        fake.bodies.clear()
        options = {"input_tokens": 20, "shared_prefix": 12, "endpoint": "completions"}
        measured(fake, requests=5, concurrency=1, warmup=2, seed=seed, **options)
        return [body["prompt"] for body in fake.bodies]

    prompts = drawn(1)
    assert len({tuple(prompt[:12]) for prompt in prompts}) == 1
    assert len({tuple(prompt[12:]) for prompt in prompts}) == 7  # of warm-up, too
    assert {len(prompt) for prompt in prompts} == {20}
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)
    assert drawn(1) == prompts and drawn(2)[0][:12] != prompts[0][:12]
    fake.vocab = None
    assert 50 <= max(token for prompt in drawn(1) for token in prompt) < 1000


def test_random_prompts_for_chat_are_words(fake: Fake) -> None:
    measured(fake, input_tokens=30, shared_prefix=10, requests=2, concurrency=1)
    one, other = (body["messages"][0]["content"].split() for body in fake.bodies)
    assert len(one) == len(other) == 30
    assert one[:10] == other[:10] and one[10:] != other[10:]


def test_warm_up_is_not_measured(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--url", fake.url, "--warmup", "3", "--requests", "4") == 0
    assert len(fake.bodies) == 7
    out = capsys.readouterr().out
    assert "3 requests, 0 failed" in out and "4 answered, 0 failed" in out
    fake.failures = dict.fromkeys(range(7, 10), "500")
    with pytest.raises(InputError, match=r"no warm-up request was answered.*HTTP 500: told to"):
        run("--url", fake.url, "--warmup", "3")


# ---- when


def test_open_loop_sends_on_time_to_a_slow_server(fake: Fake) -> None:
    fake.first = 1.0
    bench = measured(fake, concurrency=None, rate=100.0, requests=20, seed=3)
    planned = arrivals(100.0, 3, requests=20)
    assert planned[-1] < 0.6  # all are sent before the first is answered
    records = sorted(bench.records, key=lambda record: record.index)
    assert [record.planned for record in records] == planned
    for record in records:
        assert record.planned is not None
        assert 0 <= record.sent - record.planned < 0.3  # whatever the server does
    assert fake.most == 20
    figures = measure(bench.records, bench.seconds)
    assert figures.lateness is not None and figures.lateness.count == 20
    assert "sent behind the plan" in report(figures, [])


def test_arrivals_are_poisson_and_prefixes_of_each_other() -> None:
    times = arrivals(50.0, 0, requests=20_000)
    gaps = np.diff([0.0, *times])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)  # 4 sigma of 20,000 draws
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)
    some = arrivals(50.0, 0, duration=3.0)
    assert some == times[: len(some)] and some[-1] < 3.0 <= times[len(some)]
    assert arrivals(50.0, 1, requests=3) != times[:3]


@pytest.mark.parametrize("load", [{"concurrency": 3}, {"concurrency": None, "rate": 30.0}])
def test_duration_ends_sending_and_awaits_the_rest(fake: Fake, load: dict[str, Any]) -> None:
    fake.first = 0.1
    bench = measured(fake, requests=None, duration=0.5, **load)
    assert 3 <= len(bench.records) == len(fake.bodies)
    assert all(record.error is None for record in bench.records)
    assert max(record.planned or record.sent for record in bench.records) < 0.5
    assert bench.seconds == max(record.ended for record in bench.records)


# ---- what goes wrong


def test_errors_by_kind(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["500", "429", "429", "reset", "cut", "event", "garbage", "whole", "hang"]
    fake.failures = {2 * at: kind for at, kind in enumerate(kinds)}
    assert run("--url", fake.url, "--requests", "20", "--timeout", "1", "--concurrency", "5") == 0
    out = capsys.readouterr().out
    assert "11 answered, 9 failed" in out
    table = dict(re.findall(r"^(.+?) +(\d)  \S", out.partition("errors ")[2], re.MULTILINE))
    assert table == {
        "HTTP 429": "2",
        "HTTP 500": "1",
        "broken stream": "2",
        "error event": "1",
        "bad event": "1",
        "no stream": "1",
        "timeout": "1",
    }
    assert "told to answer 500" in out and "out of pages" in out and "over 1 s" in out


def test_nothing_answered_is_status_1(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.failures = {0: "500", 1: "429"}
    assert run("--url", fake.url, "--requests", "2") == 1
    assert re.search(r"TTFT.* -  ", capsys.readouterr().out)


def test_answers_without_usage_are_told(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.usage = False
    assert run("--url", fake.url, "--requests", "2") == 0
    out = capsys.readouterr().out
    assert "the server sends no usage" in out and re.search(r"TPOT.* -  ", out)


def test_a_server_that_is_not_there(fake: Fake) -> None:
    with pytest.raises(InputError, match=r"cannot be asked.*Is the server running"):
        run("--url", "http://127.0.0.1:9")
    fake.model = None
    with pytest.raises(InputError, match=r"HTTP 404\) tells no model: give --model"):
        run("--url", fake.url)
    assert run("--url", fake.url, "--model", "mine", "--requests", "1") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--concurrency 0", "--concurrency must be >= 1, got 0"),
        ("--rate 0", "--rate must be > 0, got 0"),
        ("--rate nan", "--rate must be > 0, got nan"),
        ("--requests -1", "--requests must be >= 1"),
        ("--duration inf", "--duration must be > 0"),
        ("--timeout 0", "--timeout must be > 0"),
        ("--input-tokens 0", "--input-tokens must be >= 1"),
        ("--output-tokens 0", "--output-tokens must be >= 1"),
        ("--temperature -1", "--temperature must be >= 0"),
        ("--seed -1", "--seed must be >= 0"),
        ("--warmup -1", "--warmup must be >= 0"),
        ("--shared-prefix 5", "--shared-prefix 5 .* give --input-tokens"),
        ("--shared-prefix 5 --input-tokens 4", "--shared-prefix 5 .* at least as many"),
        ("--prompts a.jsonl --input-tokens 4", "two kinds of prompts"),
        ("--prompts nowhere.jsonl", "nowhere.jsonl cannot be read"),
        ("--url localhost:8000", "--url must begin with http://"),
        ("--json nowhere/run.json", "--json nowhere/run.json: must be a file in a directory"),
        ("--plot run.pdf", "--plot run.pdf: the picture is a PNG"),
    ],
)
def test_nonsense_is_refused(words: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(*words.split())


@pytest.mark.parametrize("words", ["--rate 1 --concurrency 2", "--requests 3 --duration 2"])
def test_options_that_exclude_each_other(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*words.split())
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["aiohttp", "matplotlib.figure"])
def test_a_missing_extra_is_told(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=r"needs the extra: pip install 'qnext\[bench\]'"):
        run("--plot", "run.png")


def test_ctrl_c_reports_what_was_measured(fake: Fake, tmp_path: Path) -> None:
    fake.first, fake.failures = 0.02, {5: "hang", 6: "hang"}
    file, picture = tmp_path / "run.json", tmp_path / "run.png"
    words = ["bench", "serve", "--url", fake.url, "--duration", "60", "--concurrency", "2"]
    files = ["--json", str(file), "--plot", str(picture)]
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *words, *files],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        end = time.monotonic() + 60
        while fake.under_way < 2 or len(fake.bodies) < 7:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "5 answered, 0 failed, 2 cut off" in out and err == ""  # and no bar: no terminal
    whole = json.loads(file.read_text())
    assert whole["interrupted"] and whole["figures"]["interrupted"] == 2
    assert [row["error"] for row in whole["requests"]] == [None] * 5 + [INTERRUPTED] * 2
    assert picture.read_bytes()[1:4] == b"PNG"


# ---- what is made of it


def test_json_and_plot(fake: Fake, tmp_path: Path) -> None:
    from matplotlib.image import imread

    fake.gap, fake.failures = 0.005, {3: "500", 4: "reset"}
    file, picture = tmp_path / "run.json", tmp_path / "run.png"
    words = ["--requests", "12", "--api-key", "secret", "--seed", "4"]
    assert run("--url", fake.url, *words, "--json", str(file), "--plot", str(picture)) == 0
    assert "secret" not in file.read_text()
    whole = json.loads(file.read_text())
    assert whole["options"]["seed"] == 4 and whole["options"]["api_key"] == "given"
    assert whole["model"] == "fake" and not whole["interrupted"]
    assert whole["figures"]["answered"] == 10
    assert sum(kind["count"] for kind in whole["figures"]["errors"].values()) == 2
    assert len(whole["requests"]) == 12
    good = [row for row in whole["requests"] if row["error"] is None]
    assert all(row["output_tokens"] == TOKENS == len(row["text_times"]) for row in good)
    p50 = float(np.percentile([row["ttft"] for row in good], 50))
    assert whole["figures"]["ttft"]["p50"] == pytest.approx(p50, abs=2e-6)
    pixels = imread(picture)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 800 and pixels.std() > 0.05


def test_a_plot_of_nothing_is_still_one(tmp_path: Path) -> None:
    draw([], 0.0, "empty", tmp_path / "empty.png")
    draw([Record(0, ended=0.1, error="timeout")], 0.1, "failed", tmp_path / "failed.png")
    assert (tmp_path / "failed.png").stat().st_size > (tmp_path / "empty.png").stat().st_size


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_events_however_they_are_cut(end: str) -> None:
    lines = [": comment", "data: one", "", "event: x", "data:two", "data: two ü", "", "id: 3", ""]
    stream = end.join([*lines, "", "data: [DONE]", "", ""]).encode()
    want = ["one", "two\ntwo ü", "[DONE]"]
    for cut in range(len(stream) + 1):
        for width in (len(stream), 1):
            events, tail = Events(), stream[cut:]
            pieces = [stream[:cut], *(tail[i : i + width] for i in range(0, len(tail), width))]
            got = [event for piece in pieces for event in events.feed(piece)]
            assert got + events.end() == want
    assert Events().feed(stream + b"\n") == want


def test_an_event_without_its_blank_line_counts() -> None:
    events = Events()
    assert events.feed(b"data: a\n\ndata: b") == ["a"]
    assert events.end() == ["b"]


def test_times_of_a_request() -> None:
    record = Record(0, sent=1.0, ended=4.0, text_times=[1.5, 2.0, 3.5], output_tokens=5)
    assert (record.ttft, record.tpot, record.latency) == (0.5, 0.5, 3.0)
    assert record.gaps == [0.5, 1.5]
    assert Record(0, text_times=[1.0], output_tokens=5).tpot is None  # all at once
    assert Record(0, text_times=[1.0, 2.0]).tpot is None  # not told
    assert Record(0).ttft is None


def test_spread() -> None:
    values = spread([None, *map(float, range(101))])
    assert values is not None
    assert (values.count, values.mean, values.min, values.max) == (101, 50, 0, 100)
    assert (values.p50, values.p90, values.p95, values.p99) == (50, 90, 95, 99)
    assert spread([None]) is None


def test_series_of_the_plot() -> None:
    records = [
        Record(0, sent=0.0, ended=2.5, text_times=[0.5, 1.5], output_tokens=6),
        Record(1, sent=0.5, ended=2.0, text_times=[1.6], error="timeout"),  # counts as 3 tokens
    ]
    edges, rates = throughput(records, 2.5)
    assert edges.tolist() == [0.0, 1.0, 2.5] and rates.tolist() == [3.0, 4.0]
    edges, counts = under_way([(record.sent, record.ended) for record in records], 2.5, cells=5)
    assert edges.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5] and counts.tolist() == [1, 2, 2, 2, 1]
    assert under_way([(0.25, 0.5)], 1.0, cells=2)[1].tolist() == [0.5, 0.0]
