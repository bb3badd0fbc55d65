"""Leaves that are pages of files: the same values as those that are read, wherever runs lie."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qnext as qn
from qnext.functional.checkpoint import mapped
from qnext.functional.checkpoint.mapped import PAGE, Pages, Run, mappable
from qnext.functional.checkpoint.read import examine
from qnext.functional.config import ATTENTION
from qnext.functional.tree import leaves_with_paths
from tests.samples import ODD, oracle, spec
from tests.stored import SINGLE, assert_same, read, write

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whatever can be mapped is, however small; the list tells which leaves were."""
    seen: list[str] = []

    def told(*arguments: Any) -> dict[str, list[Run]]:
        found = mappable(*arguments)
        seen.extend(found)
        return found

    monkeypatch.setattr(mapped, "SMALLEST_LEAF", 1)
    monkeypatch.setattr(mapped, "SMALLEST_RUN", 1)
    monkeypatch.setattr("qnext.functional.checkpoint.read.mappable", told)
    return seen


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ODD)
def test_mapped_and_read_are_the_same(
    tmp_path: Path, eager: list[str], name: str, shards: int
) -> None:
    oracle(name).save_pretrained(tmp_path / "whole")
    write(tmp_path, read(tmp_path / "whole"), spec(name), shards)
    want = qn.load(tmp_path)
    assert not eager
    assert_same(qn.load(tmp_path, mapped=True), want)
    assert ".embed" in eager


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose runs are whole pages, experts and interleaved rows among them."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 96, "num_experts": 11}
    config = qn.Config.from_hf(spec("base") | sizes)
    path = tmp_path_factory.mktemp("wide")
    qn.save(qn.init_params(config, seed=3), path)
    return path


def test_experts_and_interleaved_rows_are_mapped(wide: Path, eager: list[str]) -> None:
    params = qn.load(wide, mapped=True)
    assert_same(params, qn.load(wide))
    large = [".layers[0].mixer.in_proj", ".layers[0].ffn.gate_up", ".layers[3].ffn.down"]
    assert params.config.layer_types[0] != ATTENTION  # its norms lie between its projections
    assert set(large) <= set(eager)


def test_writing_to_params_changes_no_file(wide: Path, eager: list[str]) -> None:
    before = (wide / SINGLE).read_bytes()
    params = qn.load(wide, mapped=True)
    for path, leaf in leaves_with_paths(params):
        leaf.add_(1)
        assert leaf.isfinite().all(), path
    assert (wide / SINGLE).read_bytes() == before
    assert eager


def test_params_live_on_when_their_files_are_replaced(wide: Path, eager: list[str]) -> None:
    want = qn.load(wide)
    params = qn.load(wide, mapped=True)
    qn.save(params, wide)
    assert_same(params, want)
    assert_same(qn.load(wide, mapped=True), want)


def test_only_so_many_mappings(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, stored, parts = examine(wide)
    specs = dict(leaves_with_paths(qn.load(wide, device="meta")))
    leaves = [(part.path, specs[part.path], part.pieces) for part in parts]
    all_runs = mappable(leaves, stored)
    most = max(map(len, all_runs.values()))
    monkeypatch.setattr(mapped, "MOST_RUNS", most)
    assert config.num_experts <= sum(map(len, mappable(leaves, stored).values())) <= most
    assert most < sum(map(len, all_runs.values()))


@pytest.mark.parametrize(
    "options", [{"mapped": False}, {"check_finite": True}, {"dtype": torch.float64}]
)
def test_what_must_be_read_is(wide: Path, eager: list[str], options: dict[str, Any]) -> None:
    qn.load(wide, **{"mapped": True, **options})
    assert not eager


def test_loading_imports_no_sympy(wide: Path, tmp_path: Path) -> None:
    """Which takes a second, and which `empty_like` of a meta tensor would."""
    qn.save(qn.quantize(qn.load(wide)), tmp_path)
    code = """if True:
        import sys, qnext as qn
        for path in sys.argv[1:]:
            qn.load(path)
        print("sympy" in sys.modules)"""
    command = [sys.executable, "-c", code, str(wide), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


# --- runs of a file ---------------------------------------------------------------------------

BYTES = torch.arange(7 * PAGE + 123, dtype=torch.int64).remainder_(251).to(torch.int8)


@pytest.mark.parametrize(
    ("runs", "length"),
    [
        ([(24, 0, 100)], 100),  # within a page
        ([(PAGE - 8, 0, 16)], 16),  # over a boundary, no whole page
        ([(16, 0, 5 * PAGE)], 5 * PAGE),
        ([(0, 0, 2 * PAGE)], 2 * PAGE),
        ([(8, 0, 2 * PAGE), (8 + 4 * PAGE, 2 * PAGE, PAGE + 50)], 3 * PAGE + 50),
        (
            [(5 * PAGE + 40, 0, PAGE), (40, PAGE, 3 * PAGE), (40 + 4 * PAGE, 4 * PAGE, 9)],
            4 * PAGE + 9,
        ),
    ],
)
def test_a_leaf_is_its_runs(tmp_path: Path, runs: list[tuple[int, int, int]], length: int) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(bytes(BYTES.view(torch.uint8).tolist()))
    spec = torch.empty(length, dtype=torch.int8, device="meta")
    told = list[int]()
    with Pages() as pages:
        leaf = pages.leaf(spec, [Run(file, *run) for run in runs])
        pages.bring_in(told.append)
    want = torch.cat([BYTES[begin : begin + nbytes] for begin, _, nbytes in runs])
    assert leaf.equal(want) and sum(told) == length


@pytest.mark.parametrize("missing", [1, 3 * PAGE], ids=["its end", "whole pages"])
def test_a_file_cut_off_meanwhile_is_an_error(tmp_path: Path, missing: int) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(bytes(5 * PAGE - missing))
    spec = torch.empty(5 * PAGE - 8, dtype=torch.int8, device="meta")
    shorter = "bytes ends within a tensor: it became shorter"
    with Pages() as pages, pytest.raises(qn.CheckpointError, match=shorter):
        pages.leaf(spec, [Run(file, 8, 0, 5 * PAGE - 8)])


@pytest.mark.parametrize("missing", [1, 3 * PAGE], ids=["its end", "whole pages"])
def test_a_file_cut_off_before_its_pages_come_is_an_error(tmp_path: Path, missing: int) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(bytes(5 * PAGE))
    spec = torch.empty(5 * PAGE - 8, dtype=torch.int8, device="meta")
    with Pages() as pages:
        pages.leaf(spec, [Run(file, 8, 0, 5 * PAGE - 8)])
        os.truncate(file, 5 * PAGE - missing)
        with pytest.raises(
            qn.CheckpointError, match=r"bytes (cannot be read|ends within).*shorter"
        ):
            pages.bring_in(lambda nbytes: None)


def resident(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's pages that have a place in this process, from /proc/self/smaps."""
    begin, found, inside = tensor.data_ptr(), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low < begin + tensor.nbytes and high > begin
        elif inside and first == "Rss:":
            found += int(rest.split()[0]) << 10
    return found


def test_rows_come_when_they_are_asked_for(tmp_path: Path) -> None:
    """Of 16 MB; what the system brings along with a page is its affair, but not all."""
    size = 16 << 20
    file, told = tmp_path / "bytes", list[int]()
    file.write_bytes(bytes(BYTES[:251].view(torch.uint8).tolist()) * (size // 251 + 1))
    spec = torch.empty(size, dtype=torch.int8, device="meta")
    with Pages() as pages:
        rows, whole = (pages.leaf(spec, [Run(file, 8, 0, size)], kind) for kind in (True, False))
        pages.bring_in(told.append)
    assert sum(told) == 2 * size and resident(whole) >= size - 2 * PAGE
    assert resident(rows) < size // 4
    assert rows[5 * PAGE : 5 * PAGE + 9].equal(whole[5 * PAGE : 5 * PAGE + 9])
    assert resident(rows) < size // 2
    assert rows.equal(whole) and resident(rows) >= size - 2 * PAGE


def test_the_embedding_is_mapped_by_rows_unless_it_is_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = dict[bool, list[bool]]()

    class Told(Pages):
        def leaf(self, spec: torch.Tensor, runs: list[Run], by_rows: bool = False) -> torch.Tensor:
            kinds.setdefault(tied, []).append(by_rows)
            return super().leaf(spec, runs, by_rows)

    monkeypatch.setattr("qnext.functional.checkpoint.read.Pages", Told)
    monkeypatch.setattr(mapped, "SMALLEST_LEAF", 1)
    monkeypatch.setattr(mapped, "SMALLEST_RUN", 1)
    for tied in (False, True):
        name = "tied" if tied else "base"
        oracle(name).save_pretrained(tmp_path / name)
        qn.load(tmp_path / name, mapped=True)
    assert sum(kinds[False]) == 1 and sum(kinds[True]) == 0 and len(kinds[True]) > 3


def test_leaves_of_several_files_come_together(tmp_path: Path) -> None:
    spec = torch.empty(6 * PAGE, dtype=torch.int8, device="meta")
    leaves, files = [], [tmp_path / name for name in ("b", "a")]
    for number, file in enumerate(files):
        file.write_bytes(bytes(BYTES.roll(number).view(torch.uint8).tolist()))
    with Pages() as pages:
        for first, second in ((0, 1), (1, 0)):
            half = [Run(files[first], PAGE, 0, 3 * PAGE), Run(files[second], 0, 3 * PAGE, 3 * PAGE)]
            leaves.append(pages.leaf(spec, half))
        pages.bring_in(lambda nbytes: None)
    for leaf, (first, second) in zip(leaves, ((0, 1), (1, 0)), strict=True):
        want = [BYTES.roll(first)[PAGE : 4 * PAGE], BYTES.roll(second)[: 3 * PAGE]]
        assert leaf.equal(torch.cat(want))


def test_numbers_that_begin_at_odd_bytes_are_read(tmp_path: Path, eager: list[str]) -> None:
    """The format demands no alignment; a float that begins at an odd byte is no tensor of torch."""
    oracle("base").save_pretrained(tmp_path / "whole")
    write(tmp_path, read(tmp_path / "whole"), spec("base"))
    file = tmp_path / SINGLE
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size] + b" " * (3 - size % 4)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    assert len(header) % 4 == 3
    assert_same(qn.load(tmp_path, mapped=True), qn.load(tmp_path))
    assert not eager
