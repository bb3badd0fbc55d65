"""Saving checkpoints: transformers' files, whole or not at all; and what loading costs and owns."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3NextForCausalLM

import qnext as qn
from qnext.functional.checkpoint import write
from qnext.functional.params import empty_params
from qnext.functional.tree import map_leaves, nbytes
from tests.samples import ODD, spec
from tests.stored import INDEX, SINGLE, assert_same, read

Contents = dict[str, bytes]


def contents(path: Path) -> Contents:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("name", ODD)
def test_saved_tensors_are_those_of_transformers(
    checkpoints: Any, tmp_path: Path, name: str
) -> None:
    _, path, params = checkpoints(name)
    qn.save(params, tmp_path)
    got, want = read(tmp_path), read(path)
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype and got[key].equal(tensor), key
    assert_same(qn.load(tmp_path), params)


@pytest.mark.parametrize("name", ["base", "tied", "dense_layers", "yarn"])
def test_transformers_loads_what_we_save(checkpoints: Any, tmp_path: Path, name: str) -> None:
    model, _, params = checkpoints(name)
    qn.save(params, tmp_path, max_shard_bytes=300_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    got, report = Qwen3NextForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(report.values())
    assert got.dtype == torch.float32
    want = model.state_dict()
    assert got.state_dict().keys() == want.keys()
    for key, tensor in got.state_dict().items():
        assert tensor.equal(want[key]), key


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [50_000, 200_000, 500_000, 1])
def test_shards_keep_to_their_limit(checkpoints: Any, tmp_path: Path, limit: int) -> None:
    params = checkpoints("base")[2]
    qn.save(params, tmp_path, max_shard_bytes=limit)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = {file.name: load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))}
    assert list(shards) == [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    assert {n: file for file, held in shards.items() for n in held} == index["weight_map"]
    sizes = [[tensor.nbytes for tensor in held.values()] for held in shards.values()]
    assert sum(map(sum, sizes)) == index["metadata"]["total_size"] == nbytes(params)
    assert all(sum(held) <= limit or len(held) == 1 for held in sizes)
    # full ones: the first tensor of a shard would not have fitted into the one before
    assert len(shards) == len(index["weight_map"]) or len(shards) <= 2 * nbytes(params) / limit + 1
    assert_same(qn.load(tmp_path), params)


@pytest.mark.parametrize(("first", "then"), [(10**9, 10**5), (10**5, 10**9), (60_000, 250_000)])
def test_stale_shards_and_index_go(checkpoints: Any, tmp_path: Path, first: int, then: int) -> None:
    qn.save(checkpoints("tied")[2], tmp_path / "a", max_shard_bytes=first)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    (tmp_path / "a" / "other.safetensors").write_bytes(b"theirs")
    for path in ("a", "b"):
        qn.save(checkpoints("base")[2], tmp_path / path, max_shard_bytes=then)
    kept = {"tokenizer.json": b"{}", "other.safetensors": b"theirs"}
    assert contents(tmp_path / "a") == contents(tmp_path / "b") | kept
    assert_same(qn.load(tmp_path / "a"), checkpoints("base")[2])


def test_save_makes_directories_and_takes_strings(checkpoints: Any, tmp_path: Path) -> None:
    params = checkpoints("only_delta")[2]
    qn.save(params, str(tmp_path / "deep" / "down"))
    assert sorted(contents(tmp_path / "deep" / "down")) == ["config.json", SINGLE]
    assert_same(qn.load(str(tmp_path / "deep" / "down")), params)


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> list[Path]:
    """Let `after` files be written, half of the next one, and then fail; returns what was begun."""
    begun: list[Path] = []

    def failing(write: Callable[..., None], file_at: int) -> Callable[..., None]:
        def attempt(*arguments: Any) -> None:
            begun.append(Path(arguments[file_at]))
            write(*arguments)
            if len(begun) > after:
                begun[-1].write_bytes(begun[-1].read_bytes()[: begun[-1].stat().st_size // 2])
                raise OSError(28, "No space left on device")

        return attempt

    monkeypatch.setattr(write, "save_file", failing(write.save_file, 1))
    monkeypatch.setattr(write, "write_json", failing(write.write_json, 0))
    return begun


# one file and config.json; three shards, index and config.json
FAILURES = [(10**9, 0), (10**9, 1), *((200_000, n) for n in range(5))]


@pytest.mark.parametrize("old", [10**9, 200_000], ids=["over one file", "over shards"])
@pytest.mark.parametrize(("limit", "after"), FAILURES)
def test_a_full_disk_leaves_the_old_checkpoint(
    checkpoints: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    old: int,
    limit: int,
    after: int,
) -> None:
    params = checkpoints("base")[2]
    qn.save(params, tmp_path, max_shard_bytes=old)
    before = contents(tmp_path)
    assert len(before) == (5 if old == 200_000 else 2)
    begun = full_disk(monkeypatch, after)
    with pytest.raises(OSError, match="No space left"):
        qn.save(map_leaves(lambda t: t + 1, params), tmp_path, max_shard_bytes=limit)
    assert len(begun) == after + 1
    assert contents(tmp_path) == before
    assert_same(qn.load(tmp_path), params)


def test_a_full_disk_leaves_a_new_place_empty(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, 0)
    with pytest.raises(OSError, match="No space left"):
        qn.save(checkpoints("base")[2], tmp_path / "new")
    assert contents(tmp_path / "new") == {}


# --- what loading costs and owns ---------------------------------------------------------------


@pytest.mark.parametrize("limit", [10**9, 10**5], ids=["single", "sharded"])
def test_params_own_their_memory(checkpoints: Any, tmp_path: Path, limit: int) -> None:
    want = checkpoints("base")[2]
    qn.save(want, tmp_path, max_shard_bytes=limit)
    params = qn.load(tmp_path)
    for file in tmp_path.iterdir():
        with file.open("r+b") as stream:  # in place: a mapped file would show it
            stream.write(b"\xff" * file.stat().st_size)
        file.unlink()
    assert_same(params, want)


WIDE = {"hidden_size": 1024, "moe_intermediate_size": 300, "num_experts": 37}
LARGE: dict[str, tuple[dict[str, Any], torch.dtype, int]] = {
    "experts, bfloat16, single": (WIDE, torch.bfloat16, 10**9),
    "experts, float32, sharded": (WIDE | {"num_experts": 17}, torch.float32, 5 * 10**7),
    "embedding, bfloat16, single": (
        {"hidden_size": 96, "vocab_size": 1_500_001, "tie_word_embeddings": True},
        torch.bfloat16,
        10**9,
    ),
    "embeddings, float32, sharded": (
        {"hidden_size": 96, "vocab_size": 380_001},
        torch.float32,
        10**8,
    ),
}
FIRST, *OTHERS = LARGE
PEAK = """
import gc, sys
import qnext as qn

def status(key):  # of this process alone: ru_maxrss begins with the parent's
    line = next(l for l in open("/proc/self/status") if l.startswith(key))
    return 1024 * int(line.split()[1])

qn.load(sys.argv[1])
gc.collect()
before = status("VmHWM")
params = qn.load(sys.argv[2])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    "case", [FIRST, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_peak_memory_is_near_the_size(checkpoints: Any, tmp_path: Path, case: str) -> None:
    sizes, dtype, limit = LARGE[case]
    config = qn.Config.from_hf(spec("base") | sizes).with_precision(compute=dtype)
    params = map_leaves(
        lambda t: torch.full_like(t, 0.5, device="cpu"), empty_params(config, "meta")
    )
    size = nbytes(params)
    assert 250e6 < size < 350e6
    qn.save(params, tmp_path, max_shard_bytes=limit)
    assert (tmp_path / SINGLE).exists() == (limit > size)
    del params
    tiny = checkpoints("base")[1]
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tiny), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.9 * size < int(run.stdout) <= 1.2 * size
    for file in tmp_path.iterdir():
        file.unlink()


# --- the progress bar ------------------------------------------------------------------------


def test_progress_goes_to_stderr(checkpoints: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, path, params = checkpoints("base")
    qn.load(path, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(rf"load: 100%.* {nbytes(params) / 1e3:.0f}k/", shown.err)


@pytest.mark.parametrize("progress", [False, None])
def test_progress_is_off(
    checkpoints: Any, capsys: pytest.CaptureFixture[str], progress: bool | None
) -> None:
    qn.load(checkpoints("base")[1], progress=progress)  # stderr is no terminal here
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("progress", "shown"), [(None, True), (True, True), (False, False)])
def test_progress_on_a_terminal(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch, progress: bool | None, shown: bool
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    qn.load(checkpoints("base")[1], progress=progress)
    assert ("load: 100%" in terminal.getvalue()) == shown
