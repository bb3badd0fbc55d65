"""What a rank holds: the same numbers whether cut from a whole model or read from a checkpoint."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.errors import QnextError
from qnext.functional import ops
from qnext.functional.blocks import own
from qnext.functional.checkpoint import mapped
from qnext.functional.checkpoint.stream import Reader
from qnext.functional.mesh import Block, Span
from qnext.functional.shard import part_of
from qnext.functional.tree import leaves, nbytes
from tests.functional.test_int8_checkpoints import IGNORE, SCHEME, stored
from tests.parallel.models import EVEN, Mixed, whole_params
from tests.samples import BASE
from tests.sequences import used
from tests.stored import assert_same, write

MESHES = {
    "tp2": qn.Mesh(tp=2, rank=1),
    "tp4": qn.Mesh(tp=4, rank=2),
    "tp4 ep2": qn.Mesh(tp=4, ep=2, rank=3),
    "tp2 dp2": qn.Mesh(tp=2, dp=2, rank=3),
    "dp4": qn.Mesh(dp=4, rank=1),
    "some whole": qn.Mesh(tp=4, rank=1, whole=("vocab", "delta_heads")),
    "one": qn.Mesh(),
}


@pytest.mark.parametrize("way", [0, 1, 2], ids=["published", "split, stacked", "apart, stacked"])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("pages", [False, True], ids=["read", "mapped"])
def test_a_checkpoint_is_read_as_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: int, int8: bool, pages: bool
) -> None:
    monkeypatch.setattr(mapped, "SMALLEST_LEAF", 1)
    monkeypatch.setattr(mapped, "SMALLEST_RUN", 1)
    whole = whole_params(Mixed(int8=int8, changes=(("mlp_only_layers", (1,)),)))
    config = BASE | EVEN | {"mlp_only_layers": [1]}
    config |= {"quantization_config": SCHEME | {"ignore": IGNORE}} if int8 else {}
    path = write(tmp_path / "stored", stored(whole, way), config, 3)
    for mesh in MESHES.values():
        got = qn.load(path, mesh=mesh, mapped=pages)
        assert got.config.mesh == mesh
        assert_same(got, qn.shard(whole, mesh))


def test_what_is_read_is_what_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, read = whole_params(Mixed()), list[int]()
    qn.save(whole, tmp_path)
    before = Reader.read

    def counted(self: Reader, name: str, begin: int, out: Tensor) -> bool:
        read.append(out.nbytes)
        return before(self, name, begin, out)

    monkeypatch.setattr(Reader, "read", counted)
    for mesh in MESHES.values():
        read.clear()
        part = qn.load(tmp_path, mesh=mesh)
        assert sum(read) <= nbytes(part) + 4096 < nbytes(whole) + 8192
    assert nbytes(qn.shard(whole, qn.Mesh(tp=4))) < 0.6 * nbytes(whole)


PEAK = """
import gc, sys
import qnext as qn

def status(key):  # of this process alone: ru_maxrss begins with the parent's
    line = next(l for l in open("/proc/self/status") if l.startswith(key))
    return 1024 * int(line.split()[1])

mesh = qn.Mesh(tp=4, rank=2)
qn.load(sys.argv[1], mesh=mesh)
gc.collect()
before = status("VmHWM")
params = qn.load(sys.argv[2], mesh=mesh)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_is_near_a_rank_s_part(tmp_path: Path) -> None:
    sizes = {"hidden_size": 640, "num_experts": 36, "moe_intermediate_size": 440, "head_dim": 200}
    whole = qn.init_params(qn.Config.from_hf(BASE | EVEN | sizes))
    part = nbytes(qn.shard(whole, qn.Mesh(tp=4, rank=2)))
    assert nbytes(whole) > 500e6 and part < 0.3 * nbytes(whole)
    qn.save(whole, tmp_path / "large")
    qn.save(whole_params(Mixed()), tmp_path / "small")
    del whole
    paths = [str(tmp_path / name) for name in ("small", "large")]
    told = subprocess.run(
        [sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, check=True
    )
    assert int(told.stdout) < part + 48e6  # four readers at 8 MB each, and what libraries take


def test_heads_and_experts_by_hand() -> None:
    """Rows of the fused matrices, numbered, of two ranks."""
    config = replace(qn.Config.from_hf(BASE | EVEN), mesh=qn.Mesh(tp=2, rank=1))
    hd, dk, dv = 20, 10, 14
    assert config.mesh.spans(config.divided["qkvg"]) == [
        Span(4 * hd, 4 * hd),
        Span(8 * hd + hd, hd),
        Span(8 * hd + 2 * hd + hd, hd),
        Span(8 * hd + 4 * hd + 4 * hd, 4 * hd),
    ]
    assert config.mesh.spans(config.divided["qkvz"]) == [
        Span(2 * dk, 2 * dk),
        Span(4 * dk + 2 * dk, 2 * dk),
        Span(8 * dk + 6 * dv, 6 * dv),
        Span(8 * dk + 12 * dv + 6 * dv, 6 * dv),
    ]
    assert config.mesh.spans(config.divided["own_experts"]) == [Span(4, 5)]
    assert config.axes["hkv"] == 1 and config.axes["hv"] == 6 and config.axes["q"] == 8 * hd


def test_key_value_heads_repeat_beyond_their_count() -> None:
    blocks = (Block("heads", 2, 10, repeats=True),)
    held = [qn.Mesh(tp=8, rank=rank).spans(blocks) for rank in range(8)]
    assert held == [[Span(0, 10)]] * 4 + [[Span(10, 10)]] * 4


def test_a_state_is_cut_as_its_model_is() -> None:
    params = whole_params(Mixed())
    whole = used(params, draft=1)
    for mesh in MESHES.values():
        part = part_of(whole, replace(params.config, mesh=mesh))
        like = qn.init_state(qn.shard(params, mesh).config, whole.batch, 300, draft=1)
        assert [leaf.shape for leaf in leaves(part)] == [leaf.shape for leaf in leaves(like)]
    configs = [replace(params.config, mesh=qn.Mesh(tp=2, rank=rank)) for rank in range(2)]
    two = [part_of(whole, config) for config in configs]
    for name in ("recurrent", "key"):
        layer = 0 if name == "recurrent" else 3
        parts = [getattr(state.layers[layer], name) for state in two]
        dim = 1 if name == "recurrent" else 2
        assert torch.cat(parts, dim).equal(getattr(whole.layers[layer], name))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"tp": 0}, "tp must be an integer >= 1, got 0"),
        ({"dp": True}, "dp must be an integer >= 1, got True"),
        ({"tp": 2, "rank": 2}, "rank must lie in 0..1, got 2"),
        ({"tp": 2, "dp": 2, "ep": 3}, "ep = 3 must divide the 4 ranks"),
        ({"tp": 4, "dp": 3, "ep": 6}, "ep = 6 must divide the 12 ranks, and divide tp = 4"),
        ({"tp": 2, "whole": ("q",)}, "whole: 'q' is none of the axes heads, delta_heads, dense"),
    ],
)
def test_meshes_that_make_no_sense(how: dict[str, Any], why: str) -> None:
    with pytest.raises(qn.InputError, match=why):
        qn.Mesh(**how)


def test_what_cannot_be_divided_says_how_to_keep_it_whole() -> None:
    params = whole_params(Mixed())
    line = r"4 delta_heads cannot be divided over 3 ranks; Mesh\(\.\.\., whole=\('delta_heads',\)\)"
    with pytest.raises(qn.InputError, match=line):
        qn.shard(params, qn.Mesh(tp=3, whole=("heads", "vocab", "dense")))
    part = qn.shard(params, qn.Mesh(tp=2))
    with pytest.raises(qn.InputError, match="one rank's already: shard those of the whole model"):
        qn.shard(part, qn.Mesh(tp=2))


def test_a_part_is_no_checkpoint(tmp_path: Path) -> None:
    part = qn.shard(whole_params(Mixed()), qn.Mesh(tp=2, rank=1))
    with pytest.raises(qn.InputError, match="one rank's part: save those of the whole model"):
        qn.save(part, tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_a_mesh_without_ranks_cannot_compute() -> None:
    part = qn.shard(whole_params(Mixed()), qn.Mesh(tp=2))
    state = qn.init_state(part.config, 1, 9)
    with pytest.raises(QnextError, match="there is no process group '' here: make the mesh with"):
        qn.decode(part, state, torch.tensor([1]))


def test_ids_of_other_ranks_add_nothing() -> None:
    given = next(ops.PRIMITIVES["experts"].samples(torch.Generator().manual_seed(0)))
    whole = ops.experts(**given)
    parts = []
    for first, count in ((0, 2), (2, 3)):
        place = own(given["expert"], Span(first, count))
        mine = {n: given[n][first : first + count] for n in ("gate_up", "down")}
        parts.append(ops.experts(**given | mine | {"expert": place}))
    assert torch.allclose(sum(parts), whole, rtol=1e-5, atol=1e-6)
    nobody = own(given["expert"], Span(9, 5))
    assert not ops.experts(**given | {"expert": nobody}).any()
