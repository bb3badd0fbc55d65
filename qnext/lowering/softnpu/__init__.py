"""A software Ascend for tests: the real torch_npu wheel on a small CANN of our own, on a CPU.

`python -m qnext.lowering.softnpu.device -m pytest tests/npu` builds the libraries and runs a
command on them. Memory, streams, events and graphs are real calls of the wheel; every aclnn entry
is a kernel written in Python under `kernels`, stricter than the chip about its documented contract.
Nothing outside this package knows of it: only the library path differs.
"""
