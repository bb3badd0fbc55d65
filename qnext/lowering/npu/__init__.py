"""Ascend: the only room that may import torch_npu, and only inside functions."""
