"""The software runtime does what the chip does, and fails where the chip would hang or go wrong."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch_npu

from qnext.lowering.softnpu import bridge


def test_fresh_memory_is_never_zero() -> None:
    fresh = torch.empty(5 << 20, device="npu", dtype=torch.int32)  # too large for a used block
    assert (fresh.cpu() == -0x5A5A5A5B).all()


def test_copies_and_views_keep_values() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    there = x.npu()
    assert torch.equal(there.t().contiguous().cpu(), x.t())
    assert torch.equal(there[:, 1:3].clone().cpu(), x[:, 1:3])
    assert torch.equal(there.to(torch.bfloat16).cpu(), x.to(torch.bfloat16))


def test_counters_tell_copies_and_launches() -> None:
    x = torch.ones(3).npu()
    before = bridge.counters()
    y = x + 1
    assert bridge.counters().launches == before.launches + 1
    assert bridge.counters().d2h == before.d2h
    assert y.cpu().tolist() == [2, 2, 2]
    assert bridge.counters().d2h == before.d2h + 1
    assert bridge.counters().synchronizations > before.synchronizations


def test_streams_and_events() -> None:
    x = torch.arange(6.0).npu()
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    start.record()
    stream = torch.npu.Stream()
    stream.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(stream):
        y = x * 2
        end.record(stream)
    torch.npu.current_stream().wait_event(end)
    torch.npu.synchronize()
    assert start.elapsed_time(end) >= 0
    assert y.cpu().tolist() == [0, 2, 4, 6, 8, 10]


def test_an_operator_without_kernel_is_loud(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="561103"):
        torch.erfinv(torch.ones(3).npu())
    assert "aclnnErfinv has no kernel" in capfd.readouterr().err


def test_capture_runs_nothing_and_replay_reads_static_inputs() -> None:
    a, b, graph = torch.arange(4.0).npu(), torch.zeros(4).npu(), torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        b.copy_(a + 1)
    assert b.cpu().tolist() == [0, 0, 0, 0]
    graph.replay()
    assert b.cpu().tolist() == [1, 2, 3, 4]
    a.copy_(torch.full((4,), 9.0))
    graph.replay()
    assert b.cpu().tolist() == [10, 10, 10, 10]


def test_a_read_while_capturing_is_refused() -> None:
    x, graph = torch.ones(3).npu(), torch.npu.NPUGraph()
    with pytest.raises(RuntimeError, match="107027"), torch.npu.graph(graph):
        (x + 1).cpu()


def test_fork_and_join() -> None:
    a, side, graph = torch.ones(16).npu(), torch.npu.Stream(), torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        main = torch.npu.current_stream()
        side.wait_stream(main)
        with torch.npu.stream(side):
            b = a * 3
        c = a + 1
        main.wait_stream(side)
        d = b + c
    graph.replay()
    assert d.cpu()[0].item() == 5
    with torch.npu.stream(side):  # the stream is free again
        e = a * 4
    side.synchronize()
    assert e.cpu()[0].item() == 4


def test_a_fork_that_nobody_joins_is_refused() -> None:
    a, side, graph = torch.ones(16).npu(), torch.npu.Stream(), torch.npu.NPUGraph()
    with pytest.raises(RuntimeError, match="107026"), torch.npu.graph(graph):
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            a * 3


def attend(kv: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of one query over pages: zero queries, so the mean of the positions."""
    heads, kv_heads, dim, size = 4, 2, 128, 16
    pool = torch.arange(6 * size, dtype=torch.bfloat16).repeat_interleave(kv_heads * dim)
    pool = pool.view(6, size, kv_heads * dim).npu()
    table = torch.arange(6, dtype=torch.int32).view(2, 3).npu()
    query = torch.zeros(2, heads, dim, dtype=torch.bfloat16).npu()

    out = torch_npu.npu_fused_infer_attention_score_v2(
        query.unsqueeze(1),
        pool,
        pool,
        actual_seq_kvlen=kv,
        block_table=table,
        num_query_heads=heads,
        num_key_value_heads=kv_heads,
        softmax_scale=1.0,
        input_layout="BSND",
        block_size=size,
    )[0]
    return out, torch.tensor([(n - 1) / 2 + 48 * i for i, n in enumerate(kv)])


def test_lengths_are_updated_between_replays(tmp_path: Path) -> None:
    graph = torch.npu.NPUGraph()
    attend([5, 33])  # constants must exist before the capture
    heads, size = 4, 16
    pool = torch.arange(6 * size, dtype=torch.bfloat16).repeat_interleave(256).view(6, size, 256)
    pool, table = pool.npu(), torch.arange(6, dtype=torch.int32).view(2, 3).npu()
    query = torch.zeros(2, 1, heads, 128, dtype=torch.bfloat16).npu()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        out = torch_npu.npu_fused_infer_attention_score_v2(
            *(query, pool, pool),
            actual_seq_kvlen=[5, 33],
            block_table=table,
            num_query_heads=heads,
            num_key_value_heads=2,
            input_layout="BSND",
            block_size=size,
        )[0]
    with pytest.raises(RuntimeError, match="507046"):  # nobody recorded the lengths' event
        graph.replay()
    for kv in ([5, 33], [6, 34], [40, 1]):
        graph.update(cpu_update_input=[{"actual_seq_kvlen": kv}])
        graph.replay()
        torch.npu.synchronize()
        want = torch.tensor([(n - 1) / 2 + 48 * row for row, n in enumerate(kv)])
        # bf16 holds these halves to 2^-8 of them
        assert torch.allclose(out.cpu()[:, 0, 0, 0].float(), want, rtol=2**-7)
    with warnings.catch_warnings(action="ignore"):
        graph.debug_dump(str(tmp_path / "dump.json"))
    dump = json.loads((tmp_path / "dump.json").read_text())
    names = [event["name"] for event in (dump if isinstance(dump, list) else dump["traceEvents"])]
    assert "aclnnFusedInferAttentionScoreV4" in names and "value_wait" in names


def test_eager_attention_over_pages() -> None:
    out, want = attend([5, 33])
    assert torch.allclose(out.cpu()[:, 0, 1, 3].float(), want, rtol=2**-7)


@pytest.mark.parametrize("soc, name", [("910B3", "Ascend910B3"), ("9391", "Ascend910_9391")])
def test_the_chip_is_chosen(soc: str, name: str) -> None:
    program = "import torch, torch_npu; print(torch.npu.get_device_name())"
    command = ["-m", "qnext.lowering.softnpu.device", "--soc", soc, "-c", program]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.stdout.strip().endswith(name), done.stderr
