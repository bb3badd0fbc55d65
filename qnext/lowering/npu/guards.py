"""Reasons that rules of several tables decline with."""

from torch import Tensor


def other_width(shared_gate_up: Tensor, gate_up: Tensor) -> str | None:
    """Why the shared expert is not one more of the others, or None: its width is another."""
    if shared_gate_up.shape[0] == gate_up.shape[1]:
        return None
    return (
        f"the shared expert's width is {shared_gate_up.shape[0] // 2}, the others' "
        f"{gate_up.shape[1] // 2}"
    )
