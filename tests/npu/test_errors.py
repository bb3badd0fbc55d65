"""What a machine lacks, said in one sentence: with the real package, not with a stand-in."""

import os
import subprocess
import sys

import pytest
import torch

import qnext as qn
from qnext.lowering.npu import probe
from qnext.lowering.target import resolve
from tests.npu.models import case, here, params, there

COMPILE = """
import qnext as qn, torch
config = qn.Config.from_hf({"model_type": "qwen3_next", "num_hidden_layers": 2, "num_experts": 8,
    "num_experts_per_tok": 2, "full_attention_interval": 2, "vocab_size": 100})
config = config.with_precision(compute=torch.bfloat16, state=torch.bfloat16)
lowered = qn.jit(qn.decode, donate="state").trace(*qn.specs(config, 3, 200)).lower("npu:910b")
try:
    lowered.compile()
except qn.TargetError as error:
    print(error)
"""


def test_cann_absent() -> None:
    """The wheel without CANN beneath it: lowering works, compiling says what is missing."""
    bare = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=bare, capture_output=True, text=True)
    told = done.stdout.strip()
    assert told.startswith("CANN is absent, torch_npu does not find lib"), done.stderr
    assert "set_env.sh" in told and "\n" not in told


def test_a_target_of_another_chip_is_refused() -> None:
    right = here()
    other = "npu:a3" if right.name == "npu:910b" else "npu:910b"
    given = case("decode", params("fused"))
    lowered = qn.jit(given.function).trace(*given.arguments).lower(other)
    with pytest.raises(qn.TargetError, match=f"this device is .*: use '{right.name}'"):
        lowered.compile()


def test_facts_found_here_make_a_target_that_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that the installed package lacks is a reason in the report; the step runs without."""
    monkeypatch.delattr(probe.require_torch_npu(), "npu_mrope")
    target = resolve(here().name, **probe.device_facts().facts._asdict())
    given = case("decode", params("fused"))
    lowered = qn.jit(given.function, donate="state").trace(*given.arguments).lower(target)
    assert "rotary_composed (rotary: the installed torch_npu has no npu_mrope)" in lowered.report()
    logits, _ = lowered.compile()(*there(given.arguments))
    assert torch.isfinite(logits.cpu()).all()


def test_arguments_of_a_step_on_the_host_are_named() -> None:
    given = case("decode", params("fused"))
    step = qn.jit(given.function).trace(*given.arguments).lower(here()).compile()
    with pytest.raises(qn.LoweringError, match=r"params.embed must be on 'npu', got 'cpu': qn.pl"):
        step(*given.arguments)
