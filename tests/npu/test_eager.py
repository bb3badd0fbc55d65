"""The model as it is, on the device: references of torch operations, slow and right."""

import pytest
import torch

import qnext as qn
from qnext.functional.tree import map_leaves
from tests.npu.models import BF16, here, params
from tests.samples import relative_rms


def converted(weights: qn.Params, dtype: torch.dtype) -> qn.Params:
    """The same weights in another compute dtype, with a float32 state."""
    config = weights.config.with_precision(compute=dtype, state=torch.float32)
    wide = map_leaves(lambda leaf: leaf.to(dtype) if leaf.dtype == BF16 else leaf, weights)
    return wide._replace(config=config)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (BF16, 2e-2)])
def test_prefill_and_decode(dtype: torch.dtype, tolerance: float) -> None:
    """float32 sums in another order; bf16 activations through four layers round at every seam."""
    weights = converted(params("fused"), dtype)
    state = qn.init_state(weights.config, 3, 300)
    tokens = torch.randint(0, 200, (3, 70), generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([70, 3, 41])
    want, after = qn.prefill(weights, state, tokens, lengths)
    there = qn.place(weights, "npu")
    got, moved = qn.prefill(there, qn.place(state, "npu"), tokens.npu(), lengths.npu())
    assert relative_rms(got.cpu(), want) < tolerance
    want, _ = qn.decode(weights, after, tokens[:, 0])
    got, _ = qn.decode(there, moved, tokens[:, 0].npu())
    assert relative_rms(got.cpu(), want) < tolerance


def test_generate_with_a_compiled_step() -> None:
    """The reference loop on the device, its decode compiled: the tokens of the host."""
    weights = converted(params("fused"), torch.float32)
    prompt = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(6))
    eos = 17
    want, _ = qn.generate(weights, qn.init_state(weights.config, 2, 60), prompt, 20, eos=eos)
    there, state = (qn.place(t, "npu") for t in (weights, qn.init_state(weights.config, 2, 60)))
    step = qn.jit(qn.decode, donate="state", target=here().name)
    got, _ = qn.generate(there, state, prompt.npu(), 20, eos=eos, step=step)
    assert torch.equal(got.cpu(), want)
