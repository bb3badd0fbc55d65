"""What a step is lowered for: the reference, or a chip with the facts that hold on it.

A target is a value. Lowering asks it and nothing else, so a step can be lowered for a chip that is
not here; on a machine with one, `qnext.lowering.npu.probe` finds out the facts (`qnext doctor`).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from qnext.errors import TargetError

GIB = 1 << 30
# facts that are one of a few values
CHOICES = {
    "custom_conv": (None, "sgl", "vllm"),
    "dispatch": (None, "direct", "relayed"),
    "isa": ("native", "avx2", "portable"),
}


class Facts(NamedTuple):
    """Which calls and limits hold on a chip with its installed software; limits are inclusive.

    The defaults are what CANN's documentation of these calls promises, and where releases differ,
    the narrower of the two: a step lowered on defaults runs on every release.
    """

    # the fused attention takes layout TND with head_dim 256; documented are 64, 128 and 192, CANN
    # 8.3 and others refuse it with error 561002 (vllm-ascend issues 4020, 9632). Else: BSND
    attention_tnd_256: bool = False
    # npu_chunk_gated_delta_rule is there; some CANN builds lack it
    chunk_delta_rule: bool = True
    # and is right for decays beyond the -1 <= g <= 0 that it documents and most models leave: a
    # build that divides exponentials gives 0 / 0 (docs/precision.md). Only a probe may say yes
    chunk_strong_decay: bool = False
    # the recurrent delta rule takes a float32 state; only the newest CANN documents it
    state_float32: bool = False
    # the chunked one does; documented for the 950 alone
    chunk_state_float32: bool = False
    # a one-launch causal convolution of width 4: "sgl" is sgl-kernel-npu's causal_conv1d,
    # "vllm" is vllm-ascend's npu_causal_conv1d_custom, None the composition of torch_npu's calls
    custom_conv: Literal["sgl", "vllm"] | None = None
    # tokens a row of one call of the recurrent delta rule: beyond it rows silently get no output
    max_verify_tokens: int = 8
    # heads and head sizes of the recurrent and of the chunked delta rule
    recurrent_heads: int = 256
    recurrent_head_dim: int = 256  # newer releases: 512
    chunk_heads: int = 64
    chunk_head_dim: int = 128
    # the fused attention over pages [pages, page, heads * head_dim]: the last axis, the page size
    # (tokens; a multiple of 128 wherever a row may have more than one query) and the head size
    attention_kv_width: int = 65535
    attention_page_multiple: int = 128
    attention_page_max: int = 512  # newer releases: 1024
    attention_head_dim: int = 512
    # query heads to one head of keys and values
    attention_group: int = 64
    # routing: k of npu_moe_gating_top_k_softmax_v2, experts of npu_grouped_matmul
    routing_top_k: int = 1024
    grouped_experts: int = 1024
    # columns of the first weight of an int8 expert, npu_grouped_matmul_swiglu_quant_v2
    grouped_swiglu_columns: int = 10240
    # how npu_moe_distribute_dispatch_v2 reaches the ranks of a token's experts: "direct" on the A3,
    # "relayed" by ranks of the same number in other servers on the A2; None: not documented
    dispatch: Literal["direct", "relayed"] | None = None
    # calls that rules use and the installed torch_npu lacks, by name; the probe fills it
    missing: tuple[str, ...] = ()


class CpuFacts(NamedTuple):
    """What the kernels of the `cpu` target are compiled for."""

    # instructions they may use: all of this machine's, AVX2 at most, or none beyond the platform's
    # common ones. Results of integers are equal, those of floats are within their tolerances
    isa: Literal["native", "avx2", "portable"] = "native"


@dataclass(frozen=True)
class Chip:
    """Nominal figures of one device as torch_npu counts devices: a card, or a die of two.

    Peaks are the maker's, dense, never measured by us: good for a roofline, no promise of speed.
    """

    name: str
    soc_names: tuple[str, ...]  # what torch.npu.get_device_name() begins with
    bf16_flops: float  # per second; a multiply-add counts two
    int8_ops: float  # per second
    bytes_per_second: float  # of the device memory
    memory_bytes: int
    launch_seconds: float  # of one node of a captured graph, beside its own work
    cores: int | None  # cube cores; None where not published


# Assumed: neither the maker nor anybody else we found publishes what a node of a replayed graph
# costs beside its work. Every page that uses it says so and gives the result for other values.
LAUNCH_SECONDS = 2e-6

# Ascend 910B3, the 64 GB part of Atlas 800I/800T A2: 313 TFLOP/s bf16 is what is commonly published
# and is 20 cores * 4096 multiply-adds * 1.91 GHz; int8 is twice that; HBM2e at 1.6 TB/s. B1 and B2
# have 24 cores, B4 half the memory.
A2 = Chip(
    name="Ascend 910B (A2)",
    soc_names=("Ascend910B",),
    bf16_flops=313e12,
    int8_ops=626e12,
    bytes_per_second=1.6e12,
    memory_bytes=64 * GIB,
    launch_seconds=LAUNCH_SECONDS,
    cores=20,
)
# Ascend 910C, one of its two dies (a device each): half of 752 TFLOP/s bf16, 1,504 TOP/s int8,
# 128 GB and 3.2 TB/s a package, as in "Serving Large Language Models on Huawei CloudMatrix384"
# (arXiv 2506.12708); 24 cores of the same kind as A2's.
A3 = Chip(
    name="Ascend 910C, one die (A3)",
    soc_names=("Ascend910_93",),
    bf16_flops=376e12,
    int8_ops=752e12,
    bytes_per_second=1.6e12,
    memory_bytes=64 * GIB,
    launch_seconds=LAUNCH_SECONDS,
    cores=24,
)
# Ascend 950PR, as announced in September 2025: 1 PFLOP/s FP8, 128 GB at 1.6 TB/s (950DT: 144 GB at
# 4 TB/s). Peaks of bf16 and int8 were not announced: taken as half of FP8 and equal to it.
A950 = Chip(
    name="Ascend 950PR",
    soc_names=("Ascend950", "Ascend910_95"),
    bf16_flops=500e12,
    int8_ops=1000e12,
    bytes_per_second=1.6e12,
    memory_bytes=128 * GIB,
    launch_seconds=LAUNCH_SECONDS,
    cores=None,
)


DEFAULTS = Facts()
KERNELS = CpuFacts()


@dataclass(frozen=True)
class Target:
    """Where a lowered step runs; equal targets give equal lowerings."""

    name: str
    kind: Literal["reference", "npu", "cpu"]
    chip: Chip | None = None  # None: of the machine at hand, whose figures we do not know
    facts: Any = DEFAULTS  # Facts; CpuFacts where the kind is "cpu"
    host_lengths: bool = False  # a choice: attention reads exact lengths, arguments from the host

    def with_facts(self, **facts: Any) -> "Target":
        """This target with some facts decided otherwise; an unknown or ill-typed one raises."""
        if facts and self.kind == "reference":
            raise TargetError(
                f"target {self.name!r} has no facts to set, got {', '.join(sorted(facts))}: "
                f"give them to one of {_listed(n for n in TARGETS if n != self.name)}"
            )
        for fact, value in facts.items():
            _check_fact(type(self.facts), fact, value)
        return replace(self, facts=self.facts._replace(**facts))

    def lacks(self, call: str) -> str | None:
        """Why a rule cannot emit a torch_npu call here, or None."""
        if self.kind == "npu" and call in self.facts.missing:
            return f"the installed torch_npu has no {call}"
        return None


TARGETS = {
    target.name: target
    for target in (
        Target("reference", "reference"),
        Target("cpu", "cpu", facts=KERNELS),
        Target("npu:910b", "npu", A2, Facts(dispatch="relayed")),
        Target("npu:a3", "npu", A3, Facts(dispatch="direct")),
        Target("npu:950", "npu", A950, Facts(state_float32=True, chunk_state_float32=True)),
    )
}
NPUS = tuple(name for name, target in TARGETS.items() if target.kind == "npu")


def resolve(name: str, **facts: Any) -> Target:
    """The target of a name, with some facts decided by the caller.

    An unknown name, an unknown fact or a value that is none of the fact's raises TargetError.
    """
    if name not in TARGETS:
        raise TargetError(f"unknown target {name!r}: known are {_listed(TARGETS)}")
    return TARGETS[name].with_facts(**facts)


def of_device(device: str) -> Target | None:
    """The target of a device's name as torch.npu.get_device_name() gives it; None if unknown."""
    for target in TARGETS.values():
        if target.chip is not None and device.startswith(target.chip.soc_names):
            return target
    return None


def _check_fact(kind: Any, fact: str, value: Any) -> None:
    if fact not in kind._fields:
        raise TargetError(f"unknown fact {fact!r}: known are {_listed(kind._fields)}")
    default = kind._field_defaults[fact]
    if fact in CHOICES:
        good, rule = value in CHOICES[fact], f"one of {CHOICES[fact]}"
    elif fact == "missing":
        good = isinstance(value, tuple) and all(isinstance(call, str) for call in value)
        rule = "a tuple of names of calls"
    elif isinstance(default, bool):
        good, rule = isinstance(value, bool), "True or False"
    else:
        good = isinstance(value, int) and not isinstance(value, bool) and value > 0
        rule = "a positive integer"
    if not good:
        raise TargetError(f"fact {fact} is {value!r}, must be {rule}")


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
