"""What the NPU of this machine and its software can do, found out by tiny calls at start-up.

Releases of CANN differ in ways no version number tells, so a fact is decided by the call itself:
it runs, with a result known beforehand, or its reason is kept. Nothing here prints a traceback.
"""

import importlib.metadata
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn.functional import normalize

from qnext.errors import TargetError
from qnext.functional.ops import short_conv
from qnext.functional.ops.delta_rule import delta_scan
from qnext.lowering.npu import custom
from qnext.lowering.target import Facts, Target, of_device

NEEDS_EXTRA = "torch_npu is not installed: pip install 'qnext[npu]'"
SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
# every torch_npu call that a rule may emit
CALLS = (
    "npu_add_rms_norm",
    "npu_chunk_gated_delta_rule",
    "npu_fused_infer_attention_score_v2",
    "npu_grouped_matmul",
    "npu_moe_distribute_combine_v2",
    "npu_moe_distribute_dispatch_v2",
    "npu_moe_finalize_routing",
    "npu_moe_gating_top_k_softmax_v2",
    "npu_moe_init_routing_v2",
    "npu_mrope",
    "npu_recurrent_gated_delta_rule",
    "npu_rms_norm",
    "npu_scatter_pa_kv_cache",
    "npu_swiglu",
)
# float32 holds it and bf16 rounds it to 1; a float32 state is off by less than TINY, as no sum of
# these probes has two terms
KEPT, TINY = 1 + 2**-12, 2**-20


class Row(NamedTuple):
    """One fact: whether it holds, and in one line why we say so."""

    fact: str
    holds: bool
    reason: str


class Findings(NamedTuple):
    facts: Facts
    rows: tuple[Row, ...]


def require_torch_npu() -> ModuleType:
    """The package torch_npu; TargetError says in one sentence what is absent, and the way there."""
    try:
        import torch_npu
    except ModuleNotFoundError as error:
        if error.name in (None, "torch_npu"):
            raise TargetError(NEEDS_EXTRA) from None
        raise TargetError(f"torch_npu needs {error.name}: pip install {error.name}") from None
    except (ImportError, OSError) as error:
        library = re.search(r"(lib\S+\.so\S*): cannot open shared object", str(error))
        if library is None:
            raise TargetError(
                f"torch_npu does not import, {first_line(error)}: "
                "install releases of torch, torch_npu and CANN that belong together"
            ) from None
        raise TargetError(
            f"CANN is absent, torch_npu does not find {library[1]}: "
            f"install the CANN toolkit, then {SET_ENV}"
        ) from None
    return torch_npu


def installed_version() -> str | None:
    """The version of the installed torch_npu, whether it imports or not; None without one."""
    try:
        return importlib.metadata.version("torch-npu")
    except importlib.metadata.PackageNotFoundError:
        return None


def require_call(name: str) -> str | None:
    """Why a call of torch_npu cannot be made here, as a guard says it, or None if it can."""
    try:
        package = require_torch_npu()
    except TargetError as error:
        return str(error)
    if hasattr(package, name):
        return None
    return f"torch_npu {package.__version__} has no {name}"


def use_device(number: int) -> None:
    """Take one of this machine's devices, in turn, for this process."""
    npu = require_torch_npu().npu
    npu.set_device(number % npu.device_count())


def device_name() -> str:
    """The first device's name, such as Ascend910B3; TargetError where there is none."""
    npu = require_torch_npu().npu
    try:
        if npu.is_available() and npu.device_count():
            return str(npu.get_device_name())
        reason = "torch_npu sees no device"
    except RuntimeError as error:  # the driver is absent, or another process holds the device
        reason = first_line(error)
    raise TargetError(f"no NPU here, {reason}: `npu-smi info` must list one")


def cann_version() -> str | None:
    """The version of the CANN toolkit as torch_npu reads it, or None where it does not say."""
    package = require_torch_npu()
    try:
        version = str(package.npu.utils.get_cann_version())
    except (AttributeError, RuntimeError, OSError, ValueError):
        return None
    return version if any(letter.isdigit() for letter in version) else None


def check_chip(target: Target) -> None:
    """TargetError unless this machine's device is of the target's chip; the reference has none."""
    if target.chip is None:
        return
    device = device_name()
    if not device.startswith(target.chip.soc_names):
        right = of_device(device)
        raise TargetError(
            f"target {target.name!r} is for {target.chip.name}, this device is {device}: "
            + (f"use {right.name!r}" if right else "no target knows this chip")
        )


def device_facts() -> Findings:
    """Probe this machine's device: its facts, and a row for each with its reason.

    Facts that no probe decides are those of the chip's target. Without a device: TargetError.
    """
    target = of_device(device_name())
    facts = target.facts if target else Facts()
    probes = {
        "attention_tnd_256": ("npu_fused_infer_attention_score_v2", _try_attention),
        "chunk_delta_rule": ("npu_chunk_gated_delta_rule", _try_chunk),
        "chunk_strong_decay": ("npu_chunk_gated_delta_rule", _try_strong_decay),
        "state_float32": ("npu_recurrent_gated_delta_rule", _try_float32_state),
        "chunk_state_float32": ("npu_chunk_gated_delta_rule", _try_chunk_float32_state),
    }
    rows = [_probe(fact, call, attempt) for fact, (call, attempt) in probes.items()]
    conv, row = _find_conv()
    missing = tuple(name for name in CALLS if require_call(name))
    found = f"absent: {', '.join(missing)}" if missing else f"all {len(CALLS)} are there"
    rows += [row, Row("calls", not missing, found)]
    decided: dict[str, Any] = {row.fact: row.holds for row in rows if row.fact in probes}
    return Findings(facts._replace(**decided, custom_conv=conv, missing=missing), tuple(rows))


def first_line(error: BaseException) -> str:
    """What an error says, in a line: torch_npu's begin with a place in its source, dropped here."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    return re.sub(r"^\S+:\S+\.cpp:\d+ NPU function error: ", "", line)


def _probe(fact: str, call: str, attempt: Callable[[ModuleType], str]) -> Row:
    """Run an attempt, which tells what is wrong or nothing; whatever it raises is the reason."""
    reason = require_call(call)
    if reason is None:
        try:
            package = require_torch_npu()
            with torch.no_grad():
                reason = attempt(package)
                package.npu.synchronize()  # an error of the device belongs to this probe
        except Exception as error:  # any: a probe that ends the start-up is worse than a "no"
            reason = f"{call} refuses: {first_line(error)}"
    return Row(fact, not reason, reason or f"{call} ran and gave the right result")


def _try_attention(torch_npu: ModuleType) -> str:
    """Rows of 1 and 3 queries over pages of 128, TND, head_dim 256.

    Queries are 0 and values their positions, so a query sees the mean of the positions it may see.
    """
    heads, kv, dim, page, lengths = 16, 2, 256, 128, (5, 131)
    pool = torch.zeros(4, page, kv * dim, dtype=torch.bfloat16)
    table = torch.tensor([[3, 0], [2, 1]], dtype=torch.int32)
    for row, pages in enumerate(table.tolist()):
        for turn, place in enumerate(pages[: row + 1]):
            pool[place] = (turn * page + torch.arange(page))[:, None]
    mask = torch.triu(torch.ones(2048, 2048, dtype=torch.bool), 1)
    out = torch_npu.npu_fused_infer_attention_score_v2(
        torch.zeros(4, heads, dim, dtype=torch.bfloat16).to("npu"),
        torch.zeros_like(pool).to("npu"),
        pool.to("npu"),
        atten_mask=mask.to("npu"),
        actual_seq_qlen=[1, 4],  # sums, as TND has them
        actual_seq_kvlen=list(lengths),
        block_table=table.to("npu"),
        num_query_heads=heads,
        num_key_value_heads=kv,
        softmax_scale=dim**-0.5,
        input_layout="TND",
        sparse_mode=3,
        block_size=page,
    )[0].cpu()
    want = torch.tensor([2.0, 64.0, 64.5, 65.0])[:, None, None].expand(4, heads, dim)
    # half of what one position too many would shift the mean; bf16 is exact at these values
    return _differs(out, want, 0.25)


def _try_chunk(torch_npu: ModuleType, dtype: torch.dtype = torch.bfloat16) -> str:
    """Two rows of 1 and 2 tokens without decay: values land under orthogonal keys and come back.

    A state of `dtype` under a key that nobody uses is kept as it was.
    """
    heads, dim = 2, 128
    initial = torch.zeros(2, 2 * heads, dim, dim, dtype=dtype)
    initial[..., dim - 1] = KEPT
    key, value = _unit_keys(3, heads, dim), _values(3, 2 * heads, dim)
    out, state = torch_npu.npu_chunk_gated_delta_rule(
        key.to("npu"),
        key.to("npu"),
        value.to("npu"),
        beta=torch.full((3, 2 * heads), 0.5, dtype=torch.bfloat16).to("npu"),
        initial_state=initial.to("npu"),
        actual_seq_lengths=torch.tensor([1, 2], dtype=torch.int32).to("npu"),
        scale=1.0,
        g=torch.zeros(3, 2 * heads).to("npu"),
    )
    want, state, value = initial.clone(), state.cpu(), value / 2  # as beta halves what is written
    want[0, ..., 0], want[1, ..., 1], want[1, ..., 2] = value[0], value[1], value[2]
    if state.dtype != dtype:
        return f"wrong result: a state of {state.dtype} for one of {dtype}"
    kept = _differs(state[..., -1], want[..., -1], TINY)
    # two bf16 roundings of values up to 1
    return kept or _differs(out.cpu(), value, 2**-6) or _differs(state, want, 2**-6)


def _try_strong_decay(torch_npu: ModuleType) -> str:
    """Two rows of 70 tokens, log decays from -6 to -4 each, beside the definition on the host.

    A chunk of 64 decays by e^-320 and more, which float32 cannot hold: formulas that divide by it
    give NaN. One that clamps at the documented -1 errs by as much as the result is large.
    """
    rows, seq, heads, dim = 2, 70, 2, 128
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    query, key = (normalize(drawn(rows, seq, heads, dim), dim=-1).bfloat16() for _ in range(2))
    value, first = drawn(rows, seq, 2 * heads, dim).bfloat16(), drawn(rows, 2 * heads, dim, dim)
    g = -4 - 2 * torch.rand(rows, seq, 2 * heads, generator=generator)
    beta, first = drawn(rows, seq, 2 * heads).sigmoid().bfloat16(), first.bfloat16()
    lengths = torch.full((rows,), seq, dtype=torch.int32)
    flat = (x.flatten(0, 1).to("npu") for x in (query, key, value))
    out, last = torch_npu.npu_chunk_gated_delta_rule(
        *flat,
        beta=beta.flatten(0, 1).to("npu"),
        initial_state=first.to("npu"),
        actual_seq_lengths=lengths.to("npu"),
        scale=1.0,
        g=g.flatten(0, 1).to("npu"),
    )
    q, k, v, b, memory = (x.float() for x in (query, key, value, beta, first))
    want, state = delta_scan(q, k, v, g, b, memory, each=False)
    # bf16 roundings at every stage come to half a percent (docs/precision.md)
    return _strays(out.cpu().view_as(want), want, 2**-6) or _strays(last.cpu(), state, 2**-6)


def _try_chunk_float32_state(torch_npu: ModuleType) -> str:
    return _try_chunk(torch_npu, torch.float32)


def _try_float32_state(torch_npu: ModuleType) -> str:
    """A state that bf16 cannot hold survives a step which does not touch it."""
    heads, dim = 2, 128
    key, value = _unit_keys(2, heads, dim), _values(2, 2 * heads, dim)
    state = torch.zeros(3, 2 * heads, dim, dim)
    state[..., dim - 1] = KEPT  # under a key that nobody uses
    pool = state.to("npu")
    out = torch_npu.npu_recurrent_gated_delta_rule(
        key.to("npu"),
        key.to("npu"),
        value.to("npu"),
        pool,
        beta=torch.ones(2, 2 * heads, dtype=torch.bfloat16).to("npu"),
        scale=1.0,
        actual_seq_lengths=torch.tensor([1, 1], dtype=torch.int32).to("npu"),
        ssm_state_indices=torch.tensor([2, 1], dtype=torch.int32).to("npu"),
        g=torch.zeros(2, 2 * heads).to("npu"),
    )
    state[2, ..., 0], state[1, ..., 1] = value[0], value[1]
    return _differs(out.cpu(), value, 2**-6) or _differs(pool.cpu(), state, TINY)


def _unit_keys(tokens: int, heads: int, dim: int) -> torch.Tensor:
    """`[tokens, heads, dim]`: token t's key is the t-th unit vector."""
    return torch.eye(tokens, dim, dtype=torch.bfloat16)[:, None].expand(-1, heads, -1).contiguous()


def _values(tokens: int, heads: int, dim: int) -> torch.Tensor:
    """`[tokens, heads, dim]` eighths from 1/8 to 1, no two heads alike; exact in bf16."""
    count = torch.arange(tokens * heads * dim).view(tokens, heads, dim)
    return ((count + count // dim) % 8 + 1).to(torch.bfloat16) / 8


def _differs(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> str:
    """What is wrong with a result, or nothing; a NaN is wrong."""
    if got.shape != want.shape:
        return f"wrong result: shape {tuple(got.shape)}, must be {tuple(want.shape)}"
    apart = (got.float() - want.float()).abs().max().item()
    return (
        "" if apart <= tolerance else f"wrong result: off by {apart:.3g}, allowed {tolerance:.3g}"
    )


def _strays(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> str:
    """The same of a result as a whole: relative RMS."""
    apart = (got.float() - want.float()).norm() / want.float().norm()
    return _differs(apart, torch.zeros(()), tolerance)


def _find_conv() -> tuple[custom.Kind | None, Row]:
    """The first package whose convolution of width 4 runs and gives the right result."""
    reasons = []
    for kind, package in custom.PACKAGES.items():
        try:
            with torch.no_grad():
                wrong = _try_conv(kind)
                require_torch_npu().npu.synchronize()
            reason = f"{package.name}: {wrong}" if wrong else ""
        except TargetError as error:
            reason = first_line(error)
        except Exception as error:  # any: as in _probe
            reason = f"{package.name} refuses: {first_line(error)}"
        if not reason:
            return kind, Row("custom_conv", True, f"{package.name} ran and gave the right result")
        reasons.append(reason)
    return None, Row("custom_conv", False, "; ".join(reasons))


def _try_conv(kind: custom.Kind) -> str:
    """Two rows take three tokens, after 3 and 1 accepted ones: a window at a wrong place shows."""
    custom.operator(kind)  # what is absent says so before the device is asked for anything
    sample = {
        "x": _values(2, 3, 32),
        "weight": _values(1, 32, 4)[0] / 4,
        "window": _values(6, 5, 32),
        "rows": torch.tensor([4, 1], dtype=torch.int32),
        "offset": torch.tensor([2, 0], dtype=torch.int32),
        "start": torch.ones(2, dtype=torch.int32),
    }
    want, windows = short_conv(**sample)
    there = {name: tensor.to("npu") for name, tensor in sample.items()}
    out, pool = custom.EMITS[kind](**there, moves_by_one=True)
    # two bf16 roundings of values up to 1; windows are copies
    return _differs(out.cpu(), want, 2**-6) or _differs(pool.cpu(), windows, 0.0)
