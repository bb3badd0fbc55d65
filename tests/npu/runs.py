"""Runs of one small model on the device, and the same in float32 on the host.

A layer of each mixer; the delta net has keys and values of one width, as the published model has:
only there can the axes of a state be changed over unseen.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import qnext as qn
from qnext.functional.ops import PRIMITIVES
from qnext.functional.state import Delta
from qnext.functional.tree import leaves, rebuild
from qnext.lowering.compiled import Compiled
from tests.npu.models import BF16, here, params, there

F32 = torch.float32
SHAPE = {"num_hidden_layers": 2, "full_attention_interval": 2, "linear_key_head_dim": 48}
DRAFT = 2
BUDGET = 2e-2  # two layers of bfloat16 roundings against float32 with the same weights
RULE = PRIMITIVES["delta_rule"].tolerance[BF16].relative_rms


def weights(state: torch.dtype = BF16, **changes: Any) -> qn.Params:
    """Without experts: no choice of experts turns on a rounding."""
    return params("fused", state, **SHAPE | {"num_experts": 0} | changes)


def exact(given: qn.Params) -> qn.Params:
    """The same weights in float32, to compute the truth with on the host."""
    config = given.config.with_precision(compute=F32, state=F32)
    made = rebuild(given, [leaf.float() for leaf in leaves(given)])
    return made._replace(config=config)


def compiled(function: Any, arguments: tuple[Any, ...], target: Any = None, **how: Any) -> Compiled:
    traced = qn.jit(function, donate="state").trace(*arguments)
    return traced.lower(target or here(), **{"strict": True} | how).compile()


STEPS: dict[Callable[..., Any], Any] = {
    function: qn.jit(function, donate="state", target=here().name)
    for function in (qn.decode, qn.verify, qn.prefill, qn.forward)
}


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """The compiled step on copies of the arguments; its results on the host."""
    return qn.place(STEPS[function](*there(arguments)), "cpu")


def recurrent(state: qn.State) -> Tensor:
    """The present recurrent states of the first layer."""
    part = state.layers[0]
    assert isinstance(part, Delta)
    return part.recurrent[state.slots[:, 0].long()]
