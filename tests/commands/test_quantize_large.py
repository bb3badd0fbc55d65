"""Checkpoints larger than memory: written by rows, gone on with when cut off, in a small space."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import qnext as qn
from qnext.convert import Summary, convert
from qnext.embedded import MODEL
from qnext.functional.checkpoint.read import examine
from qnext.functional.checkpoint.shards import DTYPES
from qnext.functional.checkpoint.stream import ShardWriter, Spec, verify
from qnext.functional.params import empty_params, matrices
from qnext.functional.quantize import kept_paths, quantize_rows
from qnext.functional.tree import nbytes
from tests.large import generate, large_config, large_specs, size
from tests.samples import spec
from tests.stored import INDEX, files

# --- shards written by rows --------------------------------------------------------------------

NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {  # sizes that leave nothing aligned
    "a": ((7, 3), torch.int8),
    "a_scale": ((7, 1), torch.float32),
    "conv": ((6, 1, 5), torch.bfloat16),
    "half": ((5,), torch.float16),
    "one": ((1,), torch.bfloat16),
    "number": ((1,), torch.int8),
    "wide": ((3, 3), torch.float64),
}


def odd_tensors() -> dict[str, Tensor]:
    return {name: (50 * torch.randn(shape)).to(dtype) for name, (shape, dtype) in SHAPES.items()}


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    return {name: Spec(NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


@pytest.mark.parametrize("step", [1, 2, 3, 100])
def test_rows_written_in_turns_read_back(tmp_path: Path, step: int) -> None:
    tensors, file = odd_tensors(), tmp_path / "x.safetensors"
    writer = ShardWriter(file, specs_of(tensors))
    for begin in range(0, 7, step):
        for name in [name for name, tensor in tensors.items() if begin < len(tensor)]:
            writer.write(name, tensors[name][begin : begin + step])
    writer.close()
    verify(file, writer.specs, writer.checksums)
    got = load_file(file)
    assert got.keys() == tensors.keys()
    assert all(got[n].dtype == t.dtype and got[n].equal(t) for n, t in tensors.items())
    raw = file.read_bytes()
    data = 8 + int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8:data]).items():
        if name in tensors:  # else metadata
            assert (data + entry["data_offsets"][0]) % tensors[name].itemsize == 0


@pytest.mark.parametrize("rows", [1, 6, 8])
def test_rows_must_be_as_many_as_announced(tmp_path: Path, rows: int) -> None:
    tensors = odd_tensors()
    writer = ShardWriter(tmp_path / "x.safetensors", specs_of(tensors))
    for name, tensor in (tensors | {"a": torch.zeros(rows, 3, dtype=torch.int8)}).items():
        writer.write(name, tensor)
    with pytest.raises(qn.CheckpointError, match=f"^a has {3 * rows} of 21 bytes in .*safetensors"):
        writer.close()


# --- cut off, and gone on with -----------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], Summary]:
    """A checkpoint of twelve shards, and what one uninterrupted conversion makes of it."""
    path = tmp_path_factory.mktemp("work")
    sizes = {"hidden_size": 256, "moe_intermediate_size": 160, "num_experts": 24}
    params = qn.init_params(qn.Config.from_hf(spec("base") | sizes))
    qn.save(params, path / "src", max_shard_bytes=nbytes(params) // 11)
    (path / "src" / "tokenizer.json").write_text("{}")
    summary = convert(path / "src", path / "whole")
    assert len(files(path / "whole")) == 12 + len(("config.json", INDEX, "tokenizer.json"))
    return path / "src", files(path / "whole"), summary


def finals(target: Path, whole: Mapping[str, str]) -> int:
    """How many shards have their names; all that has one must be whole, config.json the last."""
    named = {name: digest for name, digest in files(target).items() if name[0] != "."}
    assert named == {name: whole[name] for name in named}
    assert "config.json" not in named or named == whole
    return sum(name.endswith(".safetensors") for name in named)


FORKS = """
import os, sys
from qnext.cli import main
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr
        os._exit(main(line.strip().split("\\t")))
    print(pid, flush=True)
    sys.stdin.readline()  # until then a dead process keeps its id
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_killed_at_any_moment(work: Any, tmp_path: Path) -> None:
    """Many processes of the command, forked from one that has imported it."""
    (source, whole, _), at, kills = work, random.Random(0), 0
    with start("-c", FORKS) as forks:
        for number in range(30):
            target = tmp_path / str(number)
            while not (target / "config.json").exists() or (target / ".quantize").exists():
                pid = ask(forks, f"quantize\t{source}\t{target}")
                if at.random() < 0.5:
                    time.sleep(at.uniform(0, 0.2))
                else:
                    wait_for(target, at.randint(1, 4))
                os.kill(pid, signal.SIGKILL)
                status = ask(forks, "")
                assert status in (0, -signal.SIGKILL)
                kills += status != 0
                finals(target, whole)
            assert files(target) == whole
            if number >= 2 and kills >= 3:  # a fast machine is done before most of them
                break
        forks.communicate()
    assert kills >= 3


def start(*arguments: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *arguments], text=True, env=one_thread, **pipes)


def ask(process: Any, line: str) -> int:
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def wait_for(target: Path, more: int) -> None:
    """Until so many shards more have their names, or all have."""
    wanted = min(12, more + len(list(target.glob("*.safetensors"))))
    ends = time.monotonic() + 10
    while len(list(target.glob("*.safetensors"))) < wanted and time.monotonic() < ends:
        time.sleep(0.001)


HELD = """
import sys
from qnext import cli, convert
close, begun = convert.ShardWriter.close, []
def held(writer):
    begun.append(writer)
    if len(begun) == 4:
        print("held", flush=True)
        sys.stdin.readline()
    close(writer)
convert.ShardWriter.close = held
sys.exit(cli.main(sys.argv[1:]))
"""


def held(source: Path, target: Path) -> subprocess.Popen[str]:
    """The command in a process that waits for a line with its fourth shard unfinished."""
    process = start("-c", HELD, "quantize", str(source), str(target))
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


HINT = "qnext: the same command goes on with the next file\n"


@pytest.mark.parametrize(
    ("sign", "status", "says", "partial"),
    [("SIGINT", 130, HINT, 0), ("SIGKILL", -9, "", 1)],
    ids=["SIGINT", "SIGKILL"],
)
def test_signals(
    work: Any, tmp_path: Path, sign: str, status: int, says: str, partial: int
) -> None:
    source, whole, summary = work
    with held(source, tmp_path) as process:
        process.send_signal(getattr(signal, sign))
        assert process.communicate(timeout=60) == ("", says)
    assert process.returncode == status
    assert len(list(tmp_path.glob(".*.partial"))) == partial and finals(tmp_path, whole) == 3
    assert convert(source, tmp_path) == summary
    assert files(tmp_path) == whole


def test_only_one_at_a_time(work: Any, tmp_path: Path) -> None:
    source, whole, _ = work
    with held(source, tmp_path) as process:
        with pytest.raises(qn.CheckpointError, match="another process is writing to"):
            convert(source, tmp_path)
        assert finals(tmp_path, whole) == 3
        process.communicate("\n", timeout=60)
    assert process.returncode == 0 and files(tmp_path) == whole


@pytest.mark.parametrize("writes", [0, 300])
def test_a_full_disk_in_the_middle(
    work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    source, whole, summary = work
    fill_disk(source, tmp_path, monkeypatch, writes)
    made = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    assert len(made) == finals(tmp_path, whole) == (5 if writes else 0)
    assert not list(tmp_path.glob(".*.partial"))
    assert convert(source, tmp_path) == summary  # of all shards, made now or before
    assert files(tmp_path) == whole
    assert made == {file: file.stat().st_mtime_ns for file in made}


def fill_disk(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    left, write_rows = iter(range(writes)), ShardWriter.write

    def write(writer: ShardWriter, *arguments: Any) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        write_rows(writer, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "write", write)
        with pytest.raises(qn.CheckpointError, match=r"No space.* run the same command again"):
            convert(source, target)


def test_another_conversion_does_not_go_on_with_it(
    work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source, whole, _), target, copy = work, tmp_path / "dst", tmp_path / "copy"
    fill_disk(source, target, monkeypatch, 300)
    before = files(target)
    shutil.copytree(source, copy, copy_function=shutil.copyfile)  # of the same size, but newer
    others: list[dict[str, Any]] = [{"ignore": []}, {"choice": "public"}]
    for other in [*others, {"source": MODEL}, {"source": copy}]:
        with pytest.raises(qn.CheckpointError, match="holds the beginning of another conversion"):
            convert(**{"source": source, "target": target} | other)
        assert files(target) == before
    convert(source, target)
    assert files(target) == whole


# --- memory ------------------------------------------------------------------------------------

PEAK = """
import sys
from qnext.cli import main
status = main(sys.argv[1:])
line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(1024 * int(line.split()[1]))
sys.exit(status)
"""


@pytest.fixture
def large(tmp_path: Path) -> Iterator[tuple[Path, qn.Config]]:
    """A checkpoint of the 80B model's widths, with as many layers as the disk has room for."""
    free = shutil.disk_usage(tmp_path).free
    fit = [n for n in range(2, 7) if 1.6 * size(large_specs(large_config(n))) + 2e9 <= free]
    if not fit:
        pytest.skip(f"two layers and their conversion do not fit into {free / 1e9:.0f} GB")
    config = large_config(fit[-1])
    try:
        at = random.Random(0)
        generate(tmp_path / "src", config, lambda name: at.uniform(0.01, 0.1))
        yield tmp_path / "src", config
    finally:
        shutil.rmtree(tmp_path)  # pytest would keep it


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_is_that_of_a_tensor_not_of_the_model(
    large: tuple[Path, qn.Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source, config), target, began = large, tmp_path / "dst", time.monotonic()
    with start("-c", PEAK, "quantize", str(source), str(target), "--json") as process:
        out, err = process.communicate()
    seconds = time.monotonic() - began
    assert process.returncode == 0, err
    told, peak = map(json.loads, out.splitlines())
    largest = max(each.nbytes for each in large_specs(config).values())
    with capsys.disabled():
        print(
            f"\n{told['bytes_before'] / 1e9:.1f} GB of {config.num_hidden_layers} layers to "
            f"{told['bytes_after'] / 1e9:.1f} GB in {seconds:.0f} s; peak {peak / 1e9:.2f} GB, "
            f"largest tensor {largest / 1e9:.2f} GB"
        )
    assert told["bytes_before"] == size(large_specs(config))
    assert peak <= 2 * largest + 1e9
    check_converted(source, target, config)


def check_converted(source: Path, target: Path, config: qn.Config) -> None:
    """Headers are complete, and some tensors of every kind are right, bit for bit."""
    (_, before, _), (_, after, parts) = examine(source), examine(target)
    chosen = {path for path, _ in matrices(empty_params(config, "meta"))} - kept_paths(config)
    assert {part.path for part in parts if part.int8} == chosen
    kinds: dict[str, list[str]] = {}
    for name in before:
        kinds.setdefault(re.sub(r"\d+", "N", name), []).append(name)
    for names in kinds.values():
        for name in random.Random(0).sample(names, min(len(names), 5)):
            real, got = (
                safe_open(has[name].file, "pt").get_tensor(name) for has in (before, after)
            )
            if after[name].dtype != "I8":
                assert got.equal(real), name
                continue
            made, scale = quantize_rows(real), f"{name}_scale"
            assert got.equal(made.weight), name
            stored = safe_open(after[scale].file, "pt").get_tensor(scale)
            assert stored.equal(made.scale[:, None]), scale
