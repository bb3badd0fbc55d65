"""The kernels, a family a file; importing this fills the table of aclnn calls."""

from importlib import import_module

FAMILIES = (
    *("attention", "delta_rule", "dispatch", "elementwise", "fusion", "index", "matmul"),
    *("moe", "norm", "quant", "rotary", "sampling"),
)
for _family in FAMILIES:
    import_module(f"{__name__}.{_family}")
