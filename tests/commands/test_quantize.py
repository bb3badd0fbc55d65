"""The streaming quantiser: the integers of `quantize`, and nothing half-done under a final name."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qnext as qn
from qnext import convert as converting
from qnext.cli import main
from qnext.convert import convert
from qnext.embedded import MODEL
from qnext.functional.checkpoint.stream import Spec, verify
from qnext.functional.layout import layout
from qnext.functional.quantize import PUBLIC_CONVERTER, quantize
from qnext.functional.tree import leaves_with_paths, map_leaves
from tests.samples import spec
from tests.stored import INDEX, SINGLE, Tensors, assert_same, files, read, write

PUBLISHED, IN_TWO, IN_FOUR = range(3)  # projections of the delta rule; all but the first stack


def stored_as(params: qn.Params, way: int) -> Tensors:
    """The tensors of a checkpoint that holds each leaf in one of the ways that it can be held."""
    leaves = dict(leaves_with_paths(params))
    return {
        piece.name: piece.written_from(leaves[entry.path])
        for entry in layout(params.config)
        for piece in entry.ways[min(way, len(entry.ways) - 1)]
    }


@pytest.fixture
def base(checkpoints: Any, tmp_path: Path) -> Callable[..., Path]:
    """base(way, shards, change) -> a checkpoint of the base model, its params changed in place."""

    def make(
        way: int = 0, shards: int = 1, change: Callable[[qn.Params], Any] = id, name: str = "src"
    ) -> Path:
        params = map_leaves(torch.clone, checkpoints("base")[2])
        change(params)
        return write(tmp_path / name, stored_as(params, way), spec("base"), shards)

    return make


# --- the same as in memory ---------------------------------------------------------------------

PUBLIC = [entry for entry in PUBLIC_CONVERTER if entry != "mtp.fc"]  # the base model has none
IGNORED: dict[str, list[str] | None] = {
    "default": None,
    "public": PUBLIC,
    "nothing": [],
    "names": ["lm_head", "model.layers.3.self_attn.o_proj", r"re:.*\.mlp\.gate$"],
    "experts": [r"re:.*\.mlp\.experts"],
    "all": ["re:"],
}


@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize(("way", "shards"), [(PUBLISHED, 5), (IN_TWO, 5), (IN_FOUR, 1)])
def test_equal_to_quantising_in_memory(
    base: Callable[..., Path], tmp_path: Path, way: int, shards: int, ignored: str
) -> None:
    source, target, ignore = base(way, shards), tmp_path / "dst", IGNORED[ignored]
    convert(source, target, **({"choice": "public"} if ignore is PUBLIC else {"ignore": ignore}))
    assert_same(qn.load(target), quantize(qn.load(source), ignore=ignore))
    weights = [f"model-{i + 1:05}-of-00005.safetensors" for i in range(5)]
    names = [SINGLE] if shards == 1 else [INDEX, *weights]
    assert files(target).keys() == {"config.json", *names}
    if shards > 1:
        total = sum(tensor.nbytes for tensor in read(target).values())
        assert json.loads((target / INDEX).read_text())["metadata"] == {"total_size": total}


@pytest.mark.parametrize("name", ["tied", "all_dense", "dense_layers", "conv2"])
def test_other_models(checkpoints: Any, tmp_path: Path, name: str) -> None:
    _, source, params = checkpoints(name)
    convert(source, tmp_path)
    assert_same(qn.load(tmp_path), quantize(params))


@pytest.mark.parametrize(("choice", "ignore"), [("default", None), ("public", PUBLIC_CONVERTER)])
def test_bfloat16_with_an_mtp_module(tmp_path: Path, choice: str, ignore: Any) -> None:
    convert(str(MODEL), str(tmp_path), choice=choice)
    got = qn.load(tmp_path)
    assert_same(got, quantize(qn.load(MODEL), ignore=ignore))
    assert got.embed.dtype == got.mtp[0].fc.dtype == torch.bfloat16


@pytest.mark.parametrize("way", [IN_TWO, IN_FOUR])
def test_stacked_experts_are_written_one_by_one(
    base: Callable[..., Path], tmp_path: Path, way: int
) -> None:
    convert(base(PUBLISHED), tmp_path / "published")
    stacks = base(way, name="stacks")
    convert(stacks, tmp_path / "dst")
    want, got = read(tmp_path / "published"), read(tmp_path / "dst")
    experts = {name for name in want if ".experts." in name}
    assert experts == {name for name in got if ".experts." in name} and len(experts) == 4 * 7 * 6
    assert all(got[name].equal(want[name]) for name in experts)
    others = {name.removesuffix("_scale") for name in got.keys() - experts}
    assert others == {name for name in read(stacks) if ".experts." not in name}
    convert(stacks, tmp_path / "kept", ignore=[r"re:.*\.experts"])
    kept = {name: tensor for name, tensor in read(stacks).items() if ".experts." in name}
    got = read(tmp_path / "kept")
    assert kept.keys() == {name for name in got if ".experts." in name} and len(kept) == 4 * 2
    assert all(got[name].equal(tensor) for name, tensor in kept.items())


# --- other files -------------------------------------------------------------------------------

SMALL = ["generation_config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE"]
OLD = ["pytorch_model.bin", "old.pt", "old.pth", "old.gguf", "other.safetensors"]


@pytest.mark.parametrize("shards", [1, 5])
def test_small_files_are_copied_and_old_weights_are_not(
    base: Callable[..., Path], tmp_path: Path, shards: int
) -> None:
    source, target = base(shards=shards), tmp_path / "dst"
    for name in SMALL + OLD:
        (source / name).write_bytes(name.encode() + bytes(range(256)) + b"\r\n")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    config = {"auto_map": {"AutoModel": "m.M"}, "torch_dtype": "float32", "é": [None]}
    (source / "config.json").write_text(json.dumps(spec("base") | config))
    convert(source, target)
    got, had = files(target), files(source)
    assert {name: got.get(name) for name in SMALL} == {name: had[name] for name in SMALL}
    weights = [name for name in got if name.endswith(".safetensors")]
    assert len(weights) == shards and not set(weights) & set(OLD)
    assert got.keys() == {*SMALL, *weights, "config.json", *([INDEX] if shards > 1 else [])}
    values = json.loads((target / "config.json").read_text())
    assert values.pop("quantization_config")["format"] == "int-quantized"
    assert values == spec("base") | config


# --- the summary and the command ---------------------------------------------------------------


def zero_rows(params: qn.Params) -> None:
    params.layers[0].ffn.gate_up[2, 17:19] = 0  # the last row of a gate and the first of an up
    params.layers[3].mixer.out_proj[5] = 0
    params.layers[1].mixer.gate_proj[0] = 0  # kept by default


@pytest.mark.parametrize("way", [PUBLISHED, IN_TWO])
def test_summary(base: Callable[..., Path], tmp_path: Path, way: int) -> None:
    source = base(way, 3, zero_rows)
    summary = convert(source, tmp_path / "dst")
    before, got = read(source), read(tmp_path / "dst")
    real, errors = stored_as(qn.load(source), PUBLISHED) | before, {}
    for name in [name for name, tensor in got.items() if tensor.dtype == torch.int8]:
        made = got[name].double() * got[f"{name}_scale"].double()
        errors[name] = float((made - real[name].double()).norm() / real[name].double().norm())
    assert (summary.quantised, summary.kept) == (len(errors), len(got) - 2 * len(errors))
    assert summary.bytes_before == sum(tensor.nbytes for tensor in before.values())
    assert summary.bytes_after == sum(tensor.nbytes for tensor in got.values())
    assert summary.zero_rows == 3
    assert summary.worst_name == max(errors, key=errors.__getitem__)
    assert summary.worst == pytest.approx(errors[summary.worst_name], rel=1e-5)


def test_the_command_tells_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(MODEL), str(tmp_path / "a")]) == 0
    out, err = capsys.readouterr()
    assert main(["quantize", str(MODEL), str(tmp_path / "b"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == asdict(convert(MODEL, tmp_path / "c"))
    before, after = told["bytes_before"] / 1e9, told["bytes_after"] / 1e9
    assert err == "" and out.splitlines() == [
        f"quantised  {told['quantised']} tensors, {told['kept']} kept as they were",
        f"bytes      {before:.3f} GB before, {after:.3f} GB after",
        f"worst      {told['worst']:.4f} relative RMS error, {told['worst_name']}",
    ]
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


def test_options_are_passed_on_and_zero_rows_told(
    base: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = base(change=zero_rows), tmp_path / "public"
    assert main(["quantize", str(source), str(target), "--choice", "public"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "zero rows  4 output channels are zero in int8"
    assert_same(qn.load(target), quantize(qn.load(source), ignore=PUBLIC))
    target, names = tmp_path / "names", ["lm_head", r"re:.*\.mlp\."]
    options = [word for name in names for word in ("--ignore", name)]
    assert main(["quantize", str(source), str(target), *options]) == 0
    assert_same(qn.load(target), quantize(qn.load(source), ignore=names))


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["quantize", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "examples:" in out and out.count("qnext quantize ") >= 4
    assert all(word in out for word in ("SRC", "DST", "--choice", "--ignore", "--json"))


REFUSED = {
    "no source": ("nowhere new", "no config.json"),
    "itself": ("src src", "is the source itself; give another directory"),
    "itself by another name": ("src link", "is the source itself; give another directory"),
    "not empty": ("src theirs", "is not empty; give a new directory, or empty it"),
    "a file": ("src src/config.json", "is a file; give a directory to write to"),
    "unknown name": ("src new --ignore lm_head --ignore x", "lists x, which matches nothing"),
    "no pattern": ("src new --ignore re:(", "'re:(', no regular expression"),
    "half the experts": (r"src new --ignore re:.*experts\.\d+\.down_proj", "list both or neither"),
    "half": ("src new --ignore model.layers.3.self_attn.q_proj", "list every part of it"),
    "int8": ("int8 new", "int8 is quantised already: model.layers.0."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_and_write_nothing(
    base: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    convert(base(), tmp_path / "int8")
    (tmp_path / "link").symlink_to(tmp_path / "src")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / ".hidden").write_text("x")
    before, (arguments, says) = files(tmp_path), REFUSED[case]
    source, target, *options = arguments.split()
    capsys.readouterr()
    assert main(["quantize", str(tmp_path / source), str(tmp_path / target), *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.startswith("qnext: ") and err.count("\n") == 1
    assert files(tmp_path) == before


@pytest.mark.parametrize("way", [PUBLISHED, IN_TWO])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_matrices_must_be_finite(
    base: Callable[..., Path], tmp_path: Path, way: int, value: float
) -> None:
    def spoil(params: qn.Params) -> None:
        params.layers[2].ffn.gate_up[4, 18 + 17, 39] = value

    with pytest.raises(qn.InputError, match=r"layers\.2\.mlp\.experts\.4\.up_proj.* not finite"):
        convert(base(way, change=spoil), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


# --- disks that are full or lie ----------------------------------------------------------------


def test_room_is_made_sure_of(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converting, "SPARE", 3_200_000_000)
    need = 3_200_000_000 + convert(base(), tmp_path / "dst").bytes_after
    free = [int(2.5e9), need - 1, need]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free[0]))
    while free[0] < need:
        says = f"{free[0] / 1e9:.1f} GB free, and 3.2 GB are still to be written"
        with pytest.raises(qn.CheckpointError, match=says):
            convert(tmp_path / "src", tmp_path / "tight")
        assert not (tmp_path / "tight").exists()
        free.pop(0)
    convert(tmp_path / "src", tmp_path / "tight")
    assert files(tmp_path / "tight") == files(tmp_path / "dst")


EXPERT = "model.layers.3.mlp.experts.6.down_proj.weight"


@pytest.mark.parametrize("name", [EXPERT, f"{EXPERT}_scale", "model.layers.0.linear_attn.A_log"])
def test_what_reads_back_otherwise_gets_no_name(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def flipped(file: Path, specs: Mapping[str, Spec], checksums: Mapping[str, int]) -> None:
        raw = bytearray(file.read_bytes())
        data = 8 + int.from_bytes(raw[:8], "little")
        raw[data + json.loads(raw[8:data])[name]["data_offsets"][1] - 1] ^= 1
        file.write_bytes(raw)
        verify(file, specs, checksums)

    monkeypatch.setattr(converting, "verify", flipped)
    with pytest.raises(qn.CheckpointError, match=f"^{re.escape(name)} in .* reads back other than"):
        convert(base(), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("byte", [0, 7, 20, 100])
def test_a_header_that_reads_back_otherwise_gets_no_name(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte: int
) -> None:
    def flipped(file: Path, specs: Mapping[str, Spec], checksums: Mapping[str, int]) -> None:
        raw = bytearray(file.read_bytes())
        raw[byte] ^= 1
        file.write_bytes(raw)
        verify(file, specs, checksums)

    monkeypatch.setattr(converting, "verify", flipped)
    with pytest.raises(qn.CheckpointError, match="safetensors"):
        convert(base(), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_disk_without_a_single_byte(base: Callable[..., Path], tmp_path: Path) -> None:
    """Closing what could not be written fails once more: the hint must not be lost in that."""
    (tmp_path / "dst" / ".quantize").mkdir(parents=True)
    partial = tmp_path / "dst" / ".model.safetensors.partial"

    def full(*_: Any) -> None:  # once room was found
        partial.symlink_to("/dev/full")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(converting, "_need_room", full)
        with pytest.raises(qn.CheckpointError, match=r"No space left.*run the same command again"):
            convert(base(), tmp_path / "dst")
    assert not partial.is_symlink() and not files(tmp_path / "dst")


def test_what_a_killed_run_left_is_room(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its partial file is about to be written over."""
    partial, room = tmp_path / ".model.safetensors.partial", converting.shutil.disk_usage
    (tmp_path / ".quantize").mkdir()
    partial.write_bytes(b"x")

    def usage(path: Path) -> Any:
        return room(path)._replace(free=0) if partial.exists() else room(path)

    monkeypatch.setattr(converting.shutil, "disk_usage", usage)
    convert(base(), tmp_path)


def test_an_unknown_choice_is_refused(base: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(qn.InputError, match=r"choice must be one of .*'public'.*, got 'foo'"):
        convert(base(), tmp_path / "dst", choice="foo")
