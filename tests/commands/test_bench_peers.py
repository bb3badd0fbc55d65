"""`benchmarks.peers`: what it asks both sides, which runs count, figures, the page, refusals."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qnext as qn
from benchmarks.peers import __main__ as peers
from benchmarks.peers import noise, runs
from benchmarks.peers.check import examine, fault
from benchmarks.peers.first import first_token, kept
from benchmarks.peers.noise import Counters, counters, is_clean, share
from benchmarks.peers.page import draw, faults, page, rate, rates_table, start
from benchmarks.peers.runs import OURS, PEER, Cell, Ended, Run, Setup, launch, until_clean
from qnext.functional.quantize import Quantized

PNG = b"\x89PNG\r\n\x1a\n"
BENCH = """\
#!{python}
import json, sys
words = sys.argv[1:]
if "--version" in words:
    print("version: 9.8 (build 7)", file=sys.stderr)
    sys.exit()
if "broken" in words[words.index("-m") + 1]:
    sys.exit("cannot load " + words[words.index("-m") + 1])
prompt, new = (int(words[words.index(name) + 1]) for name in ("-p", "-n"))
depth = int(words[words.index("-d") + 1]) if "-d" in words else 0
rates = {{(0, 64, 512): [31.0, 47.0, 40.0], (512, 0, 0): [700.0, 890.0, 860.0], (1, 0, 0): [7.0]}}
print("warming up")
print(json.dumps({{"build_commit": "abc", "samples_ts": rates[prompt, new, depth]}}))
"""
BATCHED = """\
#!{python}
import json, sys
words = sys.argv[1:]
assert words[words.index("-npl") + 1] == "8" and "jsonl" in words
print("main: n_kv_max")
print(json.dumps({{"pl": 8, "speed_pp": 449.0, "speed_tg": 96.0}}))
"""
OUR_RATES = {"1": 50.0, "8": 120.0}  # by rows


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """Tools that only print, and files that have a name only."""
    for folder in ("bin", "gguf", "mid"):
        (tmp_path / folder).mkdir()
    for name, text in zip(runs.TOOLS, (BENCH, BATCHED), strict=True):
        (tmp_path / "bin" / name).write_text(text.format(python=sys.executable))
        (tmp_path / "bin" / name).chmod(0o755)
    for i, precision in enumerate(runs.PRECISIONS):
        (tmp_path / "gguf" / f"mid-{precision}.gguf").write_bytes(bytes(3_000_000 + i))
    for folder in ("mid", "gguf/mid-bf16", "gguf/mid-q8_0"):  # in this order: the latter are newer
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "config.json").write_text("{}")
    return Setup(tmp_path / "bin", tmp_path / "gguf", tmp_path / "mid", threads=2)


def ours(command: Sequence[str], red: Sequence[str]) -> Ended:
    """What our own processes would tell."""
    if "benchmarks.peers.check" in command:
        why = "logits are 9 from the reference's" if command[5] in red else None
        told = {"red": why, "weights_bytes": 900_000_000, "state_bytes": 50_000_000}
        return Ended(json.dumps(told), 1.0, 1, 0)
    if "benchmarks.peers.first" in command:
        return Ended('{"import_seconds": 1.5, "first_seconds": 0.5}', 2.5, 1, 77)
    figure = {"tokens": 512, "least": 4e9, "peak_bytes": 6, "tokens_per_second": 1290.0}
    most = {"flops_per_second": 1.6e10}
    if "decode" in command:
        rows = command[command.index("--batch") + 1]
        figure = {"tokens": int(rows), "least": 2e9, "peak_bytes": 1_230_000_000}
        figure["tokens_per_second"] = OUR_RATES[rows]
        most = {"bytes_per_second": 1.6e11}
    Path(command[command.index("--json") + 1]).write_text(json.dumps({"figures": [figure]} | most))
    return Ended("", 1.0, 1, 0)


@pytest.fixture
def bench(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Any, str]]:
    """bench(options, red) -> status, line of results, page; on a machine that tells no noise."""

    def run(*words: str, red: Sequence[str] = ()) -> tuple[int, Any, str]:
        def either(command: Sequence[str]) -> Ended:
            return ours(command, red) if command[0] == sys.executable else launch(command)

        monkeypatch.setattr(runs, "launch", either)
        monkeypatch.setattr(noise, "read", lambda: None)
        file, written = setup.model.parent / "r.jsonl", setup.model.parent / "roofline.md"
        places = ("--llama", setup.tools, "--gguf", setup.gguf, "--checkpoint", setup.model)
        files = ("--json", file, "--roofline", written)
        threads = ("--threads", str(torch.get_num_threads()))
        status = peers.main([*map(str, places + files), *threads, "--rounds", "1", *words])
        return status, json.loads(file.read_text().splitlines()[-1]), written.read_text()

    return run


def cell(our: Sequence[float], their: Sequence[float], case: str = "decode8") -> Cell:
    """One with clean runs of these rates, at a limit of 8 tokens x 500 / 20 = 200 a second."""
    made = Cell(case, "bf16")
    for value in our:
        told = {"tokens_per_second": value, "tokens": 8, "least": 20.0, "most": 500.0}
        made.runs[OURS].append(Run(told, 0.01))
    made.runs[PEER] = [Run({"tokens_per_second": value}, 0.02) for value in their]
    return made


def test_a_run_of_all_cases_writes_figures_page_and_picture(bench, setup: Setup, capsys) -> None:
    picture = setup.model.parent / "a.png"
    status, row, text = bench("--only", "f32", "--plot", str(picture))
    assert status == 0 and row["benchmark"] == "peers" and row["versions"][PEER] == "9.8 (build 7)"
    found = {r["case"]: (r[OURS], r[PEER], r["ratio"], r["limit"]) for r in row["rates"]}
    assert list(found) == ["decode1", "decode8", "prefill"]
    rates = {name: (a["tokens_per_second"], b["tokens_per_second"], ratio, limit)
             for name, (a, b, ratio, limit) in found.items()}  # fmt: skip
    assert rates["decode1"] == (50.0, 40.0, 1.25, 80.0)
    assert rates["decode8"] == (120.0, 96.0, 1.25, 640.0)
    assert rates["prefill"] == (1290.0, 860.0, 1.5, 2048.0)
    assert found["decode1"][0]["of_limit"] == 0.625 and found["decode1"][1]["of_limit"] == 0.5
    assert [r["case"] for r in row["starts"]] == ["cold", "warm"]
    (memory,) = row["memory"]
    assert memory[OURS]["over_bytes"] == 280_000_000 and memory[PEER]["file_bytes"] == 3_000_000
    assert len(row["runs"]) == 10 and row["gated"] is False
    assert "| decode, 1 row | f32 | 50.0 | 40.0 | 1.25 | 62% | 50% | 1 of 1, 1 of 1 |" in text
    assert "(a.png)" in text and "no run was thrown away" in text
    assert "no run was thrown away" in capsys.readouterr().out
    assert picture.read_bytes().startswith(PNG)
    assert str(setup.model.parent) not in text + json.dumps(row)  # places of this machine


def test_a_red_precision_gets_no_figure_and_the_others_do(bench, capsys) -> None:
    status, row, text = bench("--only", "f32", "bf16", "--cases", "decode1", red=["bf16"])
    assert status == 1
    assert [(r["case"], r["precision"]) for r in row["rates"]] == [("decode1", "f32")]
    assert list(row["red"]) == ["bf16"] and {r["precision"] for r in row["runs"]} == {"f32"}
    line = "bf16: red, logits are 9 from the reference's"
    assert f"- {line}\n" in text and line in capsys.readouterr().out


def test_a_side_that_fails_is_told_and_the_others_go_on(bench, setup: Setup, capsys) -> None:
    (setup.model.parent / "broken").mkdir()
    for path in setup.gguf.iterdir():
        path.rename(setup.model.parent / "broken" / path.name)
    words = ("--gguf", str(setup.model.parent / "broken"), "--cases", "prefill", "decode8")
    status, row, text = bench(*words, "--only", "q8_0")
    assert status == 1 and [r["case"] for r in row["rates"]] == ["decode8"]
    assert row["faults"] == [{"case": "prefill", "precision": "q8_0", "why": "llama.cpp failed"}]
    assert "cannot load" in capsys.readouterr().err
    assert str(setup.model.parent) not in text + json.dumps(row)


def test_the_logits_decide_what_is_red() -> None:
    reference = torch.randn(5, 1, 40)
    apart = reference + 3e-4 * reference.norm() * torch.eye(1, 200).reshape(5, 1, 40)
    assert fault("f32", reference, reference) is None
    assert "logits are 0.0003 from" in str(fault("f32", apart, reference))
    assert fault("bf16", apart, reference) is None
    assert fault("bf16", reference * 1.2, reference) and not fault("q8_0", apart, reference)
    assert fault("q8_0", reference * torch.nan, reference)


@pytest.mark.slow
def test_precisions_of_a_checkpoint_are_right_and_start(tmp_path: Path) -> None:
    whole = qn.demo()
    kinds = whole.config.layer_types[2:4]  # one of each
    config = replace(whole.config, num_hidden_layers=2, layer_types=kinds, mtp_layers=0)
    params = whole._replace(config=config, layers=whole.layers[2:4], mtp=())
    qn.save(params, tmp_path / "demo")
    (tmp_path / "gguf").mkdir()
    setup = Setup(tmp_path / "bin", tmp_path / "gguf", tmp_path / "demo", threads=2)
    for precision in runs.PRECISIONS:
        setup.make(precision)
    found = examine(setup.ours("q8_0"), tmp_path / "demo", "q8_0", 100)
    assert found["red"] is None and found["state_bytes"] > 0
    int8 = qn.load(setup.ours("q8_0"))
    assert (
        isinstance(int8.head[0].weight, Quantized) and "lm_head" not in kept() and len(kept()) == 2
    )
    assert qn.load(setup.ours("bf16")).embed.dtype == torch.bfloat16
    assert setup.ours("f32") == tmp_path / "demo"
    assert found["weights_bytes"] < 0.6 * sum(t.nbytes for t in qn.functional.tree.leaves(params))
    told = first_token(tmp_path / "demo", torch.get_num_threads())
    state = qn.init_state(params.config, 1, 2)
    logits, _ = qn.prefill(params, state, torch.ones(1, 1, dtype=torch.int64))
    assert told["token"] == int(logits.argmax(-1)) and told["first_seconds"] > 0


def test_commands_name_what_is_measured(setup: Setup) -> None:
    command = " ".join(setup.our_command("decode8", "bf16"))
    assert "bench decode" in command and "gguf/mid-bf16 --prompt" in command
    assert command.endswith("--batch 8 --threads 2")
    assert str(setup.ours("q8_0")) in setup.our_command("prefill", "q8_0")
    assert "--length 512" in " ".join(setup.our_command("prefill", "f32"))
    theirs = setup.peer_command("decode8", "q8_0")
    assert theirs[0].endswith("llama-batched-bench") and theirs[2].endswith("mid-q8_0.gguf")
    assert setup.peer_command("cold", "f32")[-1] == "--no-warmup"


def test_the_sides_take_turns() -> None:
    cells = peers.cells_of(["f32", "bf16"], ["prefill", "cold"])
    names = [(c.case, c.precision) for c in cells]
    assert names[:3] == [("prefill", "f32"), ("cold", "f32"), ("warm", "f32")] and len(names) == 6
    order = [(c.case, side) for c, side in peers.turns(cells[:1], 3)]
    assert [side for _, side in order] == [OURS, PEER, PEER, OURS, OURS, PEER]


def test_the_share_of_others_is_what_was_not_ours() -> None:
    text = "cpu  10 20 30 400 50 6 7 80 9 9\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    before = counters(text)
    assert before == Counters(busy=153, total=603)
    after = Counters(busy=153 + 70, total=603 + 200)
    assert share(before, after, own=50.0) == (70 - 50 - 3) / 200
    assert share(before, after, own=69.0) == 0.0  # ticks are counted to the next one
    assert is_clean(0.06) and not is_clean(0.061) and is_clean(None)


def test_a_watched_run_knows_its_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([Counters(1000, 5000), Counters(1300, 6000)])
    used = iter([2.0, 3.0])
    monkeypatch.setattr(noise, "read", lambda: next(told))
    monkeypatch.setattr(noise, "_used", lambda: next(used))
    monkeypatch.setattr(noise.os, "sysconf", lambda name: 100)
    assert noise.watch(lambda: "done") == ("done", (300 - 100 - 3) / 1000)


def test_a_noisy_run_is_repeated_at_most_twice() -> None:
    def runs(*shares: float) -> list[float | None]:
        left = iter(shares)
        return [run.others for run in until_clean(lambda: Run({}, next(left)))]

    assert runs(0.01) == [0.01]
    assert runs(0.5, 0.07, 0.02) == [0.5, 0.07, 0.02]
    assert runs(0.3, 0.2, 0.1, 0.0) == [0.3, 0.2, 0.1]


def test_figures_are_medians_of_clean_runs() -> None:
    made = cell([90.0, 150.0, 110.0], [30.0, 40.0, 80.0, 50.0])
    made.runs[OURS].append(Run({"tokens_per_second": 9000.0, "tokens": 8}, 0.2))
    row = rate(made)
    assert row["limit"] == 200.0 and row["ratio"] == 110.0 / 45.0
    assert row[OURS] == {"tokens_per_second": 110.0, "of_limit": 0.55, "runs": 3, "started": 4}
    assert row[PEER]["tokens_per_second"] == 45.0 and row[PEER]["of_limit"] == 0.225


def test_too_few_clean_runs_make_no_figure() -> None:
    made = cell([1.0, 2.0, 3.0], [4.0, 5.0])
    assert made.fault(rounds=5) == "the machine was busy"
    assert made.fault(rounds=2) is None
    made.runs[PEER].append(Run({"tokens_per_second": 6.0}, 0.07))
    assert made.fault(rounds=5) == "the machine was busy"
    made.runs[PEER].append(Run({"tokens_per_second": 6.0}, None))
    assert made.fault(rounds=5) is None
    told = {"case": "decode8", "precision": "bf16", "why": "the machine was busy"}
    line = "decode8, bf16: not measured: the machine was busy"
    assert faults({"red": {}, "faults": [told]}) == [line]


def test_ratios_of_starts_are_the_peers_seconds_by_ours() -> None:
    made = Cell("cold", "f32")
    seconds = {"process_seconds": 4.0, "first_seconds": 0.5, "import_seconds": 3.0}
    made.runs[OURS] = [Run(seconds | {"read_bytes": 10}, 0.0)]
    made.runs[PEER] = [Run({"process_seconds": 1.0, "read_bytes": 20}, 0.0)]
    row = start(made)
    assert row["process_ratio"] == 0.25 and row["first_ratio"] == 2.0


def test_a_table_has_a_cell_for_each_head(tmp_path: Path) -> None:
    rates = [rate(cell([100.0], [50.0])), rate(cell([30.0], [240.0]))]
    lines = rates_table(rates).splitlines()
    assert {len(re.findall(r"\|", line)) for line in lines} == {9} and len(lines) == 4
    assert "| 30.0 | 240.0 | 0.12 | 15% | 120% |" in lines[3]
    draw(rates, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_a_page_without_figures_says_why() -> None:
    names = ("command", "commit", "cpu", "machine", "capability")
    row: dict[str, Any] = dict.fromkeys(names, "x") | {"rounds": 3, "gated": True}
    row |= {"versions": {"torch": "2", PEER: "9"}, "rates": [], "starts": [], "memory": []}
    row |= {"red": {"bf16": "wrong"}, "faults": []}
    text = page(row, None)
    assert "more than 6%" in text and "- bf16: red, wrong" in text
    assert "Tokens per second" not in text and "![" not in text


def test_a_small_process_is_told_small_though_this_one_is_large() -> None:
    large = torch.ones(50_000_000)  # 200 MB
    small = launch([sys.executable, "-S", "-c", "print('{\"a\": 1}')"])
    assert small.last() == {"a": 1} and 0 < small.peak_bytes < 60e6 < large.nbytes
    more = launch([sys.executable, "-S", "-c", "b = bytearray(90_000_000); print(len(b))"])
    assert 90e6 < more.peak_bytes < 150e6 and more.seconds > 0


def test_a_process_that_fails_tells_why() -> None:
    with pytest.raises(RuntimeError, match="no such luck"):
        launch([sys.executable, "-S", "-c", "raise SystemExit('no such luck')"])
    with pytest.raises(RuntimeError, match="no line of JSON"):
        launch([sys.executable, "-S", "-c", "print('hello')"]).last()


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("bin/llama-bench", "there is no program llama-bench; build it from the sdist llama-cpp-"),
        ("bin/llama-batched-bench", "no program llama-batched-bench; .* -DGGML_NATIVE=ON"),
        ("gguf/mid-q8_0.gguf", "there is no mid-q8_0.gguf; .* --outtype q8_0"),
    ],
)
def test_what_is_missing_is_named(setup: Setup, missing: str, says: str, capsys) -> None:
    (setup.model.parent / missing).unlink()
    places = ("--llama", setup.tools, "--gguf", setup.gguf, "--checkpoint", setup.model)
    assert peers.main([*map(str, places)]) == 1
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--rounds", "0"), "--rounds must be an integer >= 1, got 0"),
        (("--plot", "a.txt"), "the picture is a PNG"),
        (("--json", "nowhere/a.jsonl"), "--json nowhere/a.jsonl: must be a file"),
        (("--roofline", "nowhere/a.md"), "--roofline nowhere/a.md: must be a file"),
    ],
)
def test_options_that_cannot_be_are_refused(setup: Setup, words, says: str, capsys) -> None:
    places = ("--llama", setup.tools, "--gguf", setup.gguf, "--checkpoint", setup.model)
    assert peers.main([*map(str, places), *words]) == 1
    assert says in capsys.readouterr().err


def test_the_command_is_told_without_places(tmp_path: Path) -> None:
    inside = Path("docs/roofline.md")
    assert peers.shown(inside) == "docs/roofline.md"
    assert peers.shown(tmp_path / "mid") == "mid" and peers.shown(Path("../up/b")) == "b"
