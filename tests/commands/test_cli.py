"""The command line as a user meets it: output, errors, exit statuses, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qnext.cli import main
from qnext.embedded import MODEL


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
    assert not arguments or "examples:" in out


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
