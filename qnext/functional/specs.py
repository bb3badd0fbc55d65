"""Specs: trees of shapes and dtypes without values, to trace a model that is not there."""

import torch
from torch import Tensor

from qnext.functional.config import Config
from qnext.functional.params import Params, empty_params
from qnext.functional.state import State, init_state


def specs(
    config: Config, batch: int, capacity: int, seq: int | None = None, draft: int = 0
) -> tuple[Params, State, Tensor]:
    """Specs of (params, state, tokens): the same trees, with tensors on the "meta" device.

    tokens are [batch], as `decode` takes them, or [batch, seq] where `seq` is given.
    """
    shape = (batch,) if seq is None else (batch, seq)
    return (
        empty_params(config, "meta"),
        init_state(config, batch, capacity, device="meta", draft=draft),
        torch.empty(shape, dtype=torch.int64, device="meta"),
    )
