"""The command line as a user meets it: output, errors, exit statuses, Ctrl-C."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qnext as qn
from qnext.cli import main
from qnext.embedded import MODEL

ASKED = "Question: Mia has 12 apples and buys 7 more. How many has she now?\nAnswer:"


def test_generate_streams_text_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "Tom went to the", "--max-new-tokens", "8"]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "8 new tokens" in err and "tokens/s" in err and "Tom went to the" in err


def test_generate_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-new-tokens", "5", "--temperature", "0.9", "--top-p", "0.9", "--seed", "3"]
    texts = []
    for _ in range(2):
        assert main(["generate", "--prompt", "Anna has", "--json", *options]) == 0
        row = json.loads(capsys.readouterr().out)
        assert (row["prompt"], row["tokens"], row["finish"]) == ("Anna has", 5, "length")
        texts.append(row["text"])
    assert texts[0] == texts[1]  # same seed, same text


@pytest.mark.parametrize(
    "words", [["--chat", "Who are you?"], ["--prompt", "Who are you?", "--chat"]]
)
def test_chat_with_one_message(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *words, "--max-new-tokens", "6"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() and "Who are you?" in err
    assert "14 prompt tokens" in err  # with the template's own


def test_chat_reads_messages_from_standard_input() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "qnext.cli", "generate", "--chat", "--max-new-tokens", "4"],
        input="Hello!\nThanks!\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("new tokens") == 2


def test_eval_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    options = ["--limit", "3", "--shots", "1", "--max-new-tokens", "12", "--json", str(file)]
    assert main(["eval", *options]) == 0
    out = capsys.readouterr().out
    for word in ("accuracy", "invalid", "latency", "throughput"):
        assert word in out
    assert json.loads(file.read_text())["problems"] == 3


def test_generate_tells_how_guesses_fared(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--prompt", ASKED, "--stop", "Question", "--max-new-tokens", "40"]
    assert main(command) == 0
    plain, err = capsys.readouterr()
    assert "draft" not in err
    assert main([*command, "--draft", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == plain
    told = re.search(
        r"; stop; draft 2: accepted (0\.\d\d), (0\.\d\d) by position; (\d\.\d\d) tokens a step\]$",
        err.strip(),
    )
    assert told and main([*command, "--draft", "2", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["draft"] == 2 and row["text"] + "\n" == plain
    exact = [*row["acceptance"], row["tokens_per_step"]]
    assert [f"{number:.2f}" for number in exact] == list(told.groups())
    assert main([*command, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["draft"], row["acceptance"], row["tokens_per_step"]) == (0, [], 1.0)


def test_chat_with_guesses(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for more in ([], ["--draft", "3"]):
        assert main(["generate", "--chat", "Who are you?", "--max-new-tokens", "24", *more]) == 0
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out
    assert "draft 3: accepted " in said[1].err and "draft" not in said[0].err


def test_eval_tells_how_guesses_fared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    options = ["--limit", "3", "--shots", "1", "--max-new-tokens", "20", "--json", str(file)]
    assert main(["eval", *options]) == 0
    assert "draft" not in capsys.readouterr().out
    plain = json.loads(file.read_text())
    assert (plain["draft"], plain["acceptance_by_position"], plain["tokens_per_step"]) == (0, [], 1)
    assert main(["eval", *options, "--draft", "2"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    report = json.loads(file.read_text())
    first, second = report["acceptance_by_position"]
    steps = report["tokens_per_step"]
    assert line == (
        f"draft 2            accepted {first:.2f}, {second:.2f} by position; "
        f"{steps:.2f} tokens a step"
    )
    assert report["draft"] == 2 and steps > 1
    assert [row["text"] for row in report["results"]] == [row["text"] for row in plain["results"]]


@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_bad_drafts_are_one_line(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "x"] if verb == "generate" else []
    assert main([verb, *words, "--draft", "-1"]) == 2
    assert capsys.readouterr() == ("", "qnext: draft must be an integer >= 0, got -1\n")
    params = qn.demo(torch.bfloat16)
    bare = replace(params.config, mtp_layers=0)
    qn.save(params._replace(config=bare, mtp=()), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (MODEL / name).exists():
            shutil.copy(MODEL / name, tmp_path)
    assert main([verb, str(tmp_path), *words, "--draft", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("qnext: this model has no MTP module")
    assert "tokens/s" not in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "/nowhere", "--prompt", "x"], "no checkpoint"),
        (["generate", "--prompt", ""], "empty prompt"),
        (["generate", str(MODEL.parent), "--prompt", "x"], "no config.json"),
        (["generate", "--prompt", "x", "--chat", "y"], "two texts"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature must be"),
        (["generate", "--prompt", "x", "--top-p", "0"], "top_p must be"),
        (["generate", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens"),
        (["eval", "--data", "/nowhere.jsonl"], "cannot be read"),
        (["eval", "--shots", "1000"], "1000 shots"),
    ],
)
def test_errors_are_one_message(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["generate"], ["eval"]])
def test_help_teaches(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "usage" in out
    assert not arguments or ("examples:" in out and out.count("--draft") >= 3)


@pytest.mark.skipif(os.name == "nt", reason="signals as POSIX has them")
def test_interrupt_keeps_the_text_so_far() -> None:
    command = [sys.executable, "-u", "-m", "qnext.cli", "generate", "--prompt", "Tom went to the"]
    run = subprocess.Popen(
        [*command, "--max-new-tokens", "3000", "--temperature", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    said = run.stdout.read(1)
    time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert said + out.strip() and "tokens/s; interrupted]" in err and "Traceback" not in err


def test_a_checkpoint_without_tokenizer_is_refused_before_its_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((MODEL / "config.json").read_text())
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "tokenizer.json" in capsys.readouterr().err
