"""Four layers with the 80B model's widths, bfloat16 and W8A8 beside each other, in 20 GB."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import qnext as qn
from qnext.convert import convert
from tests.large import generate, large_config, large_specs, size
from tests.samples import relative_rms

LAYERS, LIMIT = 4, 20e9
RUN = """
import resource, sys, torch, qnext as qn
path, out = sys.argv[1:]
params = qn.load(path)
tokens = torch.randint(0, params.config.vocab_size, (2, 17), generator=torch.manual_seed(3))
state = qn.init_state(params.config, batch=2, capacity=17)
with torch.no_grad():
    logits, _ = qn.forward(params, state, tokens)
torch.save(logits, out)
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def deviation(name: str) -> float:
    """Weights of 0.02 and a stream of unit size, to which layers add as in a trained model.

    With embeddings of 0.02 too, the stream is what random experts make of it, and bfloat16 itself
    is more than a tenth from float32: any rounding chooses other experts (docs/quantization.md).
    """
    return 1.0 if "embed_tokens" in name or name.endswith(("A_log", "dt_bias")) else 0.02


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    config = large_config(LAYERS)
    need, free = 1.7 * size(large_specs(config)), shutil.disk_usage(tmp_path).free
    if free < need:
        pytest.skip(f"{need / 1e9:.0f} GB on disk are needed, {free / 1e9:.0f} GB are free")
    try:
        generate(tmp_path / "src", config, deviation)
        yield tmp_path / "src"
    finally:
        shutil.rmtree(tmp_path)  # pytest would keep it


def run(path: Path, out: Path) -> tuple[torch.Tensor, int]:
    """Logits of a checkpoint, and the peak memory of the process that made them."""
    command = [sys.executable, "-c", RUN, str(path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(out), int(done.stdout)


@pytest.mark.slow
def test_quantised_logits_are_near_bfloat16_s(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    want, peak = run(source, tmp_path / "want")
    convert(source, tmp_path / "dst", progress=False)
    got, int8_peak = run(tmp_path / "dst", tmp_path / "got")
    with capsys.disabled():
        print(
            f"\n{LAYERS} layers: {relative_rms(got, want):.4f} of bfloat16's logits; peak memory "
            f"{peak / 1e9:.1f} GB in bfloat16, {int8_peak / 1e9:.1f} GB in int8"
        )
    assert max(peak, int8_peak) < LIMIT
    # what is asked for: 3 %; the demo, which is trained, has 2.7 %
    assert 0 < relative_rms(got, want) < 0.03
    assert isinstance(qn.Config.from_hf(tmp_path / "dst"), qn.Config)
